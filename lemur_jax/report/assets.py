"""Style and script of the page, inline so that the file needs nothing but a browser."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1a1f29; --soft: #5a6473; --rule: #d8dde5; --grid: #e6e9ef;
  --good: #0a7a4b; --bad: #b3261e; --mark: #fff4d6;
  --c0: #2b3342; --c1: #1f6fd6; --c2: #d2560b; --c3: #0b8a5f; --c4: #8a3fc7;
  --c5: #c02672; --c6: #8a6d00; --c7: #0a7f93; --c8: #7a4b2a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11151c; --card: #1a202a; --text: #e8ecf2; --soft: #9ba7b8; --rule: #333d4c; --grid: #28303d;
  --good: #4fd19a; --bad: #ff8a80; --mark: #3a3320;
  --c0: #d5dce6; --c1: #6aa8ff; --c2: #ff9a5c; --c3: #4fd1a1; --c4: #c79bff;
  --c5: #ff8ac2; --c6: #e2c044; --c7: #55cde0; --c8: #d3a583; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 10px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; }
.soft, figcaption p, .x-label, footer { color: var(--soft); font-size: .87rem; }
.card, .chart { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { overflow-x: auto; }
h2 + .soft { margin: -6px 0 8px; }
.note { margin-top: 8px; padding: 8px 12px; background: var(--mark); border-radius: 8px; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--card); }
td small { display: block; font-size: .8rem; color: var(--soft); }
.bits td b { font-size: 1.1rem; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); }
.keys td { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 9rem; }
.keys th { text-align: left; }
.keys tbody th { font-weight: 400; min-width: 21rem; }
.keys :is(tbody th, td) { padding: 5px 14px;
  font: .84rem/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.bar { display: flex; height: 8px; margin-top: 5px; min-width: 9rem; border-radius: 4px; overflow: hidden; }
.bar i { background: var(--c); flex-basis: 0; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  background: var(--c); margin-right: 5px; }
td .key { display: none; }
.sample { padding: 10px 14px; margin-top: 10px; }
pre { margin: 4px 0 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .84rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin-top: 10px; }
summary { cursor: pointer; padding: 9px 14px; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); }
.wide { grid-template-columns: 100%; }
.chart { margin: 0; padding: 14px 16px 10px; min-width: 0; display: flex; flex-direction: column; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 10px; align-items: baseline; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0;
  font-size: .87rem; }
.legend li { overflow-wrap: anywhere; }
.legend li::before { content: ""; display: inline-block; width: 16px; border-top: 3px solid var(--c);
  margin-right: 6px; vertical-align: middle; }
.legend .dashed::before { border-top-style: dashed; border-top-width: 2px; }
.plot { position: relative; display: flex; margin-top: auto; padding-top: 8px; }
.y { position: relative; flex: 0 0 50px; white-space: nowrap; height: 230px; margin-top: 22px; }
.y span { position: absolute; right: 7px; transform: translateY(50%); }
.y, .x, .stage { color: var(--soft); font-size: .78rem; line-height: 20px;
  font-variant-numeric: tabular-nums; }
/* The padding keeps dots at the outer edges whole. */
.panels { display: flex; gap: 10px; flex: 1; min-width: 0; overflow-x: auto;
  margin-left: -5px; padding: 0 5px; }
.panel { flex: 1 1 0; min-width: 84px; container-type: inline-size; }
@container (max-width: 150px) { .spare { display: none; } }
.stage { height: 22px; text-align: center; font-weight: 600;
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.area { position: relative; height: 230px; border: 1px solid var(--rule); border-radius: 3px; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.area i { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.x { position: relative; height: 20px; }
.x span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.x .first { transform: none; } .x .last { transform: translateX(-100%); }
.x-label { text-align: center; padding-left: 50px; font-size: .8rem; }
svg path { vector-effect: non-scaling-stroke; fill: none; }
.grid { stroke: var(--grid); stroke-width: 1; }
.line { stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 4; stroke-width: 1.3; }
.dots { stroke: var(--c); stroke-width: 7; stroke-linecap: round; }
svg .range { fill: var(--c); fill-opacity: .16; stroke: none; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.c8 { --c: var(--c8); }
.tip { position: absolute; z-index: 1; top: 30px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; padding: 5px 9px; font-size: .8rem; line-height: 1.45; pointer-events: none;
  box-shadow: 0 2px 8px rgb(0 0 0 / .2); white-space: nowrap; font-variant-numeric: tabular-nums; }
.tip[hidden] { display: none; }
.tip span { display: block; }
.tip span::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  background: var(--c); margin-right: 6px; }
footer { margin-top: 32px; }
@media (max-width: 1100px) { th, td { padding: 8px 9px; } }
@media (max-width: 600px) {
  main { padding: 16px 10px 32px; }
  .chart { padding: 12px 10px 8px; }
  .y { flex-basis: 46px; height: 200px; } .area { height: 200px; } .x-label { padding-left: 46px; }
  .keys tbody th { min-width: 8.5rem; white-space: normal; } .keys td { min-width: 6.5rem; }
  .panels { gap: 6px; }
  .keys :is(th, td) { padding: 7px 10px; }
  table:not(.keys) :is(tbody, tr, th) { display: block; }
  table:not(.keys) thead { display: none; }
  table:not(.keys) tr { padding: 10px 12px; border-bottom: 1px solid var(--grid); }
  table:not(.keys) tr:last-child { border-bottom: 0; }
  table:not(.keys) :is(tbody th, td) { padding: 2px 0; border: 0; white-space: normal; position: static; }
  table:not(.keys) td { display: flex; gap: 8px; align-items: baseline; }
  table:not(.keys) td::before { content: attr(data-head); color: var(--soft); margin-right: auto;
    flex: none; max-width: 50%; overflow-wrap: anywhere; text-align: left; }
  table:not(.keys) td small { order: -1; }
  table:not(.keys) td::before { order: -2; }
  td .key { display: inline; order: -3; }
}
@media print { body { background: none; } .chart { break-inside: avoid; } }
"""

JS = """
for (const figure of document.querySelectorAll(".chart")) {
  const panels = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot"), tip = figure.querySelector(".tip");
  figure.querySelectorAll(".area").forEach((area, index) => {
    const line = document.createElement("i");
    const hide = () => { tip.hidden = true; line.remove(); };
    const show = event => {
      const box = area.getBoundingClientRect(), frame = plot.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * panels[index].end;
      const nearer = (a, b) => Math.abs(a - at) < Math.abs(b - at);
      const nearest = xs => xs.reduce((best, x, i) => nearer(x, xs[best]) ? i : best, 0);
      const rows = panels[index].series.filter(one => one.x.length).map(one => [one, nearest(one.x)])
        .filter(([one, i]) => one.y[i] !== null);
      if (!rows.length) return hide();
      const step = rows.map(([one, i]) => one.x[i])
        .reduce((a, b) => nearer(b, a) ? b : a);
      tip.replaceChildren(document.createTextNode("update " + Math.round(step).toLocaleString("en")),
        ...rows.map(([one, i]) => {
          const row = document.createElement("span");
          row.className = "c" + one.colour;
          row.textContent = one.name + "  " + one.y[i].toLocaleString("en", {maximumSignificantDigits: 4});
          return row;
        }));
      tip.hidden = false;
      const x = box.left - frame.left + step / panels[index].end * box.width;
      line.style.left = (step / panels[index].end * 100) + "%";
      area.append(line);
      tip.style.left = Math.max(0, Math.min(frame.width - tip.offsetWidth,
        x + (x > frame.width / 2 ? -tip.offsetWidth - 10 : 10))) + "px";
    };
    area.addEventListener("pointermove", show);
    area.addEventListener("pointerdown", show);
    area.addEventListener("pointerleave", hide);
  });
}
"""

"use strict";
// Draws the line charts of a page. Each <figure class="chart"> holds its data as JSON, written by report/charts.py:
//   {title, unit, log, zero, runs: [{name, end, colour}],
//    lines: [{run, name, panel, colour, dots, dashed, x, y, low, high}]}
// Side by side, a panel is a run and a colour is a name (a data source, a task). Overlaid, a panel is a name and a
// colour is a run.

const HEIGHT = 230, LEFT = 48, RIGHT = 10, TOP = 8, BOTTOM = 22;
const page = {overlay: document.body.dataset.overlay === "1", smoothing: 0, hidden: new Set()};
const escapeText = text => text.replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);

// Round values from low to high, 1, 2, 2.5 or 5 × 10^n apart, about `count` of them.
function linearTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) ticks.push(factor * 10 ** power);
    const inside = ticks.filter(tick => low <= tick && tick <= high);
    if (inside.length >= 4) return inside.filter((_, i) => i % Math.ceil(inside.length / 7) === 0);
  }
  return linearTicks(low, high, 6);
}

// 4e-5, 0.02, 1.5, 1.5k, 3.2M
function compact(value) {
  const size = Math.abs(value);
  if (size && size < 1e-2) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
  for (const [limit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= limit) return +(value / limit).toPrecision(4) + name;
  return String(+value.toPrecision(4));
}

// Exponential moving average, corrected for its start, as TensorBoard computes it; gaps stay gaps.
function smooth(y, weight) {
  let mean = 0, total = 0;
  return y.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

// The points of a line between two x, and at most `most` of them: means of neighbours, with their range.
function visible(line, from, to, most) {
  const y = page.smoothing && !line.dots && !line.dashed ? smooth(line.y, page.smoothing) : line.y;
  const low = line.low || line.y, high = line.high || line.y;
  let first = line.x.findIndex(x => x >= from), last = line.x.findLastIndex(x => x <= to);
  if (first < 0 || last < 0) return {x: [], y: [], raw: [], low: [], high: []};
  first = Math.max(0, first - 1);
  last = Math.min(line.x.length - 1, last + 1);
  const size = Math.max(1, Math.ceil((last - first + 1) / most));
  const out = {x: [], y: [], raw: [], low: [], high: []};
  const mean = values => values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
  for (let i = first; i <= last; i += size) {
    const part = values => values.slice(i, Math.min(i + size, last + 1)).filter(value => value !== null);
    out.x.push(mean(part(line.x)));
    out.y.push(mean(part(y)));
    out.raw.push(mean(part(line.y)));
    out.low.push(part(low).length ? Math.min(...part(low)) : null);
    out.high.push(part(high).length ? Math.max(...part(high)) : null);
  }
  return out;
}

// What is drawn: [{title, end, lines: [{line, key, colour}]}].
function panelsOf(data) {
  if (!page.overlay) return data.runs.map((run, index) => ({
    title: run.name, end: run.end,
    lines: data.lines.filter(line => line.run === index)
      .map(line => ({line, key: line.name, colour: line.colour})),
  })).filter(panel => panel.lines.length);
  const end = Math.max(...data.runs.map(run => run.end));
  return [...new Set(data.lines.map(line => line.panel))].map(title => ({
    title, end,
    lines: data.lines.filter(line => line.panel === title)
      .map(line => ({line, key: data.runs[line.run].name, colour: data.runs[line.run].colour})),
  }));
}

function scale(values, data) {
  let low = Infinity, high = -Infinity;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];  // too many for arguments
  if (data.log && low > 0 && high / low > 3) {
    const margin = (high / low) ** 0.04;
    [low, high] = [low / margin, high * margin];
    return {log: true, ticks: logTicks(low, high), at: v => Math.log(v / low) / Math.log(high / low)};
  }
  if (data.zero) low = Math.min(low, 0);
  if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  const margin = 0.05 * (high - low);
  [low, high] = [low === 0 ? 0 : low - margin, high + margin];
  return {log: false, ticks: linearTicks(low, high, 5), at: v => (v - low) / (high - low)};
}

// Indices of the stretches without a gap.
function stretches(values) {
  const found = [[]];
  values.forEach((value, i) => {
    if (value !== null) found.at(-1).push(i);
    else if (found.at(-1).length) found.push([]);
  });
  return found.filter(part => part.length);
}

function shapes({line, colour}, points, x, y) {
  const at = (i, values) => `${x(points.x[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
  const path = values => stretches(values).map(part => "M" + part.map(i => at(i, values)).join("L")).join("");
  const dash = line.dashed ? " dashed" : "";
  let out = "";
  for (const part of stretches(points.low))
    if (part.some(i => points.low[i] !== points.high[i])) {
      const edge = [...part.map(i => at(i, points.high)), ...part.toReversed().map(i => at(i, points.low))];
      out += `<path class="range c${colour}" d="M${edge.join("L")}Z"/>`;
    }
  if (page.smoothing && !line.dots && !line.dashed) out += `<path class="line pale c${colour}" d="${path(points.raw)}"/>`;
  out += `<path class="line c${colour}${dash}" d="${path(points.y)}"/>`;
  const dots = line.dots ? stretches(points.y).flat() : stretches(points.y).filter(part => part.length === 1).flat();
  return out + dots.map(i => `<path class="dots c${colour}" d="M${at(i, points.y)}h0"/>`).join("");
}

function draw(figure) {
  const {data, panels, boxes, zoom} = figure.chart;
  const shown = panels.map((panel, index) => {
    const [from, to] = zoom[index] || [0, panel.end || 1], width = boxes[index].clientWidth;
    const lines = panel.lines.filter(one => !page.hidden.has(one.key))
      .map(one => [one, visible(one.line, from, to, Math.max(30, width / 4))]);
    return {from, to, width, lines};
  });
  const valuesOf = panel => panel.lines.flatMap(([, points]) => [...points.low, ...points.high, ...points.y])
    .filter(value => value !== null);
  const all = shown.flatMap(valuesOf);
  figure.querySelector(".reset").hidden = !Object.keys(zoom).length;
  shown.forEach((panel, index) => {
    const values = page.overlay ? valuesOf(panel) : all;
    const axis = scale(values.length ? values : [0, 1], data);
    const right = panel.width - RIGHT, bottom = HEIGHT - BOTTOM;
    const x = v => LEFT + (v - panel.from) / (panel.to - panel.from) * (right - LEFT);
    const y = v => bottom - axis.at(v) * (bottom - TOP);
    const across = linearTicks(panel.from, panel.to, Math.min(6, Math.max(2, Math.floor(panel.width / 90))))
      .filter(tick => Number.isInteger(tick));
    const id = `clip-${figure.chart.number}-${index}`;
    boxes[index].querySelector("svg").innerHTML =
      `<clipPath id="${id}"><rect x="${LEFT - 5}" y="0" width="${right - LEFT + 10}" height="${bottom + 5}"/></clipPath>` +
      `<rect class="frame" x="${LEFT}" y="${TOP}" width="${right - LEFT}" height="${bottom - TOP}"/>` +
      axis.ticks.map(tick => `<path class="grid" d="M${LEFT} ${y(tick)}H${right}"/>` +
        `<text class="tick" x="${LEFT - 6}" y="${y(tick) + 4}" text-anchor="end">${compact(tick)}</text>`).join("") +
      across.map(tick => `<path class="grid" d="M${x(tick)} ${TOP}V${bottom}"/>` +
        `<text class="tick" x="${x(tick)}" y="${HEIGHT - 6}" text-anchor="middle">${compact(tick)}</text>`).join("") +
      `<g clip-path="url(#${id})">${panel.lines.map(([one, points]) => shapes(one, points, x, y)).join("")}</g>` +
      `<rect class="brush" y="${TOP}" height="${bottom - TOP}" width="0"/>`;
    Object.assign(boxes[index], {x, from: panel.from, to: panel.to, lines: panel.lines, right});
    boxes[index].querySelector("svg").setAttribute("width", panel.width);
  });
  figure.querySelector(".unit").textContent = data.unit +
    (data.log && all.length && scale(all, data).log ? ", logarithmic" : "");
}

function legend(figure) {
  const list = figure.querySelector(".legend"), items = new Map();
  for (const {line, key, colour} of figure.chart.panels.flatMap(panel => panel.lines))
    if (!items.has(key) && line.y.some(value => value !== null)) items.set(key, [colour, line.dashed]);
  list.replaceChildren(...[...items].map(([key, [colour, dashed]]) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.className = `c${colour}${dashed ? " dashed" : ""}`;
    button.textContent = key;
    button.ariaPressed = String(!page.hidden.has(key));
    button.onclick = () => {
      page.hidden.delete(key) || page.hidden.add(key);
      figures.forEach(other => { legend(other); draw(other); });
    };
    item.append(button);
    return item;
  }));
  list.hidden = items.size < 2;
}

function nearest(xs, at) {
  return xs.reduce((best, x, i) => Math.abs(x - at) < Math.abs(xs[best] - at) ? i : best, 0);
}

function pointer(figure, box, index) {
  const svg = box.querySelector("svg"), tip = box.querySelector(".tip");
  const value = px => box.from + (px - LEFT) / (box.right - LEFT) * (box.to - box.from);
  const inside = event => Math.max(LEFT, Math.min(box.right, event.clientX - svg.getBoundingClientRect().left));
  let start = null;
  const hide = () => { tip.hidden = true; svg.querySelector(".cursor")?.remove(); };
  svg.onpointerdown = event => {
    start = inside(event);
    svg.setPointerCapture(event.pointerId);
    svg.onpointermove(event);  // a tap shows the values, too
  };
  svg.onpointermove = event => {
    const px = inside(event), brush = svg.querySelector(".brush");
    if (start !== null && Math.abs(px - start) > 6) {
      brush.setAttribute("x", Math.min(px, start));
      brush.setAttribute("width", Math.abs(px - start));
      return hide();
    }
    const rows = box.lines.filter(([, points]) => points.x.length)
      .map(([one, points]) => [one, points, nearest(points.x, value(px))])
      .filter(([, points, i]) => points.y[i] !== null);
    if (!rows.length) return hide();
    const xs = rows.map(([, points, i]) => points.x[i]), step = xs[nearest(xs, value(px))];
    tip.replaceChildren(`update ${Math.round(step).toLocaleString("en")}`, ...rows.map(([one, points, i]) => {
      const row = document.createElement("span");
      row.className = `c${one.colour}`;
      row.textContent = `${one.key}${one.line.dashed ? " (limit)" : ""}  ` +
        points.y[i].toLocaleString("en", {maximumSignificantDigits: 4});
      return row;
    }));
    tip.hidden = false;
    const at = box.x(step), half = (LEFT + box.right) / 2;
    tip.style.left = `${Math.max(0, Math.min(box.clientWidth - tip.offsetWidth, at > half ? at - tip.offsetWidth - 10 : at + 10))}px`;
    svg.querySelector(".cursor")?.remove();
    svg.insertAdjacentHTML("beforeend", `<path class="cursor" d="M${at} ${TOP}V${HEIGHT - BOTTOM}"/>`);
  };
  svg.onpointerup = event => {
    const px = inside(event);
    if (start !== null && Math.abs(px - start) > 6) {
      figure.chart.zoom[index] = [Math.min(px, start), Math.max(px, start)].map(value);
      if (page.overlay) figure.chart.panels.forEach((_, other) => figure.chart.zoom[other] = figure.chart.zoom[index]);
      draw(figure);
    }
    start = null;
  };
  svg.onpointercancel = () => { start = null; draw(figure); };
  svg.onpointerleave = event => event.pointerType === "touch" || hide();
  svg.ondblclick = () => { figure.chart.zoom = {}; draw(figure); };
}

function layOut(figure) {
  const chart = figure.chart;
  chart.panels = panelsOf(chart.data);
  chart.zoom = {};
  const titled = chart.panels.length > 1 || (!page.overlay && chart.data.runs.length > 1);
  figure.querySelector(".panels").innerHTML = chart.panels.map(panel =>
    `<div class="panel">${titled ? `<p class="panel-title">${escapeText(panel.title)}</p>` : ""}` +
    `<svg height="${HEIGHT}" role="img" aria-label="${escapeText(`${chart.data.title} of ${panel.title} by update`)}"></svg>` +
    `<output class="tip" hidden></output></div>`).join("");
  chart.boxes = [...figure.querySelectorAll(".panel")];
  chart.boxes.forEach((box, index) => pointer(figure, box, index));
  legend(figure);
  draw(figure);
}

const figures = [...document.querySelectorAll(".chart")];
const resized = new ResizeObserver(entries => entries.forEach(entry => draw(entry.target)));
figures.forEach((figure, number) => {
  figure.chart = {data: JSON.parse(figure.querySelector("script").textContent), number};
  figure.querySelector(".reset").onclick = () => { figure.chart.zoom = {}; draw(figure); };
  layOut(figure);
  resized.observe(figure);
});
const slider = document.querySelector(".smoothing");
if (slider) slider.oninput = () => {
  page.smoothing = +slider.value;
  document.querySelector(".smoothing-value").textContent = slider.value;
  figures.forEach(draw);
};
const views = [...document.querySelectorAll(".view")];
views.forEach(button => {
  button.ariaPressed = String((button.value === "overlay") === page.overlay);
  button.onclick = () => {
    page.overlay = button.value === "overlay";
    page.hidden.clear();
    views.forEach(other => { other.ariaPressed = String(other === button); });
    figures.forEach(layOut);
  };
});

"""A small run of `lemur train` or `lemur rl` under faults, which must end as if nothing had happened; see README.md."""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from lemur_jax.checkpoint.reading import read_metadata
from lemur_jax.cluster.hosts import choose_platform
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.tokenizer_files import extend
from tests.faults.faults import ENDS, unreadable_shard
from tests.helpers.runs import make_project, without_clock

SHIM = pathlib.Path(__file__).parent / "shim"
STEPS_PER_FAULT = {"train": 20, "rl": 10}
PATIENCE = 600.0  # seconds for the next step, of a machine that may be busy
# Of `lemur rl`, after the lines of `lemur train`: a model of random parameters learns to write long answers.
RL = """    from lemur_jax.rl import games
    from tests.helpers.rl import only_echo
    games.tasks = only_echo
    config.model = {**config.model.to_dict(), "vocab_size": VOCABULARY}
    config.tokenizer.path = "tokenizer_chat"
    config.data.sources = {}
    config.eval.tasks = ()
    config.rl.update({"environment": "echo", "group_size": 4, "max_turns": 2, "max_new_tokens": 3})
    config.rl.update({"eval_every_steps": 7, "eval_tasks": 2, "off_policy": OFF_POLICY})
"""


class Run:
    """A verb in a directory, started again as often as need be.

    Attributes:
      verb: "train" or "rl".
      root: config, tokenizer and stores.
      workdir, checkpoints: of the run.
      faults: what the shim reads.
      mark: in the environment of all its processes.
      starts: how often it was started.
    """

    def __init__(self, root: pathlib.Path, name: str, steps: int, verb: str):
        self.root, self.workdir, self.steps, self.verb = root, root / name, steps, verb
        self.checkpoints = self.workdir / "checkpoints"
        self.faults, self.temporary = root / f"{name}-faults", root / f"{name}-tmp"
        self.faults.mkdir()
        self.temporary.mkdir()
        self.log = root / f"{name}.log"
        self.mark = uuid.uuid4().hex
        self.starts = 0
        self.process: subprocess.Popen | None = None
        # Through a pipe: a full disk is to hit the files of the run and not its log.
        self.pipe = subprocess.Popen(["tee", str(self.log)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        environment |= {"LEMUR_FAULTS": str(self.faults), "LEMUR_MARK": self.mark}
        environment["PYTHONFAULTHANDLER"] = "1"  # see `stuck`
        environment["TMPDIR"] = str(self.temporary)
        environment["PYTHONPATH"] = os.pathsep.join([str(SHIM), *filter(None, sys.path)])
        words = [self.verb, "--config", "config.py", "--workdir", self.workdir.name, "--virtual-devices", "1"]
        words += [f"--config.train.steps={self.steps}", "--config.eval.every_steps=40"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lemur_jax", *words],
            cwd=self.root,
            env=environment,
            stdout=self.pipe.stdin,
            stderr=self.pipe.stdin,
            start_new_session=True,
        )
        self.starts += 1

    def start_again(self, allowed: set[int | None]) -> None:
        """After an end that the fault explains."""
        assert self.ended in allowed, f"ended with {self.ended}: {self.log.read_text()[-3000:]}"
        self.start()

    def close(self) -> None:
        """Ends what is left of it, after which the log is whole."""
        if self.process and self.ended is None:
            self.process.kill()
            self.process.wait()
        self.pipe.communicate()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise self.stuck(f"it does not end within {seconds:g} s") from None

    def stuck(self, what: str) -> TimeoutError:
        """Ends it, and says what it has written and, by Python's own handler of aborts, where its threads stood."""
        self.signal(signal.SIGABRT)
        self.process.wait()
        time.sleep(1.0)  # for the pipe
        return TimeoutError(f"{what}:\n{self.log.read_text()[-30_000:]}")

    def step(self) -> int:
        """The last step in the metrics."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def saved(self) -> list[int]:
        """Steps of its checkpoints, the damaged ones that were set aside left out."""
        paths = self.checkpoints.iterdir() if self.checkpoints.exists() else ()
        return sorted(int(path.name) for path in paths if path.name.isdigit())

    def said(self, words: str) -> int:
        """How often it said so."""
        return self.log.read_text().count(words)

    def reach(self, step: int) -> bool:
        """Waits until the step is in the metrics; False if the process ends before."""
        deadline = time.monotonic() + PATIENCE
        while self.step() < min(step, self.steps):
            if self.ended is not None:
                return False
            if time.monotonic() > deadline:
                raise self.stuck(f"step {step} is not reached within {PATIENCE:g} s")
            time.sleep(0.01)
        return True

    def processes(self) -> list[int]:
        """All processes that come from this run, by their environment."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                if self.mark.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


def drill(root: pathlib.Path, seed: int, kinds: list, say=print, verb: str = "train") -> dict[str, tuple]:
    """Runs once alone and, beside it, once under `kinds` of faults, one after the other; returns their `differences`.

    Raises:
      AssertionError: a run ended with a status that its fault does not explain.
    """
    rng = random.Random(seed)
    make_project(root)
    if verb == "rl":
        _make_rl_project(root, off_policy=rng.random() < 0.5)
    steps = STEPS_PER_FAULT[verb] * (len(kinds) + 1)
    alone, hurt = Run(root, "alone", steps, verb), Run(root, "hurt", steps, verb)
    try:
        _throw(alone, hurt, kinds, rng, say)
    finally:
        for run in (alone, hurt):
            run.close()
    say(
        f"{hurt.starts} starts, {hurt.said('SIGTERM: step')} saved by SIGTERM, {hurt.said('could not be saved')}"
        f" saves failed, {hurt.said('the damaged checkpoint is')} damaged checkpoints set aside"
    )
    return differences(alone, hurt)


def faults_of(verb: str) -> list:
    """The faults that can hit a run of this verb: `lemur rl` reads no store."""
    return [fault for fault in ENDS if verb == "train" or fault is not unreadable_shard]


def _make_rl_project(root: pathlib.Path, off_policy: bool) -> None:
    tokenizer = extend(root / "tokenizer", root / "tokenizer_chat", CHATML_TOKENS)
    lines = RL.replace("VOCABULARY", str(tokenizer.vocab_size)).replace("OFF_POLICY", str(off_policy))
    config = root / "config.py"
    config.write_text(config.read_text().replace("    return config", f"{lines}    return config"))


def _throw(alone: Run, hurt: Run, kinds: list, rng: random.Random, say) -> None:
    """Both runs, from their start to their end."""
    alone.start()
    hurt.start()
    ends: set[int | None] = set()  # of the last fault, whose effect may be late
    for number, fault in enumerate(kinds, start=1):
        # After a few steps, or else the run may still be starting, which is a moment too.
        goal = hurt.step() + rng.randint(1, 8) if rng.random() < 0.9 else 0
        while hurt.ended is not None or not hurt.reach(goal):
            hurt.start_again(ends)
        time.sleep(rng.random() * 0.1)
        say(f"fault {number}: {fault.__name__} at step {hurt.step()} of {hurt.steps}")
        fault(hurt, rng)
        if hurt.ended is not None:
            hurt.start_again(ends | ENDS[fault])
        ends = ENDS[fault]
    while hurt.wait() != 0:
        hurt.start_again(ends)
    assert alone.wait() == 0, alone.log.read_text()


def differences(alone: Run, hurt: Run) -> dict[str, tuple]:
    """What of the run under faults is not as it should be: name -> (found, wanted)."""
    ours, theirs = read_metadata(hurt.workdir), read_metadata(alone.workdir)
    records = without_clock(read_metrics(hurt.workdir))
    checkpoints = {path.name for path in hurt.checkpoints.iterdir() if not path.name.startswith("damaged-")}
    checks = {
        "step": (ours["step"], alone.steps),
        "digests of parameters and optimizer": (ours["leaves"], theirs["leaves"]),
        # The loss of a step to the bit: its rows were the same, and the steps are 1, 2, 3 ...
        "metrics": (records, without_clock(read_metrics(alone.workdir))),
        "steps": (
            [record["step"] for record in records if record["kind"] == "train"],
            list(range(1, alone.steps + 1)),
        ),
        "processes": (hurt.processes(), []),
        "temporary files": (list(hurt.temporary.iterdir()), []),
        "workdir": (
            sorted(path.name for path in hurt.workdir.iterdir()),
            ["checkpoints", "config.json", "metrics.jsonl", "running.lock"],
        ),
        "checkpoints": (checkpoints, {path.name for path in alone.checkpoints.iterdir()}),
        "unfinished files": ([path for path in hurt.checkpoints.rglob("*") if "tmp" in path.name], []),
    }
    return {name: (found, wanted) for name, (found, wanted) in checks.items() if found != wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--verb", choices=list(STEPS_PER_FAULT), default="train")
    parser.add_argument("--directory", help="kept; without it, a temporary one is removed when all is well")
    args = parser.parse_args()
    choose_platform()
    print(f"seed {args.seed}", flush=True)
    kinds = random.Random(args.seed).choices(faults_of(args.verb), k=args.faults)
    root = pathlib.Path(args.directory or tempfile.mkdtemp(prefix="drill-"))
    root.mkdir(exist_ok=True)
    began = time.monotonic()
    found = drill(root, args.seed, kinds, lambda line: print(line, flush=True), args.verb)
    if found:
        sys.exit(f"differs from a run without faults: {found}; {root} is kept")
    counts = collections.Counter(kind.__name__ for kind in kinds)
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"all as if nothing had happened, after {time.monotonic() - began:.0f} s")
    if not args.directory:
        subprocess.run(["rm", "-rf", str(root)], check=True)


if __name__ == "__main__":
    main()

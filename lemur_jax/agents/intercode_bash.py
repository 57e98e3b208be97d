"""InterCode-Bash (Yang et al. 2023): 200 tasks in four file trees, ten commands each, a reward after each."""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import pathlib
import re
import shlex
import stat
import subprocess
from collections.abc import Mapping

from lemur_jax.agents.environments import Environment, NotScored, Step, block, find_data
from lemur_jax.agents.intercode import MAX_STEPS, WHERE, read_tasks
from lemur_jax.agents.problems import LIMITS
from lemur_jax.agents.sandbox import run
from lemur_jax.agents.scratch import make_directory, remove_tree
from lemur_jax.common.errors import UserError

logger = logging.getLogger(__name__)
# Where the set-up scripts make their file trees; here they are below the sandbox's directory.
_TREES = re.compile(r"(?<![\w./~])/(testbed|system|workspace|backup)\b")
Files = dict[str, tuple[int, str]]  # path -> (executable bits, digest or target)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
# Words in the place of a program (a lookahead, as that of xargs follows another), and paths outside the trees.
_PROGRAM = re.compile(
    r"(?=(?:^|[|;&(`]|-exec\s|\bxargs(?:\s+-\S+|\s+\{\})*\s)\s*([A-Za-z][\w+-]*)(?![\w=/]))"
)
_SYSTEM = re.compile(r"(?<![\w./~])/(?:etc|var|usr)/\w*")
_ROOT = re.compile(r"(?<![\w./~])/(?!(?:testbed|system|workspace|backup|bin)\b)[\w.]*(?=\s|$)")
# What a solution prints where the sandbox refuses it.
_FAILED = re.compile("command not found|Read-only file system|Operation not permitted|^Command timed out$")
_NETWORK = {"curl", "dig", "ping"}
_MISSING = 'for word; do type "$word" > /dev/null 2>&1 || [ -w "$word" ] || echo "$word"; done'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The file tree after a command, and what the command printed."""

    files: Files
    output: str


def bash_reward(before: Files, found: Outcome, solution: Outcome) -> float:
    """0.01, and 0.33 each for the paths changed, the content of new files and the output of the last command."""
    changed, gold = changes(before, found.files), changes(before, solution.files)
    reward = 0.01 + round(0.33 * (1 - math.erf(len(changed ^ gold))), 2)
    new = [path for path, kind in changed & gold if kind == "??"]
    # InterCode compares files with a dot in their path alone.
    compared = [path for path in new if "." in path and not path.endswith("/")]
    different = sum(found.files[path][1] != solution.files[path][1] for path in compared)
    reward += round(0.33 * (len(new) - different) / len(new), 2) if new else 0.33
    return round(reward + round(0.33 * similarity(found.output, solution.output), 2), 2)


def changes(before: Files, after: Files) -> set[tuple[str, str]]:
    """(path, D, M or ??) as in `git status --short`, which lists a new directory but not its files."""
    entries = {(path, "D") for path in before.keys() - after.keys()}
    entries |= {(path, "M") for path in before.keys() & after.keys() if before[path] != after[path]}
    directories = {str(parent) for path in before for parent in pathlib.PurePath(path).parents}
    for path in after.keys() - before.keys():
        parents = [str(parent) for parent in reversed(pathlib.PurePath(path).parents)]
        untracked = next((f"{parent}/" for parent in parents[1:] if parent not in directories), path)
        entries.add((untracked, "??"))
    return entries


def similarity(first: str, second: str) -> float:
    """Cosine of the TF-IDF vectors of two texts (scikit-learn's defaults); without words, whether they are equal."""
    counts = [collections.Counter(re.findall(r"\b\w\w+\b", text.lower())) for text in (first, second)]
    words = counts[0] | counts[1]
    if not words:
        return float(first == second)
    weight = {word: 1 + math.log(3 / (1 + sum(word in count for count in counts))) for word in words}
    u, v = ({word: count[word] * weight[word] for word in words} for count in counts)
    norm = math.hypot(*u.values()) * math.hypot(*v.values())
    return sum(u[word] * v[word] for word in words) / norm if norm else 0.0


class _FileTree:
    """A file tree made by a set-up script or copied from another; its root is the directory of the sandbox."""

    def __init__(self, setup: str = "", *, like: "_FileTree | None" = None):
        self.box = make_directory("bash-")
        self._root = run(["pwd"], directory=self.box, limits=LIMITS).output.strip()
        self._place = "."
        if like is None:
            self._run(["/bin/bash", "-c", setup])
        else:
            subprocess.run(["cp", "-a", f"{like.box}/.", self.box], check=True)

    def _run(self, words: list[str]) -> tuple[str, bool]:
        words = [_TREES.sub(rf"{self._root}/\1", word) for word in words]
        result = run(["env", "-C", self._place, *words], directory=self.box, limits=LIMITS)
        if result.timed_out:
            return "Command timed out", False
        return (result.output + result.errors).replace(f"{self._root}/", "/"), result.code == 0

    def execute(self, command: str) -> tuple[str, bool]:
        """The output of a command, and whether it succeeds. As in InterCode it is in double quotes, and cd persists."""
        cwd = ""
        if command.startswith("cd "):
            cwd = os.path.normpath(os.path.join("/", self._place, command[3:].strip()))
            command = f"cd {cwd}"
        try:
            words = shlex.split(f'/bin/bash -c "{command.strip()}"')
        except ValueError:
            return "Malformed command", False
        output, succeeded = self._run(words)
        if cwd and succeeded and (self.box / cwd.lstrip("/")).is_dir():
            self._place = cwd.lstrip("/") or "."
        return output, succeeded

    def files(self) -> Files:
        files = {}
        for directory, folders, names in os.walk(self.box):
            for name in (*folders, *names):  # a link to a directory is among the folders
                path = pathlib.Path(directory, name)
                place = str(path.relative_to(self.box))
                # After chmod of a file or its directory, where the sandbox runs as the user of this process.
                with contextlib.suppress(PermissionError):
                    mode = path.lstat().st_mode
                    if stat.S_ISLNK(mode):
                        files[place] = 0, os.readlink(path)
                    elif stat.S_ISREG(mode):
                        files[place] = mode & 0o111, "unreadable"
                        files[place] = mode & 0o111, hashlib.sha256(path.read_bytes()).hexdigest()
        return files


class InterCodeBash(Environment):
    """A task, solved (reward 1) by the changes and the output of its solution."""

    max_turns = MAX_STEPS
    cumulative_rewards = True

    def __init__(self, id: str, task: Mapping[str, str], setup: str):
        self.id, self.content = f"intercode-bash/{id}", [task, setup]
        self._task, self._setup = task, setup
        self._tree: _FileTree | None = None

    def reset(self) -> str:
        self.close()
        self._tree = _FileTree(self._setup)
        # A copy: a second run of the script would differ in times, also inside archives.
        reference = _FileTree(like=self._tree)
        self._before = reference.files()
        output, _ = reference.execute(self._task["gold"])
        self._solution = Outcome(files=reference.files(), output=output)
        remove_tree(reference.box)
        # An answer that fails in the same way would count as right.
        if _FAILED.search(output):
            self.close()
            raise NotScored(f"{self.id}: its solution cannot run here: {output.strip()}")
        return (
            "Do a task with Bash commands, one in a ```bash block at a time. You see what it prints and a reward from 0"
            f" to 1 for the state and the last output; you have {MAX_STEPS} commands.\nTask: {self._task['query']}"
        )

    def step(self, action: str) -> Step:
        assert self._tree is not None, "reset comes first"
        output, succeeded = self._tree.execute(block(action, "bash", "sh", "shell"))
        found = Outcome(files=self._tree.files(), output=output)
        reward = bash_reward(self._before, found, self._solution)
        verdict = "passed" if reward >= 1 else "wrong answer" if succeeded else "execution error"
        return Step(observation=output, verdict=verdict, reward=reward)

    def close(self) -> None:
        if self._tree is not None:
            remove_tree(self._tree.box)
            self._tree = None


def open_bash(data: str) -> list[InterCodeBash]:
    """The environments of the 200 tasks, without those whose solution needs what the sandbox does not have.

    Raises:
      UserError: tasks or set-up scripts are missing or damaged.
    """
    root, requirements = find_data(data, "nl2bash/nl2bash_fs_1.json", WHERE), {}
    for number in range(1, 5):
        script = f"docker/bash_scripts/setup_nl2b_fs_{number}.sh"
        setups = [path for path in (root / script, root.parent / script) if path.exists()]
        if not setups:
            raise UserError(f"--data {data} has no {script}, which makes InterCode-Bash's files: {WHERE}")
        tasks = read_tasks(root / "nl2bash" / f"nl2bash_fs_{number}.json", "query", "gold")
        setup = setups[0].read_text(encoding="utf-8")
        for index, task in enumerate(tasks):
            requirements[InterCodeBash(f"{number}-{index}", task, setup)] = needs(task["gold"])
    words = set().union(*requirements.values())
    missing = set(run(["bash", "-c", _MISSING, "bash", *words], limits=LIMITS).output.splitlines())
    for word in sorted(missing):
        ids = [environment.id for environment, needed in requirements.items() if word in needed]
        text = "%d of %d tasks are not scored, as the sandbox has no program or writable path %s: %s"
        logger.warning(text, len(ids), len(requirements), word, ", ".join(ids))
    return [environment for environment, needed in requirements.items() if not needed & missing]


def needs(command: str) -> set[str]:
    """The programs that a command names, also behind xargs and find's -exec, and its paths outside the trees."""
    bare = _QUOTED.sub("''", command)
    programs = {f"{word} with a network" if word in _NETWORK else word for word in _PROGRAM.findall(bare)}
    return programs.union(_SYSTEM.findall(command), _ROOT.findall(bare))

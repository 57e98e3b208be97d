"""Records that did not go into a store.

Beside the store of a split; until it is complete in `.<split>.work`:

    <split>.quarantine.jsonl   bad records, with reason, file and position
    <split>.removed.json       for each cleaning step the number of removed documents, with examples
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.prepare.cleaning import Removed
from lemur_jax.prepare.encoding import BadRecord

EXAMPLES = 5  # per step
EARLY_RECORDS = 10_000  # after these, too many bad ones stop the run before its end


class Rejects:
    """Bad and removed records of one store; `finish` puts the files in place, and leaves the work folder.

    `saved` is what `save` returned in an interrupted attempt.
    """

    def __init__(self, store: epath.Path, saved: dict[str, Any] | None):
        self._quarantine = store.parent / f"{store.name}.quarantine.jsonl"
        self._removed = store.parent / f"{store.name}.removed.json"
        self._work = store.parent / f".{store.name}.work"
        empty: dict[str, Any] = {"saves": 0, "records": 0, "good": 0, "bad": 0, "first": "", "removed": {}}
        self._state = empty if saved is None else saved
        self._file: Any = None
        if saved is None and self._work.exists():
            self._work.rmtree()

    @property
    def records(self) -> int:
        """The number of results so far."""
        return self._state["records"]

    def keep(self) -> None:
        """Counts a record that went into the store."""
        self._state["records"] += 1
        self._state["good"] += 1

    def add_bad(self, refused: BadRecord) -> None:
        if self._file is None:
            self._work.mkdir(parents=True, exist_ok=True)
            self._file = (self._work / f"{self._state['saves']}.jsonl").open("w")
        self._state["first"] = self._state["first"] or f"{refused.where or refused.id}: {refused.reason}"
        self._state["records"] += 1
        self._state["bad"] += refused.records
        self._file.write(json.dumps(dataclasses.asdict(refused)) + "\n")

    def remove(self, removed: Removed) -> None:
        """Counts a record that a step removed."""
        self._state["records"] += 1
        self._count_removed(removed.step, 1, [removed])

    def remove_added(self, step: str, documents: int, examples: Sequence[Removed]) -> None:
        """Counts records as removed that were counted as kept."""
        self._state["good"] -= documents
        self._count_removed(step, documents, examples)

    def _count_removed(self, name: str, documents: int, examples: Sequence[Removed]) -> None:
        step = self._state["removed"].setdefault(name, {"documents": 0, "examples": []})
        step["documents"] += documents
        for removed in examples[: EXAMPLES - len(step["examples"])]:
            example = dataclasses.asdict(removed)
            del example["step"]
            step["examples"].append(example)

    def save(self) -> dict[str, Any]:
        """Writes the bad records to disk, and returns the rest of the state as JSON values."""
        self._close()
        self._state["saves"] += 1
        return self._state

    def check(self, limit: float, label: str, *, finished: bool) -> None:
        """Raises UserError if all records are bad, or a larger share than `limit`."""
        removed = sum(step["documents"] for step in self._state["removed"].values())
        good, bad = self._state["good"] + removed, self._state["bad"]
        acceptable = good and bad <= limit * (good + bad)
        if acceptable or (not finished and good + bad < EARLY_RECORDS):
            return
        self._collect()
        raise UserError(
            f"{label}: {bad:,} of {good + bad:,} records cannot be used, more than"
            f" prepare.max_bad_share = {limit:g}; the first is {self._state['first']}; all are in"
            f" {self._quarantine}"
        )

    def finish(self) -> None:
        """Puts the two files in place, before the store: after a kill they are made again with it."""
        self._collect()
        self._removed.unlink(missing_ok=True)
        if self._state["removed"]:
            self._removed.write_text(json.dumps(self._state["removed"], indent=2, ensure_ascii=False) + "\n")

    def close(self, *, keep: bool) -> None:
        """Deletes the unfinished files if not `keep`."""
        self._close()
        if self._work.exists() and not keep:
            self._work.rmtree()

    def _collect(self) -> None:
        self._close()
        self._quarantine.unlink(missing_ok=True)
        if self._state["bad"]:
            paths = [self._work / f"{index}.jsonl" for index in range(self._state["saves"] + 1)]
            with self._quarantine.open("w") as target:
                for path in paths:
                    if path.exists():
                        with path.open() as source:
                            shutil.copyfileobj(source, target)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> str:
        parts = [f"{name} removed {step['documents']:,}" for name, step in self._state["removed"].items()]
        if parts:
            parts[-1] += f", see {self._removed}"
        if self._state["bad"]:
            count = self._state["bad"]
            records = "record" if count == 1 else "records, the first"
            parts.append(f"refused {count:,} {records} ({self._state['first']}), see {self._quarantine}")
        return "".join(f"{part}; " for part in parts)

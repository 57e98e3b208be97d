"""Cleaning: the steps that a config lists for a task, and what each one removes.

    config.prepare.steps = {"code": {"length": {"min_chars": 100}, "exact_duplicates": {}}}

Steps run in the order of `DEFAULTS`. The workers run the filters, which look at one document, and compute the
fingerprints that `duplicates` compares.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import did_you_mean, require
from lemur_jax.prepare.decontamination import evaluation_set, problems

# Every step with its options; 0 or empty: no limit.
DEFAULTS: dict[str, dict[str, Any]] = {
    "length": {"min_chars": 0, "max_chars": 0},
    "lines": {"max_chars": 0, "max_mean_chars": 0},
    "alphanumeric": {"min_share": 0.0},
    "metadata": {},  # metadata field, with / for its dots -> allowed values, e.g. licenses or languages
    # Codes such as "en"; detected by py3langid in the first characters.
    "language": {"keep": (), "chars": 1000},
    "foreign_letters": {"run": 3},  # this many letters beyond ASCII in a row
    "decontaminate": {
        "against": (),  # "human_eval" or JSON Lines files with `text`
        "n": 8,  # words of a run
        "distinct": 4,  # alphabetic words that a run must have
        "share": 0.2,  # of one problem's runs, from which a document is removed
    },
    "exact_duplicates": {},
    # Duplicates: the Jaccard similarity of their n-grams of `words` words, estimated by `hashes` MinHashes, is at
    # least `threshold`. `bands` bands of hashes select the candidates.
    "near_duplicates": {"threshold": 0.7, "words": 5, "hashes": 128, "bands": 32},
    # Metadata fields that follow <reponame> and <filename>, and other tokens for these.
    "repository": {"name": "", "path": "", "tokens": ()},
    # Share of documents changed, share of SPM among these, and other tokens for <fim_prefix> <fim_middle> <fim_suffix>.
    "fim": {"rate": 0.0, "spm": 0.5, "tokens": ()},
    "separators": {"begin": (), "end": ()},  # tokens around a document in place of the tokenizer's own
    "label": {"field": ""},  # metadata field, e.g. the language, by which `data.sources` can name parts
}
NO_STEPS = "{}"
_WORD = re.compile(r"\w+")
EXCERPT = 200  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Removed:
    """A document that was removed: by a step, or as one without text (`step` is "empty_texts")."""

    step: str
    reason: str
    id: str
    excerpt: str


def parse_steps(task: str, options: Mapping[str, Mapping[str, Any]]) -> str:
    """The steps of a task with all their options, as JSON; UserError: an unknown one, or one that cannot work."""
    steps: dict[str, dict[str, Any]] = {}
    _check_type(f"prepare.steps.{task}", options, {})
    for name, values in options.items():
        _check_name(f"prepare.steps.{task}", name, DEFAULTS)
        defaults, section = DEFAULTS[name], f"prepare.steps.{task}.{name}"
        _check_type(section, values, {})
        for key, value in values.items():
            if name == "metadata":
                _check_type(f"{section}.{key}", value, ())
                continue
            _check_name(section, key, defaults)
            _check_value(f"{section}.{key}", value, defaults[key])
        steps[name] = defaults | dict(values)
        if not steps[name].get("tokens", True):  # as in the digests of earlier versions' stores
            del steps[name]["tokens"]
    near = steps.get("near_duplicates", DEFAULTS["near_duplicates"])
    if near["hashes"] % near["bands"]:
        raise UserError(f"prepare.steps.{task}.near_duplicates: bands must divide hashes ({near['hashes']})")
    settings = steps.get("decontaminate", DEFAULTS["decontaminate"])
    against, n = settings["against"], settings["n"]
    if "decontaminate" in steps and (not against or settings["distinct"] > n):
        hint = f"at most n ({n}) as distinct" if against else "human_eval or a JSON Lines file in against"
        raise UserError(f"prepare.steps.{task}.decontaminate would remove nothing: name {hint}")
    if not steps:
        return NO_STEPS
    digests = {name: hashlib.sha256("\0".join(problems(name)).encode()).hexdigest() for name in against}
    if "language" in steps:
        keep, codes = steps["language"]["keep"], sorted(_language_identifier().labels)
        unknown = [code for code in keep if code not in codes]
        if unknown or not keep:
            names = repr(unknown[0]) if unknown else "no language"
            raise UserError(f"prepare.steps.{task}.language.keep names {names}; there are {', '.join(codes)}")
        digests["py3langid"] = importlib.metadata.version("py3langid")
    return json.dumps({name: steps[name] for name in DEFAULTS if name in steps} | {"digests": digests})


def check_fields(task: str, steps: Mapping[str, Mapping[str, Any]], kept: Sequence[str]) -> None:
    """Refuses steps that read metadata fields which the documents of a task do not have; `kept` are those."""
    repository, label = steps.get("repository", {}), steps.get("label", {})
    required = [("metadata", name) for name in steps.get("metadata", ())]
    required += [("repository", repository[key]) for key in ("name", "path") if repository.get(key)]
    required += [("label", name) for name in label.values()]
    for step, name in required:
        dotted = name.replace("/", ".") if step == "metadata" else name  # values of a config may have dots
        if not {name, dotted} & set(kept):
            raise UserError(
                f"prepare.steps.{task}.{step} reads the metadata field {name!r}; the task keeps"
                f" {', '.join(kept) or 'none'}: name it in Fields(meta=...) of the task"
            )


def _check_name(key: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UserError(f"{key} has no {name!r}{did_you_mean(name, known)}")


def _check_value(key: str, value: Any, default: Any) -> None:
    """Of an option: a tuple has names, a float is a share, and 0 means no limit only where it is the default."""
    _check_type(key, value, default)
    for item in value if default == () else ():
        _check_type(key, item, "")
    if isinstance(default, float):
        require(0 <= value <= 1, key, value, "between 0 and 1")
    if isinstance(default, int):
        require(value >= min(default, 1), key, value, f"{min(default, 1)} or more")


def _check_type(key: str, value: Any, default: Any) -> None:
    kinds = {float: (int, float), tuple: (list, tuple), dict: Mapping}.get(type(default), type(default))
    right = isinstance(value, kinds) and not isinstance(value, bool)
    require(right, key, value, f"of the type {type(default).__name__}")


@functools.lru_cache(maxsize=4)
def filters(steps: str) -> "Filters":
    """The filters of steps from `parse_steps`, made once per process."""
    return Filters(json.loads(steps))


class Filters:
    """The steps that look at one document."""

    def __init__(self, steps: Mapping[str, Mapping[str, Any]]):
        self.steps = steps

    def remove(self, id: str, text: str, meta: Mapping[str, Any]) -> Removed | None:
        """The step that removes a document; None: it stays."""
        for name, check in _CHECKS.items():
            if name in self.steps:
                reason = check(text, meta, **self.steps[name])
                if reason:
                    return Removed(step=name, reason=reason, id=id, excerpt=text[:EXCERPT])
        return None

    def label(self, meta: Mapping[str, Any]) -> str:
        """The value of the label field; "": none."""
        value = meta.get(self.steps.get("label", {}).get("field"))
        return "" if value is None else str(value)

    def fingerprints(self, texts: Mapping[str, str]) -> dict[str, bytes]:
        """What documents are compared by: `digests`, 16 bytes of a sha256, and `minhashes`, 2 bytes of each MinHash.

        Each is present if its step is configured. `texts` has each text under what it stands with: "", or e.g. the side
        of a preference. An answer chosen in one document and rejected in another makes different fingerprints.
        """
        fingerprints = {}
        if "exact_duplicates" in self.steps:
            whole = "\0".join(f"{side}{text.strip()}" for side, text in sorted(texts.items()))
            fingerprints["digests"] = hashlib.sha256(whole.encode()).digest()[:16]
        if "near_duplicates" in self.steps:
            options = self.steps["near_duplicates"]
            runs = [side + run for side, text in texts.items() for run in shingles(text, options["words"])]
            fingerprints["minhashes"] = minhash(runs, options["hashes"])
        return fingerprints


def shingles(text: str, words: int) -> list[str]:
    """The distinct n-grams of `words` words; of a shorter text, all its words; of one without words, itself."""
    tokens = _WORD.findall(text) or [text.strip()]
    if len(tokens) <= words:
        return [" ".join(tokens)]
    return list(dict.fromkeys(map(" ".join, zip(*(tokens[start:] for start in range(words)), strict=False))))


def minhash(shingles: list[str], hashes: int) -> bytes:
    """The low 16 bits of each MinHash, uint16 [hashes] as bytes."""
    import rensa

    hasher = rensa.RMinHash(num_perm=hashes, seed=1)
    hasher.update(shingles)
    return np.array(hasher.digest(), np.uint32).astype(np.uint16).tobytes()


# The filters return why a document goes, or None.


def _length(text, meta, min_chars, max_chars):
    if len(text) < min_chars:
        return f"{len(text)} characters, fewer than {min_chars}"
    if max_chars and len(text) > max_chars:
        return f"{len(text)} characters, more than {max_chars}"


def _lines(text, meta, max_chars, max_mean_chars):
    lengths = [len(line) for line in text.splitlines()] or [0]
    if max_chars and max(lengths) > max_chars:
        return f"a line of {max(lengths)} characters, more than {max_chars}"
    mean = sum(lengths) / len(lengths)
    if max_mean_chars and mean > max_mean_chars:
        return f"lines of {mean:.0f} characters in the mean, more than {max_mean_chars}"


def _alphanumeric(text, meta, min_share):
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    share = int(_alphanumeric_table()[characters].sum()) / max(1, len(text))
    if share < min_share:
        return f"{share:.1%} letters and digits, less than {min_share:.1%}"


@functools.cache
def _alphanumeric_table() -> np.ndarray:
    """`str.isalnum` of every character, bool [0x110000]. A lookup takes a ninth of the time of a call."""
    return np.array([chr(code).isalnum() for code in range(sys.maxunicode + 1)])


def _metadata(text, meta, /, **allowed):
    for name, accepted in allowed.items():
        value = meta.get(name, meta.get(name.replace("/", ".")))  # a config's keys have no dots
        values = value if isinstance(value, list) else [value]
        rejected = [item for item in values if item not in accepted]
        if rejected or not values:
            return f"{name} is {rejected[0] if rejected else 'empty'!r}"


def _language(text, meta, keep, chars):
    language, _ = _language_identifier().classify(text[:chars])
    if language not in keep:
        return f"the language seems to be {language!r}"


def _foreign_letters(text, meta, run):
    if match := re.search(rf"(?:(?![\x00-\x7f])[^\W\d_]){{{run}}}", text):
        return f"{run} letters that are not English: {match[0]!r}"


def _decontaminate(text, meta, against, n, distinct, share):
    for name in against:
        if match := evaluation_set(name, n, distinct).find(text, share):
            return f"has {match[1]:.0%} of the runs of words of problem {match[0] + 1} of {name}"


_CHECKS: dict[str, Callable[..., str | None]] = {
    "length": _length,
    "lines": _lines,
    "alphanumeric": _alphanumeric,
    "metadata": _metadata,
    "language": _language,
    "foreign_letters": _foreign_letters,
    "decontaminate": _decontaminate,
}


@functools.cache
def _language_identifier():
    """py3langid: 140 languages by naive Bayes over byte n-grams, its model in the package."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError("the step `language` needs py3langid: pip install lemur_jax[langid]") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)

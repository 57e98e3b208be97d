"""Writes a multiple-choice task from WordNet: which of four words has this definition?

    python examples/real_corpora/definitions.py [DIRECTORY]     # default: corpora; writes DIRECTORY/definitions.jsonl
    lemur eval --checkpoint RUN --tasks definitions --include-path examples/real_corpora

WordNet 3.0 comes from Debian's package wordnet-base. A question is the first meaning of a noun or verb that occurs in
WordNet's tagged texts. The four words share one of WordNet's topics; chance is 25%.
"""

import json
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from fetch import unpack

QUESTIONS = 500


def first_meanings(root: Path, kind: str) -> dict[str, str]:
    """Word -> offset of its first meaning in `data.KIND`; only single words that occur in tagged texts."""
    meanings = {}
    for line in (root / f"index.{kind}").read_text().splitlines():
        fields = line.split()
        if line.startswith(" ") or not fields[0].isalpha():
            continue
        pointers = int(fields[3])
        if int(fields[5 + pointers]) > 0:
            meanings[fields[0]] = fields[6 + pointers]
    return meanings


def questions(root: Path, kind: str) -> list[dict]:
    """All questions of a part of speech, in the order of the words."""
    topics: dict[str, dict[str, tuple[str, set[str]]]] = defaultdict(dict)
    meanings = first_meanings(root, kind)
    synsets = {}
    for line in (root / f"data.{kind}").read_text().splitlines():
        if not line.startswith(" "):
            facts, _, gloss = line.partition(" | ")
            place, topic, _, count, *words = facts.split()
            synonyms = {word.lower() for word in words[: 2 * int(count, 16) : 2]}
            synsets[place] = topic, gloss.split(";")[0].strip(), synonyms
    for word, place in meanings.items():
        topic, definition, synonyms = synsets[place]
        if word in synonyms and word not in definition.lower():
            topics[topic][word] = definition, synonyms
    found = []
    for topic, words in sorted(topics.items()):
        draw = random.Random(f"{kind}/{topic}")
        for word, (definition, synonyms) in sorted(words.items()):
            others = sorted(set(words) - synonyms)
            if len(others) < 3:
                continue
            choices = [*draw.sample(others, 3), word]
            draw.shuffle(choices)
            found.append({"definition": definition, "choices": choices, "answer": choices.index(word)})
    return found


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        unpack("wordnet-base", Path(temporary))
        package = Path(temporary, "wordnet-base")
        found = [
            *questions(package / "usr/share/wordnet", "noun"),
            *questions(package / "usr/share/wordnet", "verb"),
        ]
        (directory / "licenses").mkdir(exist_ok=True)
        shutil.copy(package / "usr/share/doc/wordnet-base/copyright", directory / "licenses/wordnet-base")
    chosen = random.Random(0).sample(found, QUESTIONS)
    lines = [json.dumps(question) for question in chosen]
    (directory / "definitions.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{directory}/definitions.jsonl: {len(chosen)} of {len(found):,} questions, WordNet 3.0")


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["corpora"]))

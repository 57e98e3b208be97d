"""Duplicates: near ones against the exact Jaccard similarity, and all of them against a search through every pair."""

import functools
import json
import random

import numpy as np
import pytest

from lemur_jax.data.arrays import ArrayWriter, open_array
from lemur_jax.prepare import duplicates
from lemur_jax.prepare.cleaning import filters, parse_steps


@pytest.fixture
def dedup(tmp_path):
    """dedup(texts, **steps) -> for each step the index of the earlier text that each one repeats, or -1."""

    def run(texts, **options):
        steps = parse_steps("t", options)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        writers = {
            name: ArrayWriter(folder / name, dtype)
            for name, dtype in duplicates.fingerprint_arrays(steps).items()
        }
        for text in texts:
            for name, data in filters(steps).fingerprints({"": text}).items():
                writers[name].append(np.frombuffer(data, writers[name].dtype))
        for writer in writers.values():
            writer.close()
        arrays = {name: open_array(folder / name).result() for name in writers}
        (folder / "scratch").mkdir()
        found = duplicates.find_duplicates(arrays, json.loads(steps), len(texts), folder / "scratch")
        return {name: earlier.tolist() for name, earlier in found.items()}

    return run


@pytest.fixture(params=["whole", "in parts"])
def sizes(request, monkeypatch):
    """Everything at once, or in parts that are smaller than the corpus."""
    if request.param == "in parts":
        for name, size in {"_READ": 7, "_SORTED": 16, "_VERIFIED": 5, "_RESOLVED": 11}.items():
            monkeypatch.setattr(duplicates, name, size)
        monkeypatch.setattr("lemur_jax.data.arrays._MAPPED", 7)


def test_exact_duplicates_but_for_space_around(dedup, sizes):
    texts = ["x y", "x  y", " x y\n", "z", "x y", "z "] + [str(n) for n in range(50)] + ["7", "x  y"] * 20
    first = {}
    expected = [first.setdefault(text.strip(), index) for index, text in enumerate(texts)]
    expected = [other if other != index else -1 for index, other in enumerate(expected)]
    assert dedup(texts, exact_duplicates={}) == {"exact_duplicates": expected}


@functools.cache
def runs(text, words=5):
    split = text.split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def jaccard(a, b):
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def test_planted_near_duplicates(dedup):
    """The promise: recall at least 0.95 from Jaccard 0.8 on, and nothing removed below 0.5."""
    generator = random.Random(0)
    vocabulary = [f"word{n}" for n in range(2000)]
    texts, similarity = [], {}
    for _ in range(1500):
        words = generator.choices(vocabulary, k=generator.randint(50, 400))
        changed = list(words)
        for _ in range(generator.randint(0, len(words) // 6)):
            changed[generator.randrange(len(words))] = "changed"
        texts += [" ".join(words), " ".join(changed)]
        similarity[len(texts) - 1] = jaccard(*texts[-2:])
    earlier = dedup(texts, near_duplicates={})["near_duplicates"]
    near = [index for index, value in similarity.items() if value >= 0.8]
    far = [index for index, value in similarity.items() if value < 0.5]
    assert len(near) > 200
    assert len(far) > 200
    assert sum(earlier[index] >= 0 for index in near) >= 0.95 * len(near)
    assert all(earlier[index] == -1 for index in far)
    assert all(other in (-1, index - 1) for index, other in enumerate(earlier))
    assert all(other == -1 for other in earlier[::2])


def families(generator, count, longest):
    """Documents of `count` families, each version a few words away from one before it, mixed."""
    texts = []
    for _ in range(count):
        versions = [generator.choices([f"word{n}" for n in range(500)], k=100)]
        for _ in range(generator.randint(0, longest)):
            words = list(generator.choice(versions))
            for _ in range(generator.randint(0, 4)):
                words[generator.randrange(100)] = f"new{generator.random()}"
            versions.append(words)
        texts += [" ".join(words) for words in versions]
    generator.shuffle(texts)
    return texts


def test_a_search_through_every_pair_finds_the_same(dedup, sizes):
    """Families of versions, in which what is like a removed document may be unlike each that stays."""
    texts = families(random.Random(2), 40, 12)
    steps = json.loads(parse_steps("t", {"near_duplicates": {}}))
    marks = [filters(json.dumps(steps)).fingerprints({"": text})["minhashes"] for text in texts]
    minhashes = np.array([np.frombuffer(mark, np.uint16) for mark in marks])
    bands = minhashes.reshape(len(texts), 32, 4)
    exact, near, digests = [], [], {}
    for index, text in enumerate(texts):
        exact.append(digests.get(text, -1))
        digests.setdefault(text, index)
        stay = [n for n in range(index) if exact[n] == near[n] == -1]
        similar = [n for n in stay if (minhashes[n] == minhashes[index]).mean() >= 0.7]
        similar = [n for n in similar if (bands[n] == bands[index]).all(axis=1).any()]
        near.append(-1 if exact[index] >= 0 or not similar else similar[0])
    expected = {"exact_duplicates": exact, "near_duplicates": near}
    assert dedup(texts, exact_duplicates={}, near_duplicates={}) == expected
    assert sum(other >= 0 for other in near) > 50
    assert exact.count(-1) < len(texts)


def test_what_is_removed_is_similar_to_what_stays_also_in_large_groups(dedup, sizes):
    """Hundreds of versions of one text: more in a group than a document is compared with."""
    texts = families(random.Random(3), 1, 300)
    earlier = dedup(texts, near_duplicates={})["near_duplicates"]
    for index, other in enumerate(earlier):
        if other >= 0:
            assert other < index
            assert earlier[other] == -1
            assert jaccard(texts[index], texts[other]) > 0.5
    stay = [index for index, other in enumerate(earlier) if other == -1]
    alike = sum(any(jaccard(texts[a], texts[b]) >= 0.85 for b in stay if b < a) for a in stay)
    assert alike <= 0.02 * len(texts)


def test_documents_without_words_are_not_alike(dedup):
    assert dedup(["!!!", "???", "", "!!!"], near_duplicates={}) == {"near_duplicates": [-1, -1, -1, 0]}


def test_settings_of_bands_and_threshold(dedup):
    generator = random.Random(4)
    texts = families(generator, 30, 3)
    counts = [
        sum(other >= 0 for other in dedup(texts, near_duplicates=options)["near_duplicates"])
        for options in ({"threshold": 0.95}, {}, {"threshold": 0.3, "hashes": 64, "bands": 64})
    ]
    assert 0 < counts[0] < counts[1] < counts[2]
    assert dedup(texts, near_duplicates={"hashes": 128, "bands": 1})["near_duplicates"].count(-1) > 0

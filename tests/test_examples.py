"""`examples/real_corpora`: what is taken from packages, the configs, and a small prepare. Fetching needs Debian."""

import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lemur_jax.config import default_config, load
from lemur_jax.data.mixture import open_mixture
from lemur_jax.models.presets import preset
from lemur_jax.prepare.prepare import prepare
from lemur_jax.text.tokenizer import Tokenizer

# After prepare, which keeps TensorFlow quiet.
import seqio  # isort: skip

HERE = Path(__file__).parents[1] / "examples/real_corpora"


@pytest.fixture(scope="module")
def script():
    """Imports a script of the example by its name."""

    def load_script(name):
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load_script
    for name in ("fetch", "definitions"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def fetch(script):
    return script("fetch")


PAGE = """<html><head><title>T</title><style>p {}</style></head><body><nav>next</nav><h1>Heading &amp; more</h1>
<p>One <b>bold</b>
word.</p><ul><li>first<li>second</ul><script>x()</script></body></html>"""


def test_pages_become_paragraphs(fetch):
    assert fetch.page_text(PAGE) == "Heading & more\n\nOne bold word.\n\nfirst\n\nsecond"


def test_documents_of_a_package(fetch, tmp_path):
    files = {
        "p/usr/lib/a.py": b"x = 1\n" * 50,
        "p/usr/lib/tests/b.py": b"y = 1\n" * 50,
        "p/usr/lib/latin.py": "é".encode("latin-1") * 300,
        "p/usr/lib/short.py": b"z\n",
        "p/usr/share/doc/p/copyright": b"MIT",
        "p/usr/share/doc/p/m.en.txt.gz": gzip.compress(b"A manual. " * 40),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = fetch.Corpus(packages=("p",), suffixes=(".py", ".en.txt.gz"), license="MIT")
    found = {document["id"]: document for document in fetch.documents(tmp_path, corpus)}
    assert set(found) == {"p/usr/lib/a.py", "p/usr/share/doc/p/m.en.txt.gz"}
    assert found["p/usr/lib/a.py"] == {"text": "x = 1\n" * 50, "id": "p/usr/lib/a.py", "license": "MIT"}
    assert found["p/usr/share/doc/p/m.en.txt.gz"]["text"] == "A manual. " * 40


def test_optional_packages(fetch, monkeypatch, capsys):
    index = {"git-doc": "git-doc", "manual": ""}
    monkeypatch.setattr(fetch, "newest", index.get)
    rfcs = dict(suffixes=(".txt",), license="", optional=("manual",))
    assert fetch.packages_of(fetch.Corpus(packages=("git-doc",), **rfcs)) == ["git-doc"]
    assert capsys.readouterr().out == "manual is not in the package index: skipped\n"
    with pytest.raises(SystemExit, match="no Debian package manual"):
        fetch.packages_of(fetch.Corpus(packages=("manual",), **rfcs))


def test_questions_from_wordnet(fetch, script, tmp_path):
    """Synonyms, words of another topic, without a count in text, and in their own definition are left out."""
    synsets = {
        "00000101": '05 n 02 cat 0 feline 0 000 | a small animal that purrs; "a cat"',
        "00000102": "05 n 01 dog 0 000 | an animal that barks",
        "00000103": "05 n 01 cow 0 000 | an animal that gives milk",
        "00000104": "05 n 01 horse 0 000 | an animal to ride",
        "00000105": "06 n 01 house 0 000 | a building to live in",
        "00000106": "05 n 01 auk 0 000 | a bird of the north",
        "00000107": "05 n 01 hen 0 000 | the hen is a bird",
    }
    data = "".join(f"{place} {line}\n" for place, line in synsets.items())
    (tmp_path / "data.noun").write_text("  1 license\n" + data)
    words = dict(cat="101", feline="101", dog="102", cow="103", horse="104", house="105", hen="107")
    index = "".join(f"{word} n 1 1 @ 1 1 00000{place}\n" for word, place in words.items())
    (tmp_path / "index.noun").write_text("  1 license\n" + index + "auk n 1 1 @ 1 0 00000106\n")
    found = script("definitions").questions(tmp_path, "noun")
    assert [question["choices"][question["answer"]] for question in found] == sorted(
        ["cat", "feline", "dog", "cow", "horse"]
    )
    assert found[0]["definition"] == "a small animal that purrs"
    assert all("house" not in question["choices"] for question in found)
    assert set(found[0]["choices"]) == {"cat", "dog", "cow", "horse"}


def test_the_configs_and_a_small_prepare(tmp_path, tokenizer_dir, monkeypatch):
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    for name in ("python", "go", "rust", "c", "cpp", "ruby", "manuals", "book"):
        rows = [
            {"text": f"{name} {n} " + f"line {n * 7} of {name}\n" * 20, "id": f"{n}", "license": "MIT"}
            for n in range(40)
        ]
        (corpora / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("LEMUR_CORPORA", str(corpora))

    def tiny(_):
        config = default_config(preset("tiny", vocab_size=700, max_position_embeddings=4096))
        config.tokenizer.path = str(tokenizer_dir)
        return config

    monkeypatch.setattr("lemur_jax.config_from_checkpoint", tiny)
    path, before = str(HERE / "real.py"), set(seqio.TaskRegistry.names())
    for variant, tokens in (("gpu", 20e6), ("sweep_gpu", 20e6), ("sweep", 16_384)):
        config = load(f"{path}:{variant}")
        made = config.train.steps * config.train.batch_rows * config.data.sequence_length
        assert made == pytest.approx(tokens, rel=0.01)
    assert config.optimizer.final_learning_rate == config.optimizer.learning_rate
    try:
        small = ("--config.data.sequence_length=64", "--config.train.steps=30", "--config.prepare.workers=1")
        config = load(path, [*small, f"--config.data.stores={tmp_path / 'stores'}"])
        prepare(config)
        mixture = open_mixture(config.data, Tokenizer.load(tokenizer_dir), seed=0, batch_rows=2)
        assert [source.name for source in mixture.sources] == ["code", "manuals"]
        assert {path.name for path in (tmp_path / "stores/book").iterdir() if path.is_dir()} == {"validation"}
    finally:
        sys.modules.pop("real_tasks", None)
        for name in set(seqio.TaskRegistry.names()) - before:
            seqio.TaskRegistry.remove(name)


def test_run_sh_says_what_is_missing(tmp_path):
    shutil.copytree(HERE, tmp_path / "examples/real_corpora")
    for words, message in ((["tpu"], "unknown variant tpu"), ([], "run bash launch/quickstart.sh first")):
        script = ["bash", str(tmp_path / "examples/real_corpora/run.sh"), *words]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.slow
def test_a_package_is_fetched(fetch, tmp_path):
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get here")
    try:
        fetch.unpack(fetch.newest("libeigen3-dev"), tmp_path)
    except (SystemExit, subprocess.CalledProcessError):
        pytest.skip("Debian's packages cannot be fetched from here")
    documents = list(fetch.documents(tmp_path, fetch.CORPORA["cpp"]))
    assert len(documents) > 100
    assert any("EIGEN" in document["text"] for document in documents)

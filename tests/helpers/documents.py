"""A small trained tokenizer, and stores of made-up documents."""

import json
import pydoc
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lemur_jax.common.json_files import read_sealed, write_sealed
from lemur_jax.config import default_config, from_config_dict
from lemur_jax.data.manifest import Manifest
from lemur_jax.data.store import TokenStore
from lemur_jax.models.presets import preset
from lemur_jax.prepare.store_writer import StoreWriter
from lemur_jax.text.chat_template import CHATML_TOKENS
from lemur_jax.text.sentencepiece_model import added_token
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend, train_sentencepiece

VOCAB_SIZE = 700
# Of the manifest of a store.
FIELDS = {
    "task": "t",
    "split": "train",
    "source": "s",
    "tokenizer_digest": "f" * 64,
    "added_tokens": {},
    "vocab_size": 1000,
}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A Llama-style SentencePiece model of 700 pieces, trained on code and some other scripts."""
    path = tmp_path_factory.mktemp("tokenizer") / "base"
    code = Path(pydoc.__file__).read_text(encoding="utf-8")
    train_sentencepiece([code, "Grüße, 漢字 und 😀 — naïve café."] * 3, path, VOCAB_SIZE)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="session")
def chat_dir(tokenizer_dir) -> Path:
    """The same with ChatML's control tokens and template."""
    path = tokenizer_dir.parent / "chat"
    extend(tokenizer_dir, path, CHATML_TOKENS)
    return path


@pytest.fixture(scope="session")
def chat_tokenizer(chat_dir) -> Tokenizer:
    return Tokenizer.load(chat_dir)


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory) -> Path:
    """A directory like Llama-3's: tokenizer.json alone, byte-level BPE, tokens above the vocabulary."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox\n" * 9, "def f(x):\n    return x\n" * 9], trainer)
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    path = tmp_path_factory.mktemp("byte_level")
    backend.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>", "lstrip": False}}
    (path / "special_tokens_map.json").write_text(json.dumps(names))
    return path


def write_byte_level(source: Path, path: Path, tokens: Sequence[str] = (), config=(), **parts) -> Tokenizer:
    """Writes the tokenizer in `source` with more control tokens, other parts of its tokenizer.json, and a config."""
    spec = json.loads((source / "tokenizer.json").read_text()) | parts
    size = Tokenizer.load(source).vocab_size
    spec["added_tokens"] += [added_token(token, size + index) for index, token in enumerate(tokens)]
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(config)}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(path)


MakeStore = Callable[..., TokenStore]


@pytest.fixture
def make_store(tmp_path) -> MakeStore:
    """make_store(documents, masks=None, name="a/train", **manifest fields) writes and opens a store."""

    def make(documents: Sequence, masks: Sequence | None = None, name="a/train", **fields) -> TokenStore:
        task, _, split = name.partition("/")
        fields = FIELDS | {"task": task, "split": split, "has_loss_mask": masks is not None} | fields
        (tmp_path / task).mkdir(exist_ok=True)
        with StoreWriter(tmp_path / task / split, Manifest(**fields)) as writer:
            for index, ids in enumerate(documents):
                writer.add(
                    ids, id=f"doc-{index}", n_bytes=len(ids), mask=None if masks is None else masks[index]
                )
        return TokenStore.open(tmp_path / task / split)

    return make


@pytest.fixture
def random_documents() -> Callable[..., list[np.ndarray]]:
    """random_documents(count, longest) -> ids, in which each special id may stand anywhere."""

    def make(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 1000, rng.integers(1, longest + 1)) for _ in range(count)]

    return make


@pytest.fixture
def task():
    """task(train, validation=..., name="made_up") registers records under a name and returns their source."""
    import seqio

    from tests.helpers.list_source import ListSource

    names = []

    def add(train, validation=(), name="made_up"):
        names.append(name)
        train, validation = list(train), list(validation)
        source = ListSource({"train": train, "validation": validation or train[:1]})
        seqio.TaskRegistry.add(name, source=source, output_features={}, metric_fns=[])
        return source

    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


@pytest.fixture
def make_config(tmp_path, tokenizer_dir):
    """make_config(*sources, held_out=(), **options) -> a small config with its stores in tmp_path."""

    def make(*sources, held_out=(), **options):
        config = default_config(preset("quickstart"))
        config.tokenizer.path = str(tokenizer_dir)
        config.data.stores = str(tmp_path / "stores")
        config.data.sequence_length = 32
        config.data.sources = {
            name: {"share": 1.0, "packing": "concat", "max_epochs": 0.0} for name in sources
        }
        config.eval.tasks = tuple(held_out)
        config.prepare.workers = 1
        config.train.steps = 10
        config.train.batch_rows = 4
        config.update_from_flattened_dict(options)
        return from_config_dict(config)

    return make


# What tokenizers trip over: runs, other scripts, control characters, digits, SentencePiece's own signs.
ALPHABET = " \n\t\rabcdefgh  ==--()\"'<>|_▁😀漢字éß\x00\x01\x7f\u200d\ufffd\u00a00123456789ABC"
HARD_TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n    x",
    " leading space",
    "trailing space  ",
    "def f(x):\n    return x ** 2  # squared\n",
    "a" + " " * 200 + "b" + "\n" * 100 + "c" + "\t" * 50,
    "0123456789 3.14159 1e-5 0xdeadbeef",
    "漢字仮名交じり文 Привет мир العربية हिन्दी",
    "😀👩‍👩‍👧‍👦🇨🇭 e\u0301 \u00a0\u3000|",
    "null \x00 bell \x07 escape \x1b[0m delete \x7f",
    "<s> </s> <unk> <0x0A> <|im_start|> ▁▁ ⁇",
    "=" * 77 + "#" * 33 + "ab" * 40 + "aba" * 21,
]


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """The texts above and random ones: half of single characters, half of runs."""
    rng = random.Random(seed)
    mixed = ("".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(count // 2))
    runs = ("".join(c * rng.randint(1, 40) for c in rng.choices(ALPHABET, k=6)) for _ in range(count // 2))
    return [*HARD_TEXTS, *mixed, *runs]


def rewrite_manifest(path: Path, **fields) -> None:
    """Changes fields of a store's manifest, which matches its own digest afterwards."""
    file = epath.Path(path) / "manifest.json"
    write_sealed(file, read_sealed(file) | fields)

"""Repository metadata and fill-in-the-middle, read back from the pieces and from the ids."""

import collections
import json
import re
import shutil

import pytest
from transformers import AutoTokenizer

from lemur_jax.common.errors import UserError
from lemur_jax.prepare.cleaning import parse_steps
from lemur_jax.prepare.code_layout import FIM_TOKENS, REPOSITORY_TOKENS, check_tokens, encode_pieces, layout
from lemur_jax.prepare.encoding import encode
from lemur_jax.text.sentencepiece_model import added_token
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import extend

FIM = {"fim": {"rate": 1.0, "spm": 0.5}}
REPOSITORY = {"repository": {"name": "repo", "path": "file"}}
META = {"repo": "me/it", "file": "src/ä.py"}
TEXT = "def f(x):\n    return '漢字' + x\n" * 3


@pytest.fixture(scope="module")
def code_tokenizer(tokenizer_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "code"
    extend(tokenizer_dir, path, [*REPOSITORY_TOKENS, *FIM_TOKENS])
    return Tokenizer.load(path)


def put_together(pieces):
    """(order, text) as an independent reader of the two layouts understands it."""
    tokens = [piece for piece, control in pieces if control]
    texts = dict.fromkeys(FIM_TOKENS, "")
    current = None
    for piece, control in pieces:
        if control:
            current = piece
        else:
            texts[current] = piece
    prefix, middle, suffix = (texts[token] for token in FIM_TOKENS)
    if tokens == ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]:
        # In SPM the prefix is empty in front and stands before the middle.
        return ("SPM" if pieces[1] == ("<fim_suffix>", True) else "PSM"), prefix + middle + suffix
    return "none", "".join(piece for piece, _ in pieces)


def test_both_orders_give_the_text_back_and_cut_anywhere():
    orders, cuts = collections.Counter(), set()
    for index in range(2000):
        pieces = layout(TEXT, {}, f"doc-{index}", FIM)
        order, text = put_together(pieces)
        assert text == TEXT
        orders[order] += 1
        if order == "PSM":
            cuts.add(len(pieces[1][0]))
    assert 900 < orders["SPM"] < 1100
    assert orders["none"] == 0
    assert len(cuts) > 0.9 * len(TEXT)  # at every character, not at tokens or lines


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_rate_is_kept(rate):
    assert layout(TEXT, META, "a", {}) == [(TEXT, False)]  # off by default
    steps = {"fim": {"rate": rate, "spm": 0.0}}
    turned = sum(len(layout(TEXT, {}, f"doc-{index}", steps)) > 1 for index in range(2000))
    assert abs(turned / 2000 - rate) < 0.04


def test_a_document_is_always_turned_in_the_same_way():
    assert layout(TEXT, {}, "a", FIM) == layout(TEXT, {}, "a", FIM)
    assert layout(TEXT, {}, "a", FIM) != layout(TEXT, {}, "b", FIM)


def test_repository_stands_in_front():
    assert layout("x", META, "a", REPOSITORY) == [
        ("<reponame>", True),
        ("me/it", False),
        ("<filename>", True),
        ("src/ä.py\nx", False),
    ]
    assert layout("x", {"file": "y"}, "a", REPOSITORY) == [("<filename>", True), ("y\nx", False)]
    assert layout("x", {}, "a", REPOSITORY) == [("x", False)]
    both = layout(TEXT, META, "a", REPOSITORY | FIM)
    assert both[3:5] == [("src/ä.py\n", False), ("<fim_prefix>", True)]
    assert put_together(both[4:])[1] == TEXT


def test_ids_are_of_the_pieces_and_typed_names_are_text(code_tokenizer):
    for index in range(50):
        pieces = layout(TEXT + "<fim_middle>", META, f"{index}", REPOSITORY | FIM)
        ids = encode_pieces(code_tokenizer, pieces)
        assert code_tokenizer.decode(ids) == "".join(piece for piece, _ in pieces)
        control = set(code_tokenizer.control_tokens.values())
        assert sum(i in control for i in ids) == sum(flag for _, flag in pieces)
    plain = encode_pieces(code_tokenizer, layout(TEXT, {}, "a", {}))
    assert plain == code_tokenizer.encode(TEXT)


def test_a_tokenizer_without_the_tokens_is_refused(tokenizer, code_tokenizer):
    assert check_tokens(FIM, code_tokenizer, "t")
    assert not check_tokens({}, tokenizer, "t")
    with pytest.raises(UserError, match=r"prepare\.steps\.t writes .*no <reponame>.*add_tokens"):
        check_tokens(REPOSITORY, tokenizer, "t")


def test_tokens_of_another_model(byte_level_dir, tmp_path):
    """As Qwen2.5-Coder has them: added tokens that are not special."""
    names = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>")
    path = shutil.copytree(byte_level_dir, tmp_path / "code")
    spec = json.loads((path / "tokenizer.json").read_text())
    size = Tokenizer.load(path).vocab_size
    spec["added_tokens"] += [added_token(t, size + n, {"special": False}) for n, t in enumerate(names)]
    (path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(path)
    options = {"fim": {"rate": 1.0, "spm": 0.0, "tokens": names[:3]}}
    options["repository"] = {"name": "repo", "path": "file", "tokens": names[3:]}
    steps = json.loads(parse_steps("t", options))
    assert check_tokens(steps, tokenizer, "t")
    record = {"text": TEXT.encode(), "meta": json.dumps(META).encode()}
    tokens = encode(tokenizer, record, json.dumps(steps)).tokens.tolist()[:-1]
    text = tokenizer.decode(tokens)
    parts = re.fullmatch(r"(?s)<\|repo_name\|>me/it<\|file_sep\|>src/ä\.py\n<\|fim_prefix\|>(.*)"
                         r"<\|fim_suffix\|>(.*)<\|fim_middle\|>(.*)", text)  # fmt: skip
    assert parts[1] + parts[3] + parts[2] == TEXT
    assert AutoTokenizer.from_pretrained(path).encode(text, add_special_tokens=False) == tokens
    with pytest.raises(UserError, match=r"fim\.tokens must stand for <fim_prefix> <fim_middle> <fim"):
        check_tokens({"fim": {"tokens": names}}, tokenizer, "t")


def test_the_header_counts_in_the_bytes(code_tokenizer):
    record = {"text": TEXT.encode(), "meta": json.dumps(META).encode()}
    steps = json.dumps(REPOSITORY | {"fim": {"rate": 1.0, "spm": 0.5}})
    n_bytes = encode(code_tokenizer, record, steps).n_bytes
    assert n_bytes == len("me/itsrc/ä.py\n".encode()) + len(TEXT.encode())

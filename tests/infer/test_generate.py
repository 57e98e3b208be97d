"""Generation from a checkpoint against transformers.generate on its export, on one device and on meshes of eight."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from lemur_jax.common.errors import UserError
from lemur_jax.convert.export_hf import export_hf
from lemur_jax.convert.import_hf import import_hf
from lemur_jax.infer.batching import bucket
from lemur_jax.infer.engine import Request
from lemur_jax.infer.generate import completion as completion_of
from lemur_jax.infer.generate import generate, make_engine
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import load
from tests.helpers.sessions import mesh_of

NEW = 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that most positions are beyond it
}
VARIANTS = {
    "gqa": {},
    "tied llama3": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
}
CASES = [
    *(("gqa", mesh) for mesh in ("", "fsdp=8", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2")),
    *(("tied llama3", mesh) for mesh in ("", "data=4,tensor=2")),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A model as we import it, with the greedy answers that transformers gives on what we export: tokens
    [B, NEW] and their log-probabilities."""

    checkpoint: pathlib.Path
    prompts: list[list[int]]
    tokens: np.ndarray
    logprobs: np.ndarray

    def session(self, mesh: str, dtype: str = "float32"):
        mesh = mesh_of(mesh)
        return load(self.checkpoint, mesh.shape, dtype, devices=mesh.devices.flatten().tolist())


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return {name: reference(tmp_path_factory.mktemp("hf"), **changes) for name, changes in VARIANTS.items()}


def reference(path, **changes) -> Reference:
    torch.manual_seed(1)
    shape = {
        "vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }  # fmt: skip
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | changes)))
    made.save_pretrained(path / "made")
    import_hf(path / "made", path / "checkpoint")
    export_hf(path / "checkpoint", path / "exported", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(path / "exported", dtype=torch.float32)
    # Nothing special about any id: no stop, and none that transformers keeps from being generated.
    model.generation_config = transformers.GenerationConfig(max_new_tokens=NEW, pad_token_id=0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 160, size).tolist() for size in (1, 2, 150, *rng.integers(3, 140, size=17))]
    longest = max(map(len, prompts))
    # transformers wants padding on the left.
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, **options)
    logits = torch.stack(out.logits, dim=1)
    # Where the best two ids are this close, rounding could decide, and the test would test nothing.
    best = logits.topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
    tokens = out.sequences[:, longest:]
    logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return Reference(
        checkpoint=path / "checkpoint", prompts=prompts, tokens=tokens.numpy(), logprobs=logprobs.numpy()
    )


@pytest.mark.parametrize(("variant", "mesh"), CASES)
def test_greedy_equals_transformers(references, variant, mesh):
    expected = references[variant]
    assert len(np.unique(expected.tokens)) > 30  # it does not babble one id
    out = generate(expected.session(mesh), expected.prompts, max_new_tokens=NEW, stop_ids=())
    np.testing.assert_array_equal([completion.tokens for completion in out], expected.tokens)
    np.testing.assert_allclose([completion.logprobs for completion in out], expected.logprobs, atol=2e-4)
    assert {completion.finish_reason for completion in out} == {"length"}


def test_stop_ids_and_limits_of_each_sequence(references):
    """Each sequence ends with its own stop id or at its own limit, as cutting the long answer shows."""
    expected = references["gqa"]
    session = expected.session("")
    stops = [[int(row[index % 20]), 159 - index] for index, row in enumerate(expected.tokens)]
    limits = [1 + 5 * index % NEW for index in range(20)]
    each = zip(expected.prompts, limits, stops, strict=True)
    requests = [Request(prompt=prompt, max_new_tokens=limit, stop_ids=stop) for prompt, limit, stop in each]
    engine = make_engine(session, requests)
    while engine.busy:
        engine.step()
    out = list(map(completion_of, requests))
    for completion, row, stop, limit in zip(out, expected.tokens, stops, limits, strict=True):
        ends = [index for index, token in enumerate(row[:limit]) if token in stop]
        cut = ends[0] + 1 if ends else limit
        assert completion.tokens == tuple(row[:cut])
        assert len(completion.logprobs) == cut
        assert completion.finish_reason == ("stop" if ends else "length")
        assert completion.content == tuple(row[: cut - 1] if ends else row[:cut])


def test_bfloat16(references):
    """The first token's log-probability moves by no more than bfloat16 explains, and the cache is narrow."""
    expected = references["gqa"]
    session = expected.session("", "bfloat16")
    out = generate(session, expected.prompts, max_new_tokens=2, stop_ids=())
    same = [i for i, completion in enumerate(out) if completion.tokens[0] == expected.tokens[i, 0]]
    assert len(same) >= 16
    got = [out[i].logprobs[0] for i in same]
    np.testing.assert_allclose(got, expected.logprobs[same, 0], atol=0.3)


def test_a_session_compiles_once_for_similar_calls(tiny_session):
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))
    generate(tiny_session, [[1], [2, 3], [4]], max_new_tokens=3, stop_ids=[9])
    events.clear()
    generate(tiny_session, [[4] * 30, [5], [6]], max_new_tokens=20, stop_ids=[7, 8])
    assert not [event for event in events if "compile" in event]
    jax.jit(lambda x: x + 1)(1.0)
    assert [event for event in events if "compile" in event]  # the check can fail


def test_a_draw_depends_on_its_seeds_alone(tiny_session):
    """Not on the batch's size, order or company."""
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    # The last prompt is in another bucket than the rest, whose cache slots are others without it.
    prompts = [[index + 1] * (3 * index + 1) for index in range(6)] + [[9] * 40]
    options = {"max_new_tokens": 12, "stop_ids": (), "sampling": sampling}
    together = generate(tiny_session, prompts, **options)
    some = [5, 0, 3]
    apart = generate(tiny_session, [prompts[i] for i in some], seeds=some, **options)
    assert [completion.tokens for completion in apart] == [together[i].tokens for i in some]
    # Other seeds, of the call or of the sequence, draw otherwise.
    others = generate(tiny_session, [prompts[i] for i in some], seeds=[7, 8, 9], **options)
    assert all(completion.tokens != together[i].tokens for completion, i in zip(others, some, strict=True))
    options["sampling"] = dataclasses.replace(sampling, seed=4)
    others = generate(tiny_session, prompts, **options)
    assert all(a.tokens != b.tokens for a, b in zip(others, together, strict=True))


def test_repetition_penalty_forbids_what_it_should(tiny_session):
    """A huge penalty on a model with positive logits for repeats: no id of prompt or answer again."""
    prompt = [3, 4, 5, 6]
    sampling = Sampling(repetition_penalty=1e6)
    tokens = generate(tiny_session, [prompt], max_new_tokens=40, stop_ids=(), sampling=sampling)[0].tokens
    assert len(set(tokens)) == 40
    assert not set(tokens) & set(prompt)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 512]], {}, "prompt 0 has token id 512, outside the model's vocabulary of 512"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 60], {"max_new_tokens": 5}, "max_position_embeddings 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens of prompt 0 is 0"),
    ],
)
def test_bad_input(tiny_session, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_session, prompts, **({"max_new_tokens": 4, "stop_ids": ()} | options))


def test_the_longest_sequence_fits_and_no_prompt_is_no_completion(tiny_session):
    out = generate(tiny_session, [[1] * 60], max_new_tokens=4, stop_ids=())
    assert len(out[0].tokens) == 4
    assert generate(tiny_session, [], max_new_tokens=4, stop_ids=()) == []


def test_bucket():
    sizes = [bucket(size) for size in range(1, 2000)]
    assert all(size <= b <= max(size, 1.25 * size) for size, b in enumerate(sizes, 1))
    assert len(set(sizes)) <= 40
    assert [bucket(size) for size in (1, 2, 3, 8, 9, 17, 1025)] == [1, 2, 3, 8, 10, 20, 1280]

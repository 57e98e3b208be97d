"""Runs of `lemur rl`: resumed to the same bits, own tokens alone train, bad environments are skipped."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lemur_jax.agents.environments import Step
from lemur_jax.checkpoint.reading import restore_params
from lemur_jax.common.errors import UserError
from lemur_jax.config import from_config_dict
from lemur_jax.convert.source import open_source
from lemur_jax.models import decoder, lora
from lemur_jax.models.decoder import Compute
from lemur_jax.models.presets import preset
from lemur_jax.rl import games, run
from lemur_jax.rl.rollouts import RolloutBatch, Rollouts
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.text.files import CHATML_TEMPLATE
from lemur_jax.train.loop import train
from lemur_jax.train.state import shardings_of, start
from tests.helpers.rl import STEPS, Echo, make_config, only_echo
from tests.helpers.runs import final_params, without_clock, write_model


@pytest.fixture
def play(monkeypatch, small_chat_tokenizer, tmp_path):
    """Runs in this process with one environment, or with those that a function from (kind, data) makes."""

    def start(workdir, environment=Echo, tasks=None, **options):
        found = tasks or ([environment()], [environment()])
        monkeypatch.setattr(games, "tasks", lambda name, data: found)
        config = from_config_dict(make_config(small_chat_tokenizer, tmp_path, **options))
        train(config, tmp_path / workdir, open_inputs=run.open_inputs)
        return [record for record in read_metrics(tmp_path / workdir) if record["kind"] == "train"]

    return start


def target_logprobs(model, params, batch):
    """[B, T] of the plain forward pass, and the mask of the policy's own tokens."""
    places = batch["positions"], batch["segment_ids"]
    logits = decoder.forward(model, Compute(), params, batch["tokens"], *places)
    found = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)
    return found[..., 0], batch["loss_weights"] > 0


def test_only_the_policys_own_tokens_train(small_chat_tokenizer, tmp_path, monkeypatch):
    """Every number of a batch against the plain forward pass and against the episodes themselves."""
    monkeypatch.setattr(games, "tasks", only_echo)
    monkeypatch.setattr(Echo, "stops", ("e", "i"))
    template = tmp_path / "own.jinja"
    # As of models that think: a prompt says more than the head of a turn.
    template.write_text(CHATML_TEMPLATE + "{% if add_generation_prompt %}so: {% endif %}")
    options = {"rewards": "turn", "algorithm": "dr_grpo", "tokenizer.chat_template": str(template)}
    options["max_new_tokens"] = 8
    config = from_config_dict(make_config(small_chat_tokenizer, tmp_path, **options))
    inputs = run.open_inputs(config)
    assert inputs.tokenizer.chat_template == template.read_text()
    rollouts = inputs.rollouts
    params = jax.jit(decoder.init_params, static_argnums=0)(config.model, jax.random.key(1))
    played = rollouts.play(3, params)
    batch = played.arrays
    jax.tree.map(np.testing.assert_array_equal, batch, rollouts.play(3, params).arrays)
    expected, own = target_logprobs(config.model, params, batch)
    assert 0 < own.sum() < (batch["segment_ids"] > 0).sum() / 2
    np.testing.assert_allclose(batch["sampling_logprobs"][own], expected[own], atol=1e-4)
    assert not batch["sampling_logprobs"][~own].any()
    assert not batch["advantages"][~own].any()
    text = small_chat_tokenizer.decode(batch["targets"][~own & (batch["segment_ids"] > 0)].tolist())
    assert "say" in text
    assert "\nno " in text  # what the environment answers
    # A turn ends with the token that has a stop string of the environment.
    stopped = []
    for row, mask in zip(batch["targets"], own, strict=True):
        for sampled, pairs in itertools.groupby(zip(row.tolist(), mask, strict=True), lambda pair: pair[1]):
            if sampled:
                *words, last = [small_chat_tokenizer.decode([id]) for id, _ in pairs]
                assert not {"e", "i"} & set("".join(words))
                stopped.append({"e", "i"} & set(last))
    assert any(stopped)
    # Rewards of a turn and those after it, less the mean of the group: they add up to 0 over the group's first turns.
    first = [row[mask][0] for row, mask in zip(batch["advantages"], own, strict=True)]
    np.testing.assert_allclose(np.reshape(first, (2, 4)).sum(1), 0, atol=1e-6)
    assert played.figures["turns"] > 1
    # Groups whose episodes differ in a turn alone, and not in the sum, are not replaced.
    rounds = []

    def play(engine, episodes, sampling):
        rounds.append(len(episodes))
        for number, one in enumerate(episodes):
            one.rewards, one.end = ([0.1, 0.0], [0.0, 0.1])[number % 2], "turns"

    monkeypatch.setattr(rollouts, "_player", types.SimpleNamespace(play=play))
    rollouts.options = dataclasses.replace(rollouts.options, max_rounds=2)
    rollouts._groups(None, 0)
    assert rounds == [8]


def test_off_policy_episodes_are_of_the_parameters_before(small_chat_tokenizer, tmp_path, monkeypatch):
    """Log-probabilities are those of the policy that sampled, and a checkpoint's episodes lead to the same bits."""
    monkeypatch.setattr(games, "tasks", only_echo)
    options = {"off_policy": True, "eval_every_steps": 0}
    config = from_config_dict(make_config(small_chat_tokenizer, tmp_path, **options))
    inputs = run.open_inputs(config)
    program, rollouts = inputs.program, inputs.rollouts
    play = rollouts.play
    rollouts.play = lambda step, params: dataclasses.replace(play(step, params), tasks=[f"task {step}"] * 8)
    params = jax.jit(decoder.init_params, static_argnums=0)(config.model, jax.random.key(1))
    params = jax.device_put(params, shardings_of(program.state.params))
    state = start(params, program.optimizer, program.state)
    for step in range(2):
        sampling = jax.tree.map(jnp.copy, state.params)
        state, metrics = rollouts.update(step, state)
        assert metrics["objective/logprob_gap"] < 1e-5
        assert (metrics["objective/policy_shift"] > 1e-3) == (step > 0)
    assert rollouts.documents(0, [1, 2]) == ["task 0"]  # what a record of the step before the last names
    pending = json.loads(json.dumps(rollouts.pending()))
    batch = RolloutBatch.from_json(pending).arrays
    expected, own = target_logprobs(config.model, sampling, batch)
    np.testing.assert_allclose(batch["sampling_logprobs"][own], expected[own], atol=1e-4)
    assert abs(target_logprobs(config.model, state.params, batch)[0] - expected)[own].mean() > 1e-3
    copied = jax.tree.map(jnp.copy, state)
    state, metrics = rollouts.update(2, state)
    resumed = Rollouts(config.rl, inputs.tokenizer, program, seed=config.seed, steps=STEPS)
    resumed.restore(pending)
    again, same = resumed.update(2, copied)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert metrics["objective/policy_shift"] == same["objective/policy_shift"]
    assert rollouts.pending()["arrays"] == resumed.pending()["arrays"]
    rollouts.options = dataclasses.replace(config.rl, max_logprob_gap=1e-9)
    with pytest.raises(UserError, match="differ by .* more than config.rl.max_logprob_gap 1e-09"):
        rollouts.update(3, state)


@pytest.mark.parametrize(
    ("base_dtype", "off_policy"), [("float32", True), pytest.param("int8", False, marks=pytest.mark.slow)]
)
def test_the_policy_is_an_adapter(play, small_chat_tokenizer, tmp_path, base_dtype, off_policy):
    """The base is frozen and the reference; what is sampled has the log-probabilities of the merged weights."""
    model = preset("tiny", vocab_size=small_chat_tokenizer.vocab_size)
    params = write_model(tmp_path / "base", model, {}, seed=1)
    options = {
        "adapter.rank": 4, "adapter.targets": ("*/query", "*/gate", "*/down"), "adapter.base_dtype": base_dtype,
        "init.checkpoint": str(tmp_path / "base"), "rl.kl": 0.1, "rl.eval_every_steps": 0,
        "rl.off_policy": off_policy,
    }  # fmt: skip
    records = play("run", **options)
    assert all(record["logprob_gap"] < 1e-4 for record in records)
    assert abs(records[0]["kl"]) < 1e-6 < records[-1]["kl"]
    config = from_config_dict(make_config(small_chat_tokenizer, tmp_path, **options))
    adapter = restore_params(tmp_path / "run", lora.abstract_adapter(config.adapter, model, "float32"))
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(adapter)) > 0
    if base_dtype == "int8":
        return
    merged = open_source(tmp_path / "run").restore(decoder.abstract_params(model))
    inputs = run.open_inputs(config)
    batch = inputs.rollouts.play(0, lora.adapt(config.adapter, params, adapter)).arrays
    expected, own = target_logprobs(model, merged, batch)
    np.testing.assert_allclose(batch["sampling_logprobs"][own], expected[own], atol=1e-4)
    base, _ = target_logprobs(model, params, batch)
    assert abs(base - expected)[own].max() > 1e-3


@pytest.mark.slow
def test_distillation_on_the_policys_own_tokens(play, small_chat_tokenizer, tmp_path):
    model = preset("tiny", vocab_size=small_chat_tokenizer.vocab_size, num_hidden_layers=1)
    write_model(tmp_path / "teacher", model, {}, seed=1)
    options = {"distill.teacher": str(tmp_path / "teacher"), "distill.reverse": True, "train.steps": 8}
    records = play("run", **options)
    assert all(record["logprob_gap"] < 1e-4 for record in records)
    assert records[-1]["divergence"] < records[0]["divergence"]


class Hangs(Echo):
    numbers = itertools.count()

    def step(self, action):
        if next(self.numbers) % 4 == 0:
            threading.Event().wait()  # for ever
        return super().step(action)


class Dies(Echo):
    def reset(self):
        raise SystemExit("no database")


class Nan(Echo):
    """Every fourth episode goes on when all others have ended, and then gets what is no finite number."""

    numbers, bad = itertools.count(), itertools.cycle([float("nan"), "much", None, 1e999])

    def reset(self):
        self.goes_on, self.turn = next(self.numbers) % 4 == 0, 0
        return super().reset()

    def step(self, action):
        self.turn += 1
        reward = next(self.bad) if self.turn > 1 else min(len(action), 9) / 10
        return Step(observation="x", verdict="", reward=reward, done=not self.goes_on)


class Long(Echo):
    def step(self, action):
        return Step(observation="word " * 100, verdict="", reward=len(action) / 10)


class Equal(Echo):
    def step(self, action):
        return Step(observation="x", verdict="", reward=0.1)


@pytest.mark.parametrize(
    ("environment", "options", "counted"),
    [
        pytest.param(Hangs, {"environment_seconds": 0.3}, "episodes/failed", marks=pytest.mark.slow),
        (Nan, {}, "episodes/failed"),
        pytest.param(Long, {}, "episodes/cut", marks=pytest.mark.slow),
        pytest.param(Equal, {"max_rounds": 2, "group_size": 8}, "equal_groups", marks=pytest.mark.slow),
    ],
)
def test_bad_environments_are_counted(play, environment, options, counted):
    records = play("run", environment, **options)
    assert len(records) == STEPS
    assert sum(record[counted] for record in records) > 0
    assert all(np.isfinite(record["loss"]) for record in records)
    if environment is Equal:
        assert {record["grad_norm"] for record in records} == {0.0}


class Once(Echo):
    """Ends after one answer, however long it is."""

    def step(self, action):
        return dataclasses.replace(super().step(action), done=True)


class Scored(Echo):
    """Rewards of the whole state, as InterCode's: 0.6 after the first turn, all later ones repeat it."""

    cumulative_rewards = True

    def step(self, action):
        return Step(observation="x", verdict="wrong answer", reward=0.6)


def test_an_answer_that_the_end_of_the_row_cuts_is_truncated(play):
    """Also where the environment ends the episode with it."""
    options = {"mask_truncated": True, "data.sequence_length": 32, "train.steps": 1}
    (record,) = play("cut", Once, max_new_tokens=64, **options)
    assert record["episodes/cut"] == 8
    assert record["grad_norm"] == 0
    (record,) = play("whole", Once, max_new_tokens=2, **options)
    assert record["episodes/cut"] == 0
    assert record["grad_norm"] > 0


class Solved(Echo):
    def step(self, action):
        return Step(observation="x", verdict="passed", reward=1)


def test_a_score_of_the_state_counts_once_and_void_episodes_are_not_held_out(play):
    (record,) = play("run", tasks=([Scored()], [Dies(), Solved()]), **{"train.steps": 1})
    assert (record["reward"], record["turns"]) == (pytest.approx(0.6), 2)
    assert record["held_out_success"] == 1


def test_tasks_that_leave_no_room_are_told(play, caplog):
    (record,) = play("run", **{"train.steps": 1, "data.sequence_length": 4})
    assert record["episodes/long"] == 8
    assert "held_out_success" not in record  # no episode is none that failed
    assert "step 1 changes nothing: no task leaves room for an answer" in caplog.text


def test_runs_that_cannot_go_on_say_why(play, tmp_path):
    with pytest.raises(UserError, match="failed in every episode: echo/0: .*no database"):
        play("dead", Dies)
    with pytest.raises(UserError, match="must be a multiple of config.rl.group_size 3"):
        play("groups", group_size=3)
    with pytest.raises(UserError, match="use config.preference.loss, config.train.batch_documents: unset"):
        play("pairs", **{"preference.loss": "dpo", "train.batch_documents": 9})
    with pytest.raises(UserError, match="generation cannot shard the sequence: mesh axis sequence is 2"):
        play("sequence", **{"mesh.sequence": 2, "init.checkpoint": "nowhere"})  # before weights are read
    with pytest.raises(UserError, match="config.rl.environment 'echo' has fewer than two tasks"):
        play("one", tasks=([], [Echo()]))
    with pytest.raises(UserError, match="generation cannot shard the sequence: mesh axis sequence is 2"):
        play("cut", **{"mesh.sequence": 2, "mesh.fsdp": 4})
    assert not (tmp_path / "cut").exists()  # before weights are read


class Changed(Echo):
    content: ClassVar = {"gold": "another answer"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"environment": Changed}, "tasks"), ({"template": "{{ 1 }}"}, "chat template")],
)
def test_a_run_goes_on_with_its_own_tasks_and_template(play, small_chat_tokenizer, tmp_path, changes, named):
    template = tmp_path / "template.jinja"
    template.write_text(small_chat_tokenizer.chat_template)
    options = {"train.steps": 1, "tokenizer.chat_template": str(template)}
    play("run", **options)
    template.write_text(changes.pop("template", template.read_text()))
    with pytest.raises(UserError, match=f"was trained on other data: {named}.* changed since"):
        play("run", **options, **changes)


SCRIPT = """
import pathlib, sys
from lemur_jax.cluster.hosts import choose_platform
choose_platform(1)
from lemur_jax.config import from_json
from lemur_jax.rl.run import open_inputs
from lemur_jax.train.loop import train
from tests.helpers.rl import only_echo
from lemur_jax.rl import games
import json
games.tasks = only_echo
config = from_json(json.loads(pathlib.Path("config.json").read_text()))
train(config, sys.argv[1], open_inputs=open_inputs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("off_policy", [False, True])
def test_a_killed_run_reaches_the_same_bits(small_chat_tokenizer, tmp_path, off_policy):
    config = make_config(small_chat_tokenizer, tmp_path, max_rounds=2, kl=0.1, off_policy=off_policy)
    config.model = {**config.model.to_dict(), "vocab_size": small_chat_tokenizer.vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}

    def start(workdir):
        command = [sys.executable, "-c", SCRIPT, workdir]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    whole, killed = start("whole"), start("killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 2, "kind": "train"' in metrics.read_text()):
        assert killed.poll() is None, killed.stderr.read()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start("killed")
    for process in (whole, again):
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
    params = [final_params(tmp_path / name, STEPS) for name in ("whole", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    records = [
        [record for record in read_metrics(tmp_path / name) if record["kind"] == "train"]
        for name in ("whole", "killed")
    ]
    assert without_clock(records[0]) == without_clock(records[1])

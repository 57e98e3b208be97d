"""`lemur plan --mode rl`: memory and time of trainer and engine on one slice.

It compiles the update with the policy objective, and prefill and decode of the engine. Every time is an estimate.
"""

import dataclasses
import math

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.infer.batching import LANES
from lemur_jax.infer.engine import PROMPTS
from lemur_jax.infer.session import abstract_params
from lemur_jax.models.config import ComputeConfig
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_shards
from lemur_jax.plan.compile import compile_program, device_bytes
from lemur_jax.plan.generate import GeneratePlan, format_generate_plan, plan_generate
from lemur_jax.plan.plan import GIB, Plan, estimate_cost, format_plan, program_plan
from lemur_jax.plan.topologies import described_devices, find_slice
from lemur_jax.rl.config import RlConfig
from lemur_jax.rl.games import longest_episode
from lemur_jax.rl.objective import policy
from lemur_jax.rl.rollouts import engine_rows
from lemur_jax.train.step import build


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlPlan:
    """The cost of a step of `lemur rl`.

    Attributes:
      update: of all episodes.
      engine: prefill of `engine.batch` rows and decode of as many.
      episodes, rows: of a step, and those in decode at a time.
      turns: of each episode at most: what the environment fixes, else `config.rl.max_turns`.
      hbm_sampling: bytes a chip while sampling: the trainer's state, the engine's weights and cache, and temporaries;
        off-policy also what the update needs.
      prompt_tokens, new_tokens: read and sampled in a step, if every episode takes all turns and all tokens.
      prefill_seconds, decode_seconds: of a step; None: a part does not fit.
    """

    update: Plan
    engine: GeneratePlan
    episodes: int
    rows: int
    turns: int
    hbm_sampling: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float | None
    decode_seconds: float | None

    @property
    def fits(self) -> bool:
        limit = self.update.hbm_limit_bytes_per_chip
        return self.update.fits and self.engine.fits and self.hbm_sampling <= limit


def plan_rl(config: RunConfig, topology: str, *, slices: int = 1, prompt_length: int) -> RlPlan:
    """Compiles update, prefill and decode of a config.

    Args:
      config: of `lemur rl`; neither its tokenizer nor its environment is opened.
      topology, slices: as for `plan.plan`.
      prompt_length: tokens of a task. An episode fills the rest of `config.data.sequence_length`.

    Raises:
      UserError: as `plan.plan`, or the prompt leaves no room.
    """
    length, turns = config.data.sequence_length, longest_episode(config.rl)
    if not 0 < prompt_length <= length - turns:
        raise UserError(
            f"--prompt-length {prompt_length} must leave a token for each of the {turns} turns of an episode in"
            f" config.data.sequence_length {length}"
        )
    if config.adapter.rank or config.distill.teacher:
        raise UserError("--mode rl plans no adapter and no teacher: unset adapter.rank and distill.teacher")
    config.rl.check_rows(config.train.batch_rows)
    tpu = find_slice(topology, slices)
    mesh = make_mesh(config.mesh, described_devices(tpu))
    abstract_params(config.model, mesh, config.compute.dtype)  # raises where the engine cannot use the mesh
    program = build(config, mesh, num_sources=1, objective=policy(config.rl))
    compiled = compile_program(program.step, program.state, program.batch, what="the update")
    sizes = {
        "parameters": device_bytes(program.state.params),
        "reference": device_bytes(program.state.frozen),
        "optimizer": device_bytes(program.state.optimizer),
        "batch": device_bytes(program.batch),
    }
    episodes, shards = config.train.batch_rows, batch_shards(mesh)
    update = program_plan(compiled, estimate_cost(compiled, tpu, mesh), tpu, mesh, sizes, episodes * length)
    rows = engine_rows(episodes, shards)
    engine = plan_generate(
        config.model, config.mesh, tpu, batch=rows, prompt_length=prompt_length, cache_length=length,
        dtype=config.compute.dtype,
    )  # fmt: skip
    added = (length - prompt_length) // turns
    prompts = _read_lengths(prompt_length, added, turns, keeps_row=rows == episodes)
    # The prompts of a group's first turn are read once.
    counts = [episodes // config.rl.group_size, *[episodes] * (turns - 1)]
    reads = list(zip(counts, prompts, strict=True))
    prefill_rows = min(rows, PROMPTS * shards)
    chunks = sum(math.ceil(count / prefill_rows) * math.ceil(size / LANES) for count, size in reads)
    new_tokens = min(added, config.rl.max_new_tokens)
    prefill, decode = engine.prefill.step_seconds, engine.decode.step_seconds
    sampling = _hbm_sampling(update, engine, config.compute, config.rl)
    return RlPlan(
        update=update,
        engine=engine,
        episodes=episodes,
        rows=rows,
        turns=turns,
        hbm_sampling=sampling + engine.decode.hbm["kv_cache"] * prefill_rows // rows,
        prompt_tokens=sum(count * size for count, size in reads),
        new_tokens=episodes * turns * new_tokens,
        prefill_seconds=prefill and prefill * prefill_rows / rows * chunks,
        decode_seconds=decode and decode * math.ceil(episodes / rows) * turns * new_tokens,
    )


def _read_lengths(initial: int, added: int, turns: int, keeps_row: bool) -> list[int]:
    """The number of tokens that prefill reads in each turn of an episode.

    The prompt has `initial` tokens in the first turn, and `added` more in each later one. If the episode keeps its row,
    a later turn reads only what follows the whole chunks of the previous prompt.
    """
    prompts = [initial + turn * added for turn in range(turns)]
    if not keeps_row:
        return prompts
    return [initial, *(added + previous - (previous - 1) // LANES * LANES for previous in prompts[:-1])]


def _hbm_sampling(update: Plan, engine: GeneratePlan, compute: ComputeConfig, options: RlConfig) -> int:
    """Bytes a chip while sampling, without the cache of prompts."""
    peak = max(phase.hbm_bytes_per_chip for phase in (engine.prefill, engine.decode))
    if options.off_policy:  # the update runs at the same time
        return peak + sum(update.hbm.values())
    state = sum(update.hbm[kind] for kind in ("parameters", "reference", "optimizer"))
    # The engine reads the trainer's own arrays where the dtypes are the same.
    shared = compute.dtype == compute.param_dtype
    return peak + state - (update.hbm["parameters"] if shared else 0)


def format_rl_plan(plan: RlPlan) -> str:
    """The plan as text."""
    limit = plan.update.hbm_limit_bytes_per_chip / GIB
    lines = [
        f"the update on {format_plan(plan.update)}",
        f"\nthe engine: {format_generate_plan(plan.engine)}",
        f"\n{'FITS' if plan.fits else 'DOES NOT FIT'}: {plan.update.hbm_bytes_per_chip / GIB:.2f} GiB a chip in the"
        f" update, {plan.hbm_sampling / GIB:.2f} GiB while sampling beside the trainer's state, of {limit:.2f} GiB",
    ]
    parts = {
        f"reading {plan.prompt_tokens:,} tokens": plan.prefill_seconds,
        f"sampling {plan.new_tokens:,} tokens": plan.decode_seconds,
        "the update": plan.update.step_seconds,
    }
    if None not in parts.values():
        total = sum(filter(None, parts.values()))
        lines.append(
            f"ESTIMATED step of {plan.episodes} episodes of {plan.turns} turns: {total:.1f} s (not measured)"
        )
        lines += [
            f"  {name:<32}{seconds:10.1f} s  {seconds / total:6.1%}"
            for name, seconds in parts.items()
            if seconds is not None
        ]
    return "\n".join(lines)

"""The `verifiers` library (0.4): our environments as a taskset, and its tasksets for our models.

Taskset, environment and harness are found by the name `lemur-verifiers` (lemur_verifiers.py).
"""

import asyncio
import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator

from lemur_jax.agents.environments import Step
from lemur_jax.agents.episodes import Trace, Turn, open_environments
from lemur_jax.agents.runner import Journal, Running
from lemur_jax.common.errors import UserError

try:
    import httpx
    import verifiers.v1 as vf
    from verifiers.v1.dialects.chat import message_to_wire
    from verifiers.v1.types import content_text
except ImportError as error:
    raise UserError(f"verifiers cannot be imported ({error}): pip install 'lemur_jax[verifiers]'") from error

logger = logging.getLogger(__name__)

# Without this the library runs its own chat program, in a container or installed by `uv`.
_AGENT = {"harness": {"id": "lemur-verifiers"}, "runtime": {"type": "subprocess"}}


class LemurConfig(vf.TasksetConfig):
    """Which of our environments: names as in `lemur eval --agents`, and MINT's or InterCode's directory."""

    agents: str = "sql"
    data: str = "."
    turns: int = 5


class LemurTaskset(vf.Taskset[vf.Task, LemurConfig]):
    """Our environments. A task holds only its name; the environment asks in its first turn."""

    def __init__(self, config: LemurConfig):
        super().__init__(config)
        self.stack = contextlib.ExitStack()
        opened = open_environments(config.agents.split(","), None, config.data, self.stack)
        self.environments = {environment.id: environment for environment in opened}

    def load(self) -> Iterator[vf.Task]:
        for name in self.environments:
            yield vf.Task(vf.TaskData(name=name), self.config.task)


class LemurEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(runtime={"type": "subprocess"})


class LemurEnv(vf.Env[LemurEnvConfig]):
    """An episode: the environment speaks as the user."""

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        environment = copy.copy(self.taskset.environments[task.data.name])  # it holds one episode
        async with agents.agent.interaction(task) as interaction:
            try:
                episode = await asyncio.to_thread(Running, environment, self.config.taskset.turns)
                while not (segment := await interaction.turn(episode.messages[-1]["content"])).terminated:
                    if await asyncio.to_thread(episode.act, segment.last_reply):
                        break
            finally:
                await asyncio.to_thread(environment.close)
        interaction.trace.record_reward("reward", episode.reward)

    async def stop(self) -> None:
        self.taskset.stack.close()


class LemurHarness(vf.Harness[vf.HarnessConfig]):
    """A chat without tools: one request for each turn, from this process."""

    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> vf.ProgramResult:
        messages = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt
        if data.system_prompt is not None:
            messages = [vf.SystemMessage(content=data.system_prompt), *messages]
        body = {"model": ctx.model, "messages": list(map(message_to_wire, messages))}
        async with httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {secret}"}) as client:
            reply = await client.post(f"{endpoint}/chat/completions", json=body)
        return vf.ProgramResult(exit_code=int(reply.is_error), stdout="", stderr=reply.text)


def open_taskset(name: str, limit: int | None = None) -> vf.Env:
    """The environment of a taskset, in which our model plays every agent.

    Raises:
      UserError: there is no such taskset, or it is infinite.
    """
    try:
        fields = vf.env_config_type(name).model_fields
        agents = [key for key, field in fields.items() if isinstance(field.default, vf.AgentConfig)]
        config = vf.resolve_env_config({"taskset": {"id": name}} | dict.fromkeys(agents, _AGENT))
        env = vf.load_environment(config)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the taskset {name!r} of verifiers cannot be loaded: {error}") from error
    if limit is None and not env.taskset.bounded:
        raise UserError(f"the taskset {name!r} is infinite: lemur eval needs a --limit, lemur rl another one")
    return env


def tasks_by_id(name: str, tasks: Iterable[vf.Task]) -> dict[str, vf.Task]:
    """The tasks of a taskset by TASKSET/TASK; a number is appended to a name that occurs twice."""
    by_id: dict[str, vf.Task] = {}
    for index, task in enumerate(tasks):
        id = f"{name}/{task.data.name or task.data.idx}"
        while id in by_id:
            id = f"{id}-{index}"
        by_id[id] = task
    return by_id


def run_taskset(
    name: str,
    base_url: str,
    model: str,
    *,
    max_new_tokens: int,
    limit: int | None,
    batch: int,
    journal: Journal,
) -> list[Trace]:
    """Runs the tasks of a taskset that the journal does not have, greedy; a warning names episodes with an error.

    Args:
      name: of the taskset, as for `vf-eval`; in an environment with several agents the model plays all.
      base_url, model: the endpoint.
      batch: episodes at once.

    Raises:
      UserError: there is no such taskset, it is infinite, or every episode has an error.
    """
    env = open_taskset(name, limit)
    context = vf.ModelContext(
        model=model,
        client=vf.EvalClientConfig(base_url=base_url, api_key_var="OPENAI_API_KEY"),
        sampling=vf.SamplingConfig(temperature=0.0, max_tokens=max_new_tokens),
    )
    tasks = tasks_by_id(name, env.taskset if limit is None else env.taskset.take(limit))
    failed: dict[str, str] = {}

    async def play(id: str, semaphore: asyncio.Semaphore) -> None:
        (slot,) = env.slots(tasks[id])
        episode = await env.run_slot(slot, context, semaphore)
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if errors:
            failed[id] = f"{id}: {errors[0].type}: {errors[0].message}"
            return
        trace_ids = [id, *(f"{id}#{number}" for number in range(2, len(episode.traces) + 1))]
        for trace_id, trace in reversed(list(zip(trace_ids, episode.traces, strict=True))):
            journal.add(_trace(trace_id, trace))  # the first agent's last: it says that all are there

    async def run() -> None:
        semaphore = asyncio.Semaphore(batch)
        async with env.serving():
            await asyncio.gather(*(play(id, semaphore) for id in tasks if id not in journal.traces))

    asyncio.run(run())
    order = {id: number for number, id in enumerate(tasks)}
    positions = {id: order.get(id, order.get(id.rpartition("#")[0], -1)) for id in journal.traces}
    traces = [journal.traces[id] for id in sorted(positions, key=positions.__getitem__) if positions[id] >= 0]
    if failed:
        first_error = next(iter(failed.values()))
        if not traces:
            raise UserError(f"every episode has an error; {first_error}")
        text = "not scored: %d episodes with an error (%s): %s"
        logger.warning(text, len(failed), first_error, ", ".join(failed))
    return traces


def _trace(id: str, trace: vf.Trace) -> Trace:
    exchanges: list[tuple[str, str]] = [("", "")]  # (text of the model, reply to it); the task first
    for message in trace.messages:
        text = content_text(message.content)
        if message.role == "assistant":
            exchanges.append((text, ""))
        else:
            exchanges[-1] = (exchanges[-1][0], f"{exchanges[-1][1]}\n{text}".lstrip("\n"))
    steps = [Step(observation=observation, verdict="unfinished") for _, observation in exchanges[1:-1]]
    verdict = "passed" if trace.reward >= 1 else "wrong answer"
    steps.append(Step(observation=exchanges[-1][1], verdict=verdict, reward=trace.reward))
    # Not strict: a model that never spoke has no turn.
    turns = [Turn(action=text, step=step) for (text, _), step in zip(exchanges[1:], steps, strict=False)]
    return Trace(id=id, task=exchanges[0][1], turns=tuple(turns))

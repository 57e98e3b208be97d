"""Our environments as a taskset of the `verifiers` library (0.4), and the harness that asks a model for each turn.

Taskset, environment and harness are found by the name `lemur-verifiers` (lemur_verifiers.py).
"""

import asyncio
import contextlib
import copy
from collections.abc import Iterator

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

from lemur_jax.agents.episodes import open_environments
from lemur_jax.agents.runner import Running


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

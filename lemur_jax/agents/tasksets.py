"""Tasksets of the `verifiers` library (0.4) as environments.

The library runs an episode and asks an endpoint for each turn. Here the endpoint is a server in this process, in which
a request waits until the agent or the policy has answered.
"""

import asyncio
import contextlib
import http.server
import itertools
import json
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from lemur_jax.agents.environments import Environment, NotScored, Step
from lemur_jax.common.errors import UserError
from lemur_jax.text.chat_template import Message

try:
    import verifiers.v1 as vf
except ImportError as error:
    raise UserError(f"verifiers cannot be imported ({error}): pip install 'lemur_jax[verifiers]'") from error

# Without this the library runs its own chat program, in a container or installed by `uv`.
_AGENT = {"harness": {"id": "lemur-verifiers"}, "runtime": {"type": "subprocess"}}
_STOP_SECONDS = 10.0  # for a taskset that ends


class TasksetServer:
    """A taskset with its event loop, and the endpoint that its agents ask."""

    def __init__(self, env: vf.Env):
        self.env = env
        self.playing: dict[str, TasksetEnvironment] = {}  # by the name of the model that they ask
        self.numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        for run in (self._loop.run_forever, self._http.serve_forever):
            threading.Thread(target=run, daemon=True).start()
        self._open = contextlib.AsyncExitStack()
        self.run(self._open.enter_async_context(self.env.serving())).result()

    def run(self, coroutine: Any) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def context(self, model: str) -> vf.ModelContext:
        client = vf.EvalClientConfig(
            base_url=f"http://127.0.0.1:{self._http.server_port}/v1", api_key_var="OPENAI_API_KEY"
        )
        return vf.ModelContext(model=model, client=client, sampling=vf.SamplingConfig())

    def close(self) -> None:
        """Ends what the taskset serves; the threads end with the process."""
        with contextlib.suppress(Exception):
            self.run(self._open.aclose()).result(_STOP_SECONDS)


class TasksetEnvironment(Environment):
    """A task, whose taskset ends the episode; each copy that is played has its own model name at the endpoint."""

    max_turns = sys.maxsize

    def __init__(self, server: TasksetServer, id: str, task: vf.Task):
        self.id, self._server, self._task, self._key = id, server, task, ""
        self.content = task.data.model_dump(mode="json")

    def reset(self) -> str:
        # Requests of the taskset's agents, each with its reply, and in the end the episode.
        self._events: queue.Queue[tuple[Sequence[Message], Future] | Future] = queue.Queue()
        self._replies: list[Future] = []
        self._key = str(next(self._server.numbers))
        self._server.playing[self._key] = self
        (slot,) = self._server.env.slots(self._task)
        self._episode = self._server.run(self._server.env.run_slot(slot, self._server.context(self._key)))
        self._episode.add_done_callback(self._events.put)
        if (step := self._next()).done:
            raise NotScored(f"{self.id}: its taskset has ended without a turn of the model")
        return step.observation

    def step(self, action: str) -> Step:
        self._reply.set_result(action)
        return self._next()

    def close(self) -> None:
        if self._server.playing.pop(self._key, None):
            self._episode.cancel()
            for reply in self._replies:
                reply.cancel()

    def ask(self, messages: Sequence[Message]) -> str:
        """The answer to a request; CancelledError if there will be none."""
        reply: Future[str] = Future()
        self._replies.append(reply)
        self._events.put((messages, reply))
        return reply.result()

    def _next(self) -> Step:
        """What the model reads next, or how the episode ended; NotScored if it ended in an error."""
        event = self._events.get()
        if not isinstance(event, Future):
            self.conversation, self._reply = event
            roles = [message["role"] for message in self.conversation]
            start = max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=0)
            unread = "\n".join(_text(message["content"]) for message in self.conversation[start:])
            return Step(observation=unread, verdict="unfinished")
        episode = event.result()
        for error in [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]:
            raise NotScored(f"{self.id}: {error.type}: {error.message}")
        reward = sum(trace.reward for trace in episode.traces)
        verdict = "passed" if reward >= 1 else "wrong answer"
        return Step(observation="", verdict=verdict, reward=reward, done=True)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _handler(server: TasksetServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                text = server.playing[body["model"]].ask(body["messages"])
            except (KeyError, CancelledError):  # the episode has been closed, perhaps with its connection
                with contextlib.suppress(OSError):
                    self.send_error(410)
                return
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply | {"choices": [choice]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def taskset_environments(
    name: str, number: int | None, stack: contextlib.ExitStack
) -> list[TasksetEnvironment]:
    """The first tasks of a taskset, which the stack closes; in one with several agents the model plays all.

    Raises:
      UserError: there is no such taskset, or it is infinite and no number is named.
    """
    try:
        fields = vf.env_config_type(name).model_fields
        agents = [key for key, field in fields.items() if isinstance(field.default, vf.AgentConfig)]
        config = vf.resolve_env_config({"taskset": {"id": name}} | dict.fromkeys(agents, _AGENT))
        env = vf.load_environment(config)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the taskset {name!r} of verifiers cannot be loaded: {error}") from error
    if number is None and not env.taskset.bounded:
        raise UserError(f"the taskset {name!r} is infinite: lemur eval needs a --limit, lemur rl another one")
    server = TasksetServer(env)
    stack.callback(server.close)
    tasks = env.taskset if number is None else env.taskset.take(number)
    return [TasksetEnvironment(server, id, task) for id, task in _named(name, tasks)]


def _named(name: str, tasks: Iterable[vf.Task]) -> Iterator[tuple[str, vf.Task]]:
    """Tasks with TASKSET/TASK; the position is appended to a name that occurs twice."""
    names: set[str] = set()
    for index, task in enumerate(tasks):
        id = f"{name}/{task.data.name or task.data.idx}"
        while id in names:
            id = f"{id}-{index}"
        names.add(id)
        yield id, task

"""Tasksets of the `verifiers` library as environments of `lemur rl`.

The library runs an episode and asks an endpoint for each turn. Here the endpoint is a server in this process, in which
a request waits until the policy has answered.
"""

import asyncio
import contextlib
import http.server
import itertools
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from lemur_jax.agents.environments import Environment, Step
from lemur_jax.agents.verifiers_adapter import open_taskset, tasks_by_id, vf


class TasksetServer:
    """A taskset with its event loop and endpoint, which end with the process."""

    def __init__(self, name: str):
        self.env = open_taskset(name)
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


class TasksetEnvironment(Environment):
    """A task; each copy that is played has its own model name at the endpoint."""

    def __init__(self, server: TasksetServer, id: str, task: vf.Task):
        self.id, self._server, self._task = id, server, task
        self.content = task.data.model_dump(mode="json")

    def reset(self) -> str:
        self._events: queue.Queue[Sequence[Mapping[str, Any]] | Future] = queue.Queue()
        self._replies: queue.Queue[str | None] = queue.Queue()
        self._key = str(next(self._server.numbers))
        self._server.playing[self._key] = self
        (slot,) = self._server.env.slots(self._task)
        self._episode = self._server.run(self._server.env.run_slot(slot, self._server.context(self._key)))
        self._episode.add_done_callback(self._events.put)
        return self._next().observation

    def step(self, action: str) -> Step:
        self._replies.put(action)
        return self._next()

    def close(self) -> None:
        if self._server.playing.pop(self._key, None):
            self._episode.cancel()
            self._replies.put(None)

    def asked(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """The policy's answer; None: there will be none."""
        self._events.put(messages)
        return self._replies.get()

    def _next(self) -> Step:
        """What the policy reads next, or how the episode ended."""
        event = self._events.get()
        if not isinstance(event, Future):
            roles = [message["role"] for message in event]
            unread = event[max((i + 1 for i, role in enumerate(roles) if role == "assistant"), default=0) :]
            return Step(observation="\n".join(_text(one["content"]) for one in unread), verdict="unfinished")
        episode = event.result()
        for error in [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]:
            raise RuntimeError(f"{error.type}: {error.message}")
        reward = sum(trace.reward for trace in episode.traces)
        return Step(
            observation="", verdict="passed" if reward >= 1 else "wrong answer", reward=reward, done=True
        )


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _handler(tasks: TasksetServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            environment = tasks.playing.get(body["model"])
            text = environment.asked(body["messages"]) if environment else None
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            self.send_response(410 if text is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply | {"choices": [choice]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def taskset_environments(name: str) -> list[Environment]:
    """The tasks of a taskset.

    Raises:
      UserError: there is no such taskset, or it is infinite.
    """
    server = TasksetServer(name)
    return [TasksetEnvironment(server, id, one) for id, one in tasks_by_id(name, server.env.taskset).items()]

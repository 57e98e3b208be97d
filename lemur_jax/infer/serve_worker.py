"""The thread of `lemur serve` that runs the model, and the queues of its results to the event loop."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from starlette.exceptions import HTTPException

from lemur_jax.infer.engine import Engine
from lemur_jax.infer.session import Session

MAX_WAITING = 1024  # jobs
STOP_SECONDS = 10.0
STEPS = 8  # tokens of each sequence between two checks of the jobs
END = object()


class Job:
    """Work for the worker and the queue of its results.

    Args:
      work: called with the engine; yields results, and None where it needs another step of the engine.
    """

    def __init__(self, work: Callable[[Engine], Generator[Any]]):
        self.dropped = False
        self._work = work
        self._running: Generator[Any] | None = None
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue = asyncio.Queue()

    def advance(self, engine: Engine) -> bool:
        """Runs until the next None, in the worker's thread; returns whether there is more to do."""
        try:
            self._running = self._running or self._work(engine)
            results = () if self.dropped else self._running  # nothing is done for a client that has left
            for result in results:
                if result is None:
                    return True
                self.tell(result)
            self._running.close()
            self.tell(END)
        except Exception as error:
            self.tell(error)
        return False

    def tell(self, result: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)

    async def result(self) -> Any:
        """The next result, or `END`; in the event loop."""
        item = await self._results.get()
        if isinstance(item, Exception):
            raise item
        return item


class Worker:
    """The thread that runs the model: all jobs share one engine."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._new: queue.Queue[Job | None] = queue.Queue()
        self._jobs: list[Job] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name="lemur-serve")
        self._thread.start()

    def _run(self) -> None:
        engine = Engine(self._session)
        while True:
            while not self._jobs or not self._new.empty():
                if (job := self._new.get()) is None:
                    return
                self._jobs.append(job)
            self._jobs = [job for job in self._jobs if job.advance(engine)]
            try:
                engine.step(STEPS)
            except Exception as error:
                for job in self._jobs:
                    job.tell(error)
                self._jobs, engine = [], Engine(self._session)

    def add(self, job: Job) -> None:
        if self._new.qsize() + len(self._jobs) >= MAX_WAITING:
            raise HTTPException(503, f"{MAX_WAITING} requests are waiting already: try again later")
        self._new.put(job)

    def stop(self) -> None:
        """Ends after the current step, waiting at most `STOP_SECONDS`; the jobs are not answered."""
        self._new.put(None)
        self._thread.join(STOP_SECONDS)

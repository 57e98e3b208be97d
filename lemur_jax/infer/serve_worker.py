"""The one thread of `lemur serve` that runs the model, and its results on their way to the event loop."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from starlette.exceptions import HTTPException

MOST_WAITING = 1024  # jobs
STOP_SECONDS = 10.0
END = object()


class Job:
    """Work for the worker and the queue of its results."""

    def __init__(self, work: Callable[[], Generator[Any]]):
        self.dropped = False
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue = asyncio.Queue()

    def run(self) -> None:
        """In the worker's thread."""
        try:
            if not self.dropped:
                with contextlib.closing(self._work()) as results:
                    for result in results:
                        self._tell(result)
                        if self.dropped:
                            return
            self._tell(END)
        except Exception as error:
            self._tell(error)

    def _tell(self, result: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)

    async def result(self) -> Any:
        """The next result, or `END`; in the event loop."""
        found = await self._results.get()
        if isinstance(found, Exception):
            raise found
        return found


class Worker:
    """The thread that runs the model."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lemur-serve")
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()

    def add(self, job: Job) -> None:
        if self._jobs.qsize() >= MOST_WAITING:
            raise HTTPException(503, f"{MOST_WAITING} requests are waiting already: try again later")
        self._jobs.put(job)

    def stop(self) -> None:
        """Ends after the current request, waiting at most `STOP_SECONDS`; the queue is not answered."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self._thread.join(STOP_SECONDS)

"""Google Cloud's notices that a machine is reclaimed: keys of the metadata server, changed before any signal is sent.

In a container, or behind a shell that does not forward signals, no signal may ever arrive.
"""

import logging
import os
import pathlib
import signal
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

logger = logging.getLogger(__name__)

# The server's address, in the variable of Google's own libraries; other machines have no such server.
_HOST, _DEFAULT_HOST = "GCE_METADATA_HOST", "metadata.google.internal"
_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
# https://cloud.google.com/compute/docs/instances/create-use-spot and …/metadata/getting-live-migration-notice
_RECLAIM_VALUES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_WAIT_SECONDS = 60  # the server answers when the value changes, or after this time
_RETRY_SECONDS = 5.0


class Notices:
    """A context in which a notice becomes a SIGTERM of this process; on other machines it does nothing."""

    def __init__(self):
        self.host = os.environ.get(_HOST) or (_DEFAULT_HOST if _is_google() else None)
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> "Notices":
        if self.host:
            for key in _RECLAIM_VALUES:
                threading.Thread(target=self._watch, args=(key,), daemon=True, name=f"notice {key}").start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._closed.set()

    def _watch(self, key: str) -> None:
        value, tag = None, "0"  # no value has this tag: the first answer is immediate
        while not self._closed.is_set():
            previous = value
            try:
                value, tag = self._ask(key, tag)
            except (OSError, HTTPException, UnicodeDecodeError) as error:
                # GKE's own server knows fewer keys; GKE sends SIGTERM.
                if isinstance(error, urllib.error.HTTPError) and error.code in (403, 404):
                    return
                self._closed.wait(_RETRY_SECONDS)
                continue
            if value != previous and value == _RECLAIM_VALUES[key]:
                self._report(f"instance/{key}: {value}", at_start=previous is None)
            if tag == "0":  # a server without tags does not wait either
                self._closed.wait(_RETRY_SECONDS)

    def _ask(self, key: str, tag: str) -> tuple[str, str]:
        """The value and its tag, once the tag differs from `tag`, or after `_WAIT_SECONDS`."""
        query = f"wait_for_change=true&last_etag={tag}&timeout_sec={_WAIT_SECONDS}"
        url = f"http://{self.host}/computeMetadata/v1/instance/{key}?{query}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        # Without a proxy: the server answers this machine alone.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_WAIT_SECONDS + 30) as answer:
            return answer.read(100).decode().strip(), answer.headers.get("ETag", "0")

    def _report(self, notice: str, at_start: bool) -> None:
        with self._lock:  # after the context a signal would kill the process
            if self._closed.is_set():
                return
            if at_start:  # a SIGTERM would stop every start until the machine is gone
                logger.warning("this machine will be taken away soon (%s)", notice)
                return
            logger.warning("this machine is taken away (%s)", notice)
            os.kill(os.getpid(), signal.SIGTERM)


def _is_google() -> bool:
    try:
        return _PRODUCT.read_text().startswith("Google")
    except OSError:
        return False

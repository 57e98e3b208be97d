"""Google's notices that it takes a machine: keys of the metadata server, which turn before any signal is sent.

In a container, or behind a shell that does not pass signals on, no signal may ever come.
"""

import os
import pathlib
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

# Where the server is, in the words of Google's own libraries; on any other machine than theirs nothing is asked.
_HOST, _DEFAULT_HOST = "GCE_METADATA_HOST", "metadata.google.internal"
_PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
# https://cloud.google.com/compute/docs/instances/create-use-spot and …/metadata/getting-live-migration-notice
_TAKEN = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
# The server answers when the value changes, or after so long.
_WAIT_SECONDS = 60
_RETRY_SECONDS = 5.0


class Notices:
    """A context in which a notice becomes a SIGTERM of this process and a line on stderr; elsewhere it does nothing.

    Args:
      host: of the metadata server; default: from the environment, or Google's where this is a machine of theirs.
    """

    def __init__(self, host: str | None = None):
        self._host = host or os.environ.get(_HOST) or (_DEFAULT_HOST if _is_google() else None)
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> "Notices":
        if self._host:
            for key in _TAKEN:
                threading.Thread(target=self._watch, args=(key,), daemon=True, name=f"notice {key}").start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._closed = True

    def _watch(self, key: str) -> None:
        value, tag = None, "0"  # no value has this tag: the first answer comes at once
        while not self._closed:
            before = value
            try:
                value, tag = self._ask(key, tag)
            except urllib.error.HTTPError as error:
                # GKE's own server knows fewer keys; its SIGTERM comes all the same.
                if error.code in (403, 404):
                    return
                time.sleep(_RETRY_SECONDS)
                continue
            except (OSError, HTTPException, UnicodeDecodeError):
                time.sleep(_RETRY_SECONDS)
                continue
            if value != before and value == _TAKEN[key]:
                self._tell(f"instance/{key}: {value}", stood=before is None)
            if tag == "0":  # a server that gives no tags does not wait either
                time.sleep(_RETRY_SECONDS)

    def _ask(self, key: str, tag: str) -> tuple[str, str]:
        """The value and its tag, once that is another one, or after `_WAIT_SECONDS`."""
        query = f"wait_for_change=true&last_etag={tag}&timeout_sec={_WAIT_SECONDS}"
        url = f"http://{self._host}/computeMetadata/v1/instance/{key}?{query}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        # Without a proxy: the server answers this machine alone.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_WAIT_SECONDS + 30) as answer:
            return answer.read(100).decode().strip(), answer.headers.get("ETag", "0")

    def _tell(self, notice: str, stood: bool) -> None:
        with self._lock:  # past the end of the context the signal would end the process at once
            if self._closed:
                return
            when = "will be taken away soon" if stood else "is taken away"
            print(f"lemur train: this machine {when} ({notice})", file=sys.stderr, flush=True)
            # A run that was started on a machine about to go is not stopped again and again until it has gone.
            if not stood:
                os.kill(os.getpid(), signal.SIGTERM)


def _is_google() -> bool:
    try:
        return _PRODUCT.read_text().startswith("Google")
    except OSError:
        return False

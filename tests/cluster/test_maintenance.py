"""Google's notices against a server that answers as theirs does."""

import signal
import threading
import time

import pytest

from lemur_jax.cluster import maintenance
from lemur_jax.cluster.preemption import Interruption
from tests.helpers.metadata_server import serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(maintenance, "_RETRY_SECONDS", 0.01)
    with serving() as server:
        monkeypatch.setenv("GCE_METADATA_HOST", server.host)
        yield server


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watching():
    return {thread for thread in threading.enumerate() if thread.name.startswith("notice ")}


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_is_a_sigterm(server, key, value, caplog):
    server.failing = 2
    with Interruption(0) as interruption:
        until(lambda: len(server.asked) == 6)  # the two that failed, and each key's value and its change
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # nothing ends for that
        until(lambda: len(server.asked) == 7)
        assert not interruption.should_stop()
        server.set(key, value)
        until(lambda: interruption.requested)
        assert interruption.should_stop()
    assert caplog.messages == [f"this machine is taken away (instance/{key}: {value})"]


def test_a_notice_after_the_run_ends_nothing(server, caplog):
    heard, before = [], watching()
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with Interruption(0):
            until(lambda: len(server.asked) == 4)
        server.set("preempted", "TRUE")
        server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        until(lambda: watching() <= before)  # both have got it, and went
    finally:
        signal.signal(signal.SIGTERM, old)
    assert heard == []
    assert not caplog.messages


def test_a_server_without_the_keys_is_left_alone(server):
    server.values.clear()
    before = watching()
    with Interruption(0) as interruption:
        until(lambda: len(server.asked) == 2)
        until(lambda: watching() <= before)
        assert not interruption.requested
    assert sorted(server.asked) == ["maintenance-event", "preempted"]


def test_no_server_is_asked_on_other_machines(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(maintenance, "_PRODUCT", tmp_path / "none")
    assert maintenance.Notices().host is None
    (tmp_path / "none").write_text("Google Compute Engine\n")
    assert maintenance.Notices().host == "metadata.google.internal"


def test_a_notice_that_stood_before_is_said_and_stops_nothing(server, caplog, monkeypatch):
    monkeypatch.setattr(maintenance, "_WAIT_SECONDS", 0.1)  # the server gives the same value again and again
    server.set("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    with Interruption(0) as interruption:
        until(lambda: min(map(server.asked.count, ("maintenance-event", "preempted"))) > 3)
        assert not interruption.should_stop()
        server.set("maintenance-event", "NONE")
        server.set("preempted", "TRUE")
        until(lambda: interruption.requested)
    assert [line.split(" (")[0] for line in caplog.messages] == [
        "this machine will be taken away soon",
        "this machine is taken away",
    ]

"""Barriers of a save between two hosts, on a key-value store of the test's own."""

import threading

import pytest

from lemur_jax.checkpoint import together
from lemur_jax.checkpoint.together import ElsewhereError, SaveBarriers

START, END = "ThreadSaveMultiHostValueHolder:set_value_start", "ThreadSaveMultiHostValueHolder:set_value_end"
WRITTEN, COMMITTED = "_async_write_complete.7", "_async_commit_complete.7"


class Store(dict):
    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self
        self[key] = value

    def key_value_dir_get(self, place):
        return [(key, value) for key, value in list(self.items()) if key.startswith(place)]

    def key_value_delete(self, place):
        for key in [key for key in self if key.startswith(place)]:
            del self[key]


@pytest.fixture
def hosts(monkeypatch):
    """The barriers of two hosts, each of which is a thread of its number's name."""
    monkeypatch.setattr(together.watchdog, "process", lambda: (int(threading.current_thread().name), 2))
    monkeypatch.setattr(together, "_FAILURE_SECONDS", 0.3)
    store, made = Store(), []
    for _ in range(2):
        monkeypatch.setattr(together, "_managers", iter([5]))
        made.append(SaveBarriers(store))
    return made


def run(hosts, *parts):
    """What each host's part raises, or returns."""
    results = {}

    def call(host):
        try:
            results[host] = parts[host](hosts[host])
        except Exception as error:
            results[host] = error

    threads = [threading.Thread(target=call, args=(host,), name=str(host)) for host in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return [results[host] for host in range(2)]


def save(barriers, written=True, committed=True):
    """As Orbax goes through a save and its end."""
    barriers.begin()
    barriers(key=START, timeout_ms=20_000)
    barriers(key=END, timeout_ms=20_000)
    try:
        if not written:
            raise OSError("no room")
        barriers(key=WRITTEN, timeout_ms=20_000)
        if not committed:
            raise OSError("no rights")
        barriers(key=COMMITTED, timeout_ms=20_000)
    finally:
        barriers(key=START, timeout_ms=20_000)
        barriers(key=END, timeout_ms=20_000)
    return "saved"


@pytest.mark.parametrize(("fault", "reason"), [("written", "no room"), ("committed", "no rights")])
@pytest.mark.parametrize("bad", [0, 1])
def test_who_waits_learns_at_once_that_another_failed_and_why(hosts, fault, reason, bad):
    parts = [save, save]
    parts[bad] = lambda barriers: save(barriers, **{fault: False})
    for _ in range(3):
        results = run(hosts, *parts)
        assert isinstance(results[bad], OSError)
        assert isinstance(results[1 - bad], ElsewhereError)
        assert str(results[1 - bad]) == f"host {bad}: OSError: {reason}"
        assert run(hosts, save, save) == ["saved", "saved"]


def test_both_fail_each_by_its_own_error(hosts):
    results = run(hosts, lambda b: save(b, written=False), lambda b: save(b, written=False))
    assert [str(result) for result in results] == ["no room", "no room"]


def failed(barriers):
    barriers.begin()
    return barriers.fail(OSError("no room"))


def test_a_save_that_no_host_could_begin_is_known_everywhere(hosts):
    assert run(hosts, failed, failed) == [True, True]
    assert run(hosts, save, save) == ["saved", "saved"]


def test_a_host_that_waits_elsewhere_does_not_know(hosts):
    assert run(hosts, failed, lambda barriers: barriers.begin()) == [False, None]


def test_a_host_that_never_comes_is_named(hosts):
    def alone(barriers):
        barriers.begin()
        barriers(key=START, timeout_ms=100)

    late, _ = run(hosts, alone, lambda barriers: barriers.begin())
    assert isinstance(late, TimeoutError)
    assert str(late) == "no sign of host 1 within 0.1 s"


def test_what_was_said_of_old_saves_is_forgotten(hosts):
    for _ in range(5):
        assert run(hosts, save, save) == ["saved", "saved"]
    store = hosts[0]._service
    assert {key.split("/")[3] for key in store} == {"4", "5"}


def test_one_process_waits_for_nobody():
    barriers = SaveBarriers()
    assert save(barriers) == "saved"
    assert barriers.fail(OSError("no room"))

"""Who is lost and what is said about it, against a store and a clock that the test turns."""

import socket
import threading

import pytest

from lemur_jax.checkpoint.metadata import Damaged
from lemur_jax.cluster import coordination, hosts
from lemur_jax.cluster.watchdog import Watch, host_watchdog
from lemur_jax.common.errors import UserError


class Store:
    """The key-value store of jax.distributed, in one process."""

    def __init__(self):
        self.values = {}
        self.down = False

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        self._answer()
        directory = prefix.rstrip("/") + "/"  # a key is not in a directory of its own name
        return [(key, value) for key, value in sorted(self.values.items()) if key.startswith(directory)]

    def _answer(self):
        if self.down:
            raise RuntimeError("UNAVAILABLE")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def run():
    store, clock = Store(), Clock()
    return store, clock, [Watch(store, me, 3, 10.0, clock) for me in range(3)]


def test_hosts_that_beat_are_left_alone(run):
    _, clock, watches = run
    for _ in range(50):
        clock.now += 3
        assert [watch.look() for watch in watches] == [None] * 3


def test_silent_host_is_named_to_everybody(run):
    _, clock, watches = run
    for watch in reversed(watches):
        watch.look()
    for _ in range(3):
        clock.now += 3
        assert [watch.look() for watch in watches[:2]] == [None] * 2
    clock.now += 2
    verdict = watches[0].look()
    assert verdict == f"host 2 ({socket.gethostname()}) has not been heard of for 10 s"
    # Also to one whose own patience is longer, and to the lost one when it wakes up.
    assert Watch(watches[0]._service, 1, 3, 1e9, clock).look() == verdict
    assert watches[2].look() == verdict


def test_host_that_never_came_is_lost_too(run):
    _, clock, watches = run
    for _ in range(2):
        assert watches[0].look() is None
        assert watches[1].look() is None
        clock.now += 5
    assert watches[0].look() == "host 2 has not been heard of for 10 s"


def test_host_that_has_left_may_be_silent(run):
    _, clock, watches = run
    watches[2].look()
    watches[2].leave()
    for _ in range(20):
        clock.now += 3
        assert [watch.look() for watch in watches[:2]] == [None] * 2


@pytest.mark.parametrize("kind", [UserError, Damaged])  # a kind of it ends the others with its status too
def test_failure_of_one_host_ends_the_others_at_once_with_its_words(run, kind):
    _, _, watches = run
    watches[1].look()
    watches[1].leave(kind("store s/code\nis unreadable"))
    assert watches[2].look() == "host 1 failed: UserError: store s/code is unreadable"


def test_coordinator_that_does_not_answer_is_named(run):
    store, clock, watches = run
    watches[1].look()
    store.down = True
    clock.now += 9
    assert watches[1].look() is None
    clock.now += 1
    assert watches[1].look() == "host 0, which coordinates, has not answered for 10 s"
    watches[1].leave(ValueError())  # does not raise


def test_barrier_names_who_is_missing(run, monkeypatch):
    store, _, watches = run
    watches[2].look()
    monkeypatch.setattr(coordination, "process", lambda: (0, 3))
    monkeypatch.setattr(coordination, "client", lambda: store)
    with pytest.raises(UserError, match=r"barrier 'saved': no sign of host 1, host 2 \(.+\) within 0.1 s"):
        coordination.barrier("saved", 0.1)


def test_barrier_opens_when_all_have_come(run, monkeypatch):
    store, _, _ = run
    mine = threading.local()
    monkeypatch.setattr(coordination, "process", lambda: (mine.me, 3))
    monkeypatch.setattr(coordination, "client", lambda: store)
    # Every host counts its barriers alike; here they share a process and so a counter.
    monkeypatch.setattr(coordination, "_exchanges", iter([0] * 3))
    through = []

    def come(me):
        mine.me = me
        coordination.barrier("start", 5)
        through.append(me)

    threads = [threading.Thread(target=come, args=[me]) for me in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(through) == [0, 1, 2]


def test_one_host_needs_nobody():
    """Neither a barrier without time to wait nor a watch over nobody holds one process up or leaves a thread."""
    threads = threading.active_count()
    assert coordination.barrier("alone", 0) is None
    assert hosts.agree("alone", None) is None
    with host_watchdog(1):
        assert threading.active_count() == threads

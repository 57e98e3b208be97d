"""Requests to stop: which signal asks, and which aborts."""

import os
import signal

import pytest

from lemur_jax.cluster.preemption import Interruption


def test_sigterm_asks_however_often_it_comes():
    with Interruption(0) as interruption:
        assert not interruption.reached()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.reached()
        assert interruption.cause == "SIGTERM"


@pytest.fixture(autouse=True)
def python_takes_sigint():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_asks_and_the_second_aborts(capfd):
    with Interruption(0) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reached()
        assert interruption.cause == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "press it again to abort" in capfd.readouterr().err

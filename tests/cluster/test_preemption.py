"""Requests to stop; Ctrl-C is tested in tests/train/test_checkpointing.py."""

import os
import signal

from lemur_jax.cluster.preemption import Interruption


def test_sigterm_asks_however_often_it_comes():
    with Interruption(0) as interruption:
        assert not interruption.should_stop()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.should_stop()
        assert interruption.cause == "SIGTERM"

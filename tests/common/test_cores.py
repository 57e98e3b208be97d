import os

from lemur_jax.common.cores import available_cores


def test_a_job_has_the_cores_that_it_may_use(monkeypatch):
    """Not all of the machine's, as in a Slurm job."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert available_cores() == 2

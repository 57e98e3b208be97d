"""The processes of a run: joining hosts, watchdog, preemption, the lock of a workdir."""

"""Where arrays live: the device mesh, the table of logical axes, and the hosts of a run."""

"""A real SLURM of several nodes on one Debian machine; `python -m tests.cluster` plays with it."""

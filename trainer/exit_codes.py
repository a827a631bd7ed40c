"""What the exit code of `trainer/run.py` tells a scheduler. A process that a signal ends at once has 128 + the signal."""

DONE = 0
"""The run is finished, or has reached --max_steps."""
FAILED = 1
"""An error; starting again may help."""
REFUSED = 2
"""Bad input: starting again would be refused again."""
NOT_FINITE = 3
"""Too many steps in a row were not finite: a restart is bitwise the same run and would come to the same end."""
REQUEUE = 75
"""Stopped by a signal with a checkpoint written: start again to go on (EX_TEMPFAIL of sysexits.h)."""


class NumericalFault(RuntimeError):
    """Numbers are not finite and the run cannot go on; every rank raises it with the same message of one
    line, and ends with `NOT_FINITE`."""

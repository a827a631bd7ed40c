"""What the exit code of `trainer/run.py` tells a scheduler."""

DONE = 0
"""Finished, or stopped at --max_steps."""
FAILED = 1
"""An error; to start again may help."""
REFUSED = 2
"""Bad input: to start again does not help."""
REQUEUE = 75
"""Stopped by a signal after a checkpoint was saved: start again, and the run goes on."""

"""Train a SoME language model.

    deepspeed trainer/run.py --ds_config ds_configs/zero2.json
    torchrun --nproc-per-node 2 trainer/run.py --experiment a4 --set data.path=DIR
    srun python trainer/run.py ...
    python trainer/run.py --list

Everything that can be refused is refused before the process group forms.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # The launchers run this file by path: make the packages beside it importable without an installation, and keep this
    # folder itself from shadowing other modules.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.command_line import parse_arguments
from trainer.console import all_printed, guard_streams
from trainer.exit_codes import DONE, FAILED, NOT_FINITE, REFUSED, NumericalFault
from trainer.launch import Launch
from trainer.listing import print_experiments
from trainer.paths import ensure_home
from trainer.settings import Settings
from trainer.storage import StorageError
from trainer.text import error_line

SECONDS_TO_WAIT_FOR_RANK_0 = 60


def main() -> None:
    """The command line; ends with one of `trainer/exit_codes.py`."""
    guard_streams()
    launch = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        launch = Launch.from_environment()
        arguments = parse_arguments()
        if arguments.list:
            print_experiments()
            if not all_printed():
                sys.exit(FAILED)
            return
        settings = Settings.read(arguments, launch)
        if not arguments.dry_run:  # which keeps nothing
            ensure_home(settings.experiment.data.cache_root())
    except ValueError as error:
        end(error, launch, REFUSED)

    from trainer.training import run  # torch and DeepSpeed take seconds, which no answer above waits for

    try:
        code = run(arguments, settings)
    except ValueError as error:
        end(error, launch, REFUSED)
    except NumericalFault as error:
        end(error, launch, NOT_FINITE)
    except StorageError as error:
        end(error, launch, FAILED)
    if code != DONE:
        # Launchers that see the first rank end send SIGTERM to the others, which are to end with the same code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(code)


def end(error: Exception, launch: Launch, code: int) -> NoReturn:
    """One line and the exit code. Rank 0 speaks for all; the others wait to be ended with it, else they speak up."""
    if launch.rank != 0:
        signal.sigtimedwait([signal.SIGTERM], SECONDS_TO_WAIT_FOR_RANK_0)
    print(error_line(error), file=sys.stderr, flush=True)
    if code in (REFUSED, NOT_FINITE) and "SOME_VERDICT_FILE" in os.environ:
        # slurm/body.sh cannot rely on srun's exit code, which is the highest of all ranks', those that it killed included.
        Path(os.environ["SOME_VERDICT_FILE"]).write_text(str(code), encoding="ascii")
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The flags of `trainer/run.py`."""

import argparse
import difflib
from typing import NoReturn

from trainer.paths import REPOSITORY, local_path
from trainer.plain_yaml import parse_int


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        close = [near for word in message.split() for near in difflib.get_close_matches(word, flags, n=1, cutoff=0.7)]
        hint = f"did you mean {close[0]}? " if close and close[0] not in message else ""
        raise ValueError(f"{message}; {hint}see --help")


def _not_empty(text: str) -> str:
    """What a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def read_paths(arguments: argparse.Namespace, *names: str) -> None:
    """Put local paths in the place of what these flags were given.

    Args:
        arguments: of a parser; changed.
        names: the flags without dashes. What is None stays.

    Raises:
        ValueError: naming the flag.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            setattr(arguments, name, local_path(value, f"--{name}"))


def whole_number(text: str) -> int:
    """As the settings read it; Python itself would take 1_000, too."""
    number = parse_int(text)
    if number is None:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags; everything else is a key of the experiment, changed with --set.

    Raises:
        ValueError: unknown flag, or a value that a flag cannot have.
    """
    parser = Parser(prog="trainer/run.py", description="Train a SoME language model.", allow_abbrev=False)
    parser.add_argument(
        "--ds_config",
        type=_not_empty,
        default=str(REPOSITORY / "ds_configs" / "zero2.json"),
        metavar="FILE",
        help="DeepSpeed JSON: precision and ZeRO stage (default: ds_configs/zero2.json)",
    )
    parser.add_argument(
        "--experiment", type=_not_empty, default="quickstart", metavar="NAME|FILE.yaml", help="what to train; see --list"
    )
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="change one key of the experiment")
    parser.add_argument("--output_dir", type=_not_empty, metavar="DIR", help="the run's folder (default: runs/<experiment>)")
    parser.add_argument(
        "--resume",
        type=_not_empty,
        default="auto",
        metavar="auto|never|DIR",
        help="auto: continue the run in output_dir; never: start anew and move an old run aside",
    )
    parser.add_argument(
        "--max_steps", type=whole_number, metavar="N", help="stop early; the schedule stays the experiment's"
    )
    parser.add_argument("--dry_run", action="store_true", help="print parameters, memory and traffic, and stop")
    parser.add_argument("--list", action="store_true", help="print the shipped experiments, and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    chosen = parser.parse_args(arguments)
    read_paths(chosen, "ds_config", "output_dir", "resume")
    return chosen

"""Paths as people write them: every flag, key and variable that names a file or a folder is read here.

`~` is expanded, also where no shell does it (`--output_dir=~/x`, YAML). Addresses of other storage are refused by name.
Links are followed: what is made or replaced is what they lead to.
"""

import os
import pwd
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

CACHE_VARIABLE = "SOME_CACHE_DIR"
_ADDRESS = re.compile(
    # pathlib makes one slash of two, and some tools write one.
    r"[a-z][a-z0-9+.-]*://|(?:abfss?|adl|az|dbfs|file|ftp|gcs|gs|hdfs|hf|https?|oss|r2|s3|s3a|sftp|wasbs?|webhdfs):/",
    re.IGNORECASE,
)


def local_path(text: str, what: str) -> str:
    """A path as it was written, with `~` and `~user` expanded.

    Args:
        text: as it was written.
        what: the flag, or `key =`, that names it, for errors.

    Raises:
        ValueError: the address of something that is not in the file system, or a home folder that is not known.
    """
    if address := _ADDRESS.match(text):
        scheme = address[0].partition(":")[0].lower()
        cure = "mount that storage or copy it here, and give the local path"
        if scheme == "file":
            cure = f"write the path alone, /{text[5:].lstrip('/')}"
        raise ValueError(f"{what} {text}: is an address ({scheme}), not a local path; {cure}")
    if not text.startswith("~"):
        return text
    user = text[1:].partition("/")[0]
    folder = _home_of(user)
    if folder is None:
        unknown = f"there is no user {user}" if user else f"no home folder is known ({_why_homeless()})"
        raise ValueError(f"{what} {text}: {unknown}; write the whole path, or ./{text} for something of that name")
    return folder.rstrip("/") + text[1 + len(user) :] or "/"


def cache_root(chosen: str | None) -> Path:
    """The folder of tokenised data and compiled kernels; it need not exist.

    Args:
        chosen: `data.cache_dir`.

    Raises:
        ValueError: the variable holds no local path, or nothing says where to.
    """
    if chosen:
        return Path(local_path(chosen, "data.cache_dir ="))
    if os.environ.get(CACHE_VARIABLE):
        return Path(local_path(os.environ[CACHE_VARIABLE], f"{CACHE_VARIABLE} ="))
    folder = _home_of("")
    if folder is None:
        raise ValueError(
            f"{CACHE_VARIABLE} is not set, and no home folder is known to keep the cache in ({_why_homeless()}); set "
            f"{CACHE_VARIABLE} to a writable folder"
        )
    return Path(folder) / ".cache" / "some"


def ensure_home(cache: Path) -> None:
    """Give libraries a home where this process has none: Triton, datasets and matplotlib look for one when imported."""
    if _home_of("") is None:
        os.environ["HOME"] = str(cache.absolute())


def target_of(path: Path) -> Path:
    """Where `path` leads: the same without links; a link to nothing leads to what would be made.

    Raises:
        OSError: links that lead in a circle, or a folder that cannot be entered.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    return Path(os.path.realpath(path))


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there; a link to nothing gets what it names.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        target_of(path).mkdir(parents=True, exist_ok=True)


def _home_of(user: str) -> str | None:
    """The home folder of a user, by default of this one; None where nobody knows it."""
    if not user and os.environ.get("HOME"):
        return os.environ["HOME"]
    try:
        return (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir or None
    except KeyError:
        return None


def _why_homeless() -> str:
    return f"HOME is not set, and user {os.getuid()} has no name"

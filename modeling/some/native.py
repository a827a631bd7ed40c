"""Compiled kernels: C++ sources beside this file, built by the machine's compiler at first use and kept in the cache folder.

They have a plain C interface and need neither torch's headers nor a Python header, so building one takes two seconds.
OpenMP's runtime is the one that torch has loaded, so `torch.set_num_threads` holds for them too.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]


class Unavailable(Exception):
    """Why a kernel cannot be built or used here, in one line."""


@functools.cache
def load_library(source: str, *flags: str) -> ctypes.CDLL:
    """The compiled source.

    Args:
        source: file name in the folder of kernels.
        flags: compiler flags besides the usual ones.

    Raises:
        Unavailable: another system or processor family, no compiler, a compiler that is too old, no writable cache folder.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"it is for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise Unavailable(f"there is no C++ compiler {name}; install g++ (Debian, Ubuntu: apt install g++) or set CXX")
    command = [compiler, *FLAGS, *flags, str(SOURCES / source)]
    try:
        folder = Path(os.environ.get("SOME_CACHE_DIR") or "~/.cache/some").expanduser() / "kernels"
    except RuntimeError:
        raise Unavailable("no home folder is known to keep it in; set SOME_CACHE_DIR") from None
    texts = [path.read_bytes() for path in (SOURCES / source, *sorted(SOURCES.glob("*.h")))]
    digest = hashlib.sha256(b"\n".join([*(word.encode() for word in command[:-1]), *texts])).hexdigest()[:16]
    library = folder / f"{Path(source).stem}-{digest}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _build(command, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"{library} cannot be made or loaded ({error})") from None


def _build(command: list[str], library: Path) -> None:
    """Compile beside the target and rename, so that ranks that do so at once do not see each other's half-written file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        result = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
        if result.returncode:
            reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[-200:])
            raise Unavailable(f"{command[0]} failed: {reason}; a newer compiler may do")
        built.replace(library)

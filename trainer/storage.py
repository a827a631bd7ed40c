"""Writing files so that a power cut leaves the old or the new, and saying so when a disk takes no more."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.paths import target_of

if TYPE_CHECKING:
    import torch

SAFETENSORS_TYPES = {"float32": "F32", "float64": "F64", "int64": "I64", "int32": "I32", "bool": "BOOL"}
"""Torch's types that checkpoints hold, as the format calls them."""


class StorageError(RuntimeError):
    """A run cannot write what it must; the message is one line for the user, with the path and the cure."""


def is_failing(error: OSError) -> bool:
    """Whether the disk is at fault, now, and not what the user chose: then starting again later helps."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def write_file(path: Path, parts: Iterable[bytes | memoryview], half_way: Callable[[], None] = lambda: None) -> None:
    """Write a new file down to the disk, part after part; `half_way` is called when half of it is written.

    Raises:
        OSError: no room, no permission, a broken disk.
    """
    views = [memoryview(part).cast("B") for part in parts]
    half, written = sum(map(len, views)) // 2, 0
    with open(path, "wb") as file:
        for view in views:
            cut = min(max(half - written, 0), len(view))
            file.write(view[:cut])
            if written <= half < written + len(view):
                half_way()
            file.write(view[cut:])
            written += len(view)
        file.flush()
        os.fsync(file.fileno())


def safetensors_parts(tensors: "dict[str, torch.Tensor]") -> list[bytes | memoryview]:
    """The parts of a safetensors file (size of the header, header, data), which share the tensors' memory.

    The library's own writers copy every tensor once or twice, which is what a rank with a large pool has no room for.

    Args:
        tensors: contiguous, on the CPU, of types in `SAFETENSORS_TYPES`.
    """
    header, offset = {}, 0
    # The widest types first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        tensor = tensors[name]
        kind = SAFETENSORS_TYPES[str(tensor.dtype).removeprefix("torch.")]
        ends = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = [memoryview(tensors[name].reshape(-1).numpy().view("uint8")) for name in names if tensors[name].numel()]
    return [len(text).to_bytes(8, "little"), text, *data]


def write_text_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, also after a power cut. A link stays, and what it leads to gets the text."""
    replace_file(target_of(path), [text.encode()])


def replace_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Put a whole new file in the place of `path`, also where that is a link.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    write_file(temporary, parts)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe_free(folder: Path) -> str:
    """`1.2 MB free`, on the disk of `folder`."""
    try:
        return f"{megabytes(shutil.disk_usage(folder).free)} free"
    except OSError as error:
        return f"free space unknown ({error.strerror})"


def megabytes(size: int) -> str:
    """A number of bytes as users read it."""
    return f"{size / 1e6:,.1f} MB"

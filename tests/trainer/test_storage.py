"""Files as they are written: safetensors without a copy of the tensors, and what is called when half is on the disk."""

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.storage import safetensors_parts, write_file


def test_safetensors_are_read_back_by_the_library(tmp_path):
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "a/matrix": torch.randn(5, 7),
        "scalar": torch.tensor(3.5),
        "counts": torch.arange(6).view(2, 3),
        "none": torch.empty(0, 4),
        "narrow": torch.arange(3, dtype=torch.int32),
        "wide": torch.randn(2, 2, dtype=torch.float64),
    }
    path = tmp_path / "file.safetensors"
    parts = safetensors_parts(tensors)
    assert parts[-1].obj.__array_interface__["data"][0] == tensors["flags"].data_ptr(), "no copy is made"
    write_file(path, parts)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape and read[name].equal(tensor)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)


def test_half_way_is_when_half_of_all_parts_is_there(tmp_path):
    for sizes in ([10], [1, 9], [9, 1], [5, 5], [0, 4, 0, 3], [1]):
        parts, seen = [bytes([i] * size) for i, size in enumerate(sizes)], []
        path = tmp_path / "file"
        write_file(path, parts, half_way=lambda seen=seen: seen.append(True))
        assert path.read_bytes() == b"".join(parts) and seen == [True], sizes

"""Where real text lies: the variable SOME_DATA_DIR, else `shared/data` next to the repository."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    default = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("SOME_DATA_DIR") or default)
    if not (folder / "tinystories" / "train.jsonl").exists():
        pytest.skip(f"no real text at {folder}: set SOME_DATA_DIR to a folder with tinystories/ and wikitext2/")
    return folder

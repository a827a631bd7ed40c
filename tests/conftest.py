"""What all tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Tokenised data of this session."""
    return tmp_path_factory.mktemp("cache")

"""Imported by nothing but the process that `tests/refusals.py` forks its children from: does once what each would do."""

from pathlib import Path

import tests.refusals  # noqa: F401
from tests.launch import FP32
from trainer.engine import check_ds_config
from trainer.published import published_ids
from trainer.text import read_json

published_ids()
check_ds_config(FP32, read_json(Path(FP32), FP32))

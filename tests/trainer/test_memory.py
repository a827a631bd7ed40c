"""Freed memory goes back to the system when it has added up, and not before."""

import pytest

from trainer import memory


@pytest.mark.parametrize(
    ("grown", "slack", "trims"),
    [(memory.SLACK_BYTES, (), 0), (memory.SLACK_BYTES + 1, (), 1), (0, (0,), 0), (1, (0,), 1)],
)
def test_trims_once_the_process_has_grown(monkeypatch, grown, slack, trims):
    resident = iter([1000, 1000 + grown, 1000, 1000])
    monkeypatch.setattr(memory.FreedMemory, "_measure", lambda self: next(resident))
    freed, calls = memory.FreedMemory(), []
    freed._trim = calls.append
    freed.release(*slack)
    freed.release(*slack)
    assert calls == [0] * trims


def test_measures_this_process():
    assert 10 * 2**20 < memory.FreedMemory()._measure() < 2**40

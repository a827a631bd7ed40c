"""One live run a folder."""

import errno
import fcntl
import multiprocessing
import os
import socket

import pytest

from trainer import lock
from trainer.lock import FolderLock
from trainer.storage import StorageError


def _hold(folder, ready) -> None:
    held = FolderLock(folder, create=True)
    held.sign()
    ready.send(os.getpid())
    ready.recv()


def test_another_live_run_is_named_and_a_dead_one_is_no_hindrance(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    pid = ours.recv()
    for create in (True, False):
        with pytest.raises(ValueError) as refused:
            FolderLock(tmp_path, create)
        said = str(refused.value)
        assert said.startswith(f"--output_dir {tmp_path}: belongs to a live run (host {socket.gethostname()} process {pid} ")
        assert "since 20" in said and said.endswith("wait for its end, stop it, or give another --output_dir")
    process.kill()
    process.join()
    taken = FolderLock.existing(tmp_path)
    assert f"process {pid} " in (tmp_path / ".lock").read_text(), "it tells that the run failed, until another has signed"
    with pytest.raises(ValueError, match="just starting"):
        FolderLock(tmp_path, create=False)
    taken.sign()
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    taken.release()
    assert (tmp_path / ".lock").read_text() == ""
    FolderLock(tmp_path, create=False).release()


def test_looking_for_a_lock_leaves_nothing(tmp_path):
    assert FolderLock.existing(tmp_path) is None and FolderLock.existing(tmp_path / "none") is None
    assert not list(tmp_path.iterdir())


def test_a_dead_node_keeps_its_lock_for_a_while(tmp_path, monkeypatch, capsys):
    """Where the owner ran on another host, wait for the server of files to notice that it is gone."""
    held = FolderLock(tmp_path, create=True)
    (tmp_path / ".lock").write_text("host elsewhere process 7 since then")
    with monkeypatch.context() as patch:
        patch.setattr(lock, "LEASE_SECONDS", 0.01)
        with pytest.raises(ValueError, match="live run .host elsewhere process 7"):
            FolderLock(tmp_path, create=False)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: held.release())
    assert FolderLock.existing(tmp_path) is not None
    assert capsys.readouterr().out.count("waiting up to") == 2


def test_an_earlier_start_of_the_same_job_is_no_refusal(tmp_path, monkeypatch):
    """A job that is refused is not started again; one whose cut-off rank 0 still lives has to be."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    held = FolderLock(tmp_path, create=True)
    held.sign()
    for job, error in (("12", StorageError), ("1", ValueError), ("123", ValueError)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(error, match="of SLURM job 12 since"):
            FolderLock(tmp_path, create=False)


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    FolderLock(tmp_path, create=True).sign()
    assert capsys.readouterr().out.count("no lock can be held here (No locks available)") == 1

"""Paths as people write them, and machines where nobody has a home."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch import FP32, REPOSITORY, SCRIPT, environment
from tests.refusals import MET, TINY, call, sets
from trainer.config import load_experiment
from trainer.paths import cache_root, local_path, make_folder, target_of

HOMELESS = """
import pwd

def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = getpwuid
"""
"""A user without a name, as `docker --user` makes one."""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_tilde_is_a_home_folder(home, monkeypatch):
    me = pwd.getpwuid(os.getuid())
    for text, path in {
        "~": home,
        "~/x": home / "x",
        f"~{me.pw_name}/x": Path(me.pw_dir) / "x",
        "a/~/x": Path("a/~/x"),
        "./~": Path("./~"),
        "x~": Path("x~"),
        "C:/x": Path("C:/x"),
        "a:b/x": Path("a:b/x"),
    }.items():
        assert Path(local_path(text, "--flag")) == path
    monkeypatch.setenv("HOME", "/")
    assert local_path("~/x", "--flag") == "/x" and local_path("~", "--flag") == "/"
    monkeypatch.setenv("HOME", "")
    assert local_path("~/x", "--flag") == f"{me.pw_dir}/x"


def test_keys_of_files_and_of_the_command_line_have_homes(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    file = home / "my.yaml"
    file.write_text("data: {name: text, path: ~/texts, cache_dir: ~/c}")
    data = load_experiment("~/my.yaml", ["data.tokenizer_from=~/t"]).data
    assert (data.path, data.cache_dir, data.tokenizer_from) == tuple(str(home / name) for name in ("texts", "c", "t"))
    assert data.cache_root() == home / "c"
    monkeypatch.setenv("SOME_CACHE_DIR", "~/v")
    assert cache_root(None) == home / "v" and cache_root("~/w") == home / "w"
    for address in ("s3://b/x", "file:///x"):
        file.write_text(f"data: {{name: text, path: '{address}'}}")
        with pytest.raises(ValueError, match=f"data.path = {address}: is an address"):
            load_experiment(str(file))
    # What a file names must still lie beside it, wherever the tilde leads.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/my.yaml").write_text("data: {name: text, path: ~/texts}")
    with pytest.raises(ValueError, match="lies outside of the file's folder"):
        load_experiment("my.yaml")


def test_a_run_goes_to_a_home_folder(home, tmp_path, cache_dir):
    box = tmp_path / "box"
    box.mkdir()
    (box / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = ["--experiment", "tiny.yaml", "--ds_config", FP32, *sets(f"data.cache_dir={cache_dir}")]
    for text in ("~/x", f"{home}/../home/y/../x"):
        assert call(*flags, f"--output_dir={text}", folder=box, HOME=str(home)).code == MET
    assert os.listdir(box) == ["tiny.yaml"] and (home / "x/config.yaml").exists()


def test_where_links_lead(tmp_path):
    (tmp_path / "link").symlink_to("a/b")
    assert target_of(tmp_path / "link") == tmp_path / "a/b"
    make_folder(tmp_path / "link/c")
    make_folder(tmp_path / "link")
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="symbolic links"):
        make_folder(tmp_path / "circle/x")


def homeless(tmp_path: Path, words: list[str], **variables: str) -> subprocess.CompletedProcess:
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site/sitecustomize.py").write_text(HOMELESS)
    names = ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME", "SOME_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")
    settings = {key: value for key, value in environment().items() if key not in names}
    settings |= {"PYTHONPATH": str(tmp_path / "site")} | variables
    return subprocess.run([sys.executable, *words], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)


def test_nobody_without_a_home_is_told_what_to_set(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    flags = [SCRIPT, "--experiment", "tiny.yaml", "--ds_config", FP32, "--output_dir", "r", "--max_steps", "1"]
    refused = homeless(tmp_path, flags)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout, refused
    assert "error: SOME_CACHE_DIR is not set, and no home folder is known" in refused.stderr
    assert "(HOME is not set, and user " in refused.stderr and "set SOME_CACHE_DIR to a writable folder" in refused.stderr
    assert not (tmp_path / "r").exists() and not (tmp_path / "~").exists()
    asked = homeless(tmp_path, [*flags, "--output_dir=~/r"], SOME_CACHE_DIR=str(tmp_path / "cache"))
    assert asked.returncode == 2 and "--output_dir ~/r: no home folder is known" in asked.stderr
    assert homeless(tmp_path, [*flags, "--dry_run"]).returncode == 0, "which keeps nothing"

    done = homeless(tmp_path, [*flags, *sets("log.tensorboard=true")], SOME_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0 and "stopped at step 1: r" in done.stdout and "Traceback" not in done.stderr, done
    words = [str(REPOSITORY / "tools/plan.py"), "tiny.yaml", "--set", "train.batch_size=8", "--json", "p.json"]
    planned = homeless(tmp_path, words)
    assert planned.returncode == 0 and (tmp_path / "p.json").exists(), planned
    assert not (tmp_path / "~").exists()

"""Files that tools write: behind links, to pipes and devices, and refused by flag where that cannot be."""

import json
import os
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.launch import REPOSITORY, environment
from tests.refusals import TINY, give_up_root
from tools import report
from tools.outputs import check_writable, is_stream, write_output
from tools.runs import run_folders

PLAN = [str(REPOSITORY / "tools" / "plan.py"), "tiny.yaml", "--set", "train.batch_size=8"]


@pytest.fixture
def box(tmp_path, monkeypatch) -> Path:
    """A working folder with an experiment, a run that has only begun, and a stand-in for plotly."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/metrics.jsonl").write_text("")
    (tmp_path / "plotly.js").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(box: Path, *words: str, **how) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=box, env=environment(), text=True, timeout=240, **how)


def test_a_link_is_followed_and_stays(box):
    old = box / "store/old"
    old.parent.mkdir()
    old.write_text("old")
    old.chmod(0o640)
    (box / "link").symlink_to("store/old")
    (box / "far").symlink_to("link")
    (box / "new").symlink_to("store/new")
    for name in ("far", "new"):
        check_writable(Path(name), "--json")
        assert not (box / "store/new").exists() or name == "far", "asking leaves nothing behind"
        write_output(Path(name), "text", "--json")
        assert Path(name).is_symlink() and Path(name).read_text() == "text"
    assert stat.S_IMODE(old.stat().st_mode) == 0o640 and (box / "link").is_symlink()
    assert sorted(os.listdir(old.parent)) == ["new", "old"]


def test_pipes_and_devices_are_written_to_and_stay(box):
    os.mkfifo(box / "pipe")
    (box / "link").symlink_to("pipe")
    for name, is_there in (("pipe", True), ("link", True), ("/dev/null", True), ("none", False), ("tiny.yaml", False)):
        assert is_stream(Path(name)) == is_there
    for name in ("pipe", "link"):
        check_writable(Path(name), "--json")  # without waiting for a reader
        with ThreadPoolExecutor() as pool:
            read = pool.submit((box / "pipe").read_text)
            write_output(Path(name), "text", "--json")
            assert read.result() == "text" and stat.S_ISFIFO((box / "pipe").stat().st_mode)
    write_output(Path("/dev/null"), "text", "--json")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_what_cannot_be_written_is_refused_by_flag(box):
    (box / "circle").symlink_to("circle")
    (box / "lost").symlink_to("nowhere/file")
    (box / "folder").symlink_to("runs")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, reason in {
            "circle": "Too many levels of symbolic links",
            "lost": "No such file or directory",
            "folder": "Is a directory",
            "tiny.yaml/x": "Not a directory",
            "socket": "a socket or a disk takes no file",
        }.items():
            for act in (lambda path: check_writable(path, "--json"), lambda path: write_output(path, "text", "--json")):
                with pytest.raises(ValueError, match=rf"--json {name}: cannot be written \({reason}\); choose another"):
                    act(Path(name))
    assert os.readlink(box / "circle") == "circle" and not list(box.glob("**/.tmp-*"))


def test_a_file_whose_folder_takes_no_new_name_is_written_in_place(box):
    (box / "closed").mkdir()
    (box / "closed/file").write_text("old")
    (box / "closed").chmod(0o555)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            give_up_root()
            write_output(Path("closed/file"), "new", "--json")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (box / "closed/file").read_text() == "new"


def test_stdout_as_a_file_is_what_is_printed_to(box):
    """Whatever it is: a pipe, a file with something in it already, or a link to it by another name."""
    (box / "out").symlink_to("/dev/stdout")
    for name in ("/dev/stdout", "/dev/fd/1", "out"):
        done = program(box, *PLAN, "--json", name, capture_output=True)
        assert done.returncode == 0 and not done.stderr
        figures, end = json.JSONDecoder().raw_decode(done.stdout)
        assert figures["options"] and "best " in done.stdout[end:]
    with open(box / "log", "w+") as log:
        log.write("before\n")
        log.flush()
        program(box, *PLAN, "--json", "/dev/stdout", stdout=log)
        text = (box / "log").read_text()
        assert text.startswith("before\n{") and "best " in text and "\0" not in text
    assert (box / "out").is_symlink() and Path("/dev/stdout").is_symlink()


def test_a_report_on_stdout_is_the_page_alone(box):
    words = [str(REPOSITORY / "tools" / "report.py"), "runs", "--plotly", "plotly.js", "-o", "/dev/stdout"]
    done = program(box, *words, capture_output=True)
    assert done.returncode == 0, done
    assert done.stdout.lower().startswith("<!doctype html>") and done.stdout.rstrip().endswith("</html>")
    assert done.stderr == "1 run(s): /dev/stdout\n"
    assert not {"results.csv", "report.md"} & {*os.listdir(box), *os.listdir("/dev")}


def test_a_report_follows_links(box):
    (box / "pages").mkdir()
    (box / "pages/old.html").write_text("old")
    (box / "link.html").symlink_to("pages/old.html")
    (box / "results.csv").symlink_to("pages/table.csv")
    report.main(["runs", "--plotly", "plotly.js", "-o", "link.html"])
    assert (box / "link.html").is_symlink() and "<html" in (box / "pages/old.html").read_text()
    assert (box / "results.csv").is_symlink() and (box / "pages/table.csv").read_text().startswith("run,")
    (box / "again.html").symlink_to("report.md")
    with pytest.raises(SystemExit):
        report.main(["runs", "--plotly", "plotly.js", "-o", "again.html"])


@pytest.mark.parametrize(
    "words",
    [
        ["plan.py", "quickstart", "--json", "s3://bucket/x.json"],
        ["plan.py", "quickstart", "--plot", "gs://bucket/x.png"],
        ["plan.py", "quickstart", "--calibrate", "s3://bucket/x.yaml"],
        ["plan.py", "quickstart", "--usage", "s3://bucket/run"],
        ["report.py", "s3://bucket/runs"],
        ["report.py", "runs", "-o", "s3://bucket/x.html"],
        ["watch.py", "s3://bucket/runs", "--once"],
        ["padding.py", "s3://bucket/run"],
        ["grid.py", "quickstart", "--grid", "seed=0,1", "--output_dir", "s3://bucket/runs"],
        ["study.py", "--output_dir", "s3://bucket/runs"],
        ["reproduce.py", "v3-1-v1", "--output_dir", "s3://bucket/runs"],
        ["bench.py", "--json", "s3://bucket/x.json"],
        ["chaos.py", "--folder", "s3://bucket/runs"],
        ["chaos.py", "--json", "s3://bucket/x.json"],
        ["inspect_experts.py", "s3://bucket/run", "--data"],
        ["inspect_experts.py", "runs/r", "--data", "--html", "s3://bucket/x.html"],
        ["balance.py", "s3://bucket/run"],
    ],
    ids=" ".join,
)
def test_tools_refuse_addresses(box, words, monkeypatch, capsys):
    """In one line; in this process, where imports are paid for once."""
    module = __import__(f"tools.{words[0].removesuffix('.py')}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", words)
    try:
        code = module.main()
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    address = next(word for word in words if "://" in word)
    assert code == 2 and error.count("\n") == 1 and f"{address}: is an address (" in error
    assert sorted(os.listdir(box)) == ["plotly.js", "runs", "tiny.yaml"]


def test_runs_behind_links_are_found_once(box):
    (box / "elsewhere/deep/q").mkdir(parents=True)
    (box / "elsewhere/deep/q/metrics.jsonl").touch()
    (box / "runs/linked").symlink_to("../elsewhere")
    (box / "runs/again").symlink_to("../elsewhere/deep")
    (box / "runs/up").symlink_to("..")
    (box / "runs/self").symlink_to(".")
    (box / "elsewhere/back").symlink_to("../runs")
    (box / "runs/lost").symlink_to("nowhere")
    found = run_folders(Path("runs"))
    assert sorted(path.resolve().name for path in found) == ["q", "r"]
    assert [path.resolve().name for path in run_folders(Path("runs/linked"))].count("q") == 1

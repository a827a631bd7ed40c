"""The live view of runs: where each stands, what it shows at any width, and the served report."""

import http.client
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

from tests.launch import REPOSITORY, environment
from tools import watch
from tools.serve import Page, Server
from tools.snapshots import Snapshot, Watched
from tools.watch import block, duration, render, sparkline
from trainer.config import load_experiment
from trainer.text import MOST_BYTES

START = dict(event="start", step=0, total_steps=10, world_size=2, ep_size=2)
LAYERS = [dict(layer=0, effective_experts=9.5, experts_used=14), dict(layer=1, effective_experts=4.25, experts_used=6)]
EVALUATION = dict(event="eval", step=0, val_loss=5.5, layers=LAYERS, seconds=4.0)


def steps(first: int, last: int, seconds: float = 2.0) -> list[dict]:
    return [
        dict(event="train", step=step, loss=10 / step, tokens_per_second=100.0 * step, seconds=seconds)
        for step in range(first, last + 1)
    ]


def make_run(folder: Path, records: list[dict | str], age: float = 0, lock: str | None = None) -> Path:
    """A run's folder, as the trainer leaves it, that has been silent for `age` seconds."""
    folder.mkdir(parents=True)
    values = load_experiment("quickstart").to_dict()
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "run": {"world_size": 2}}), encoding="utf-8")
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if lock is not None:
        (folder / ".lock").write_text(lock, encoding="utf-8")
    for name in ("config.yaml", "metrics.jsonl"):
        os.utime(folder / name, (time.time() - age,) * 2)
    return folder


def only(root: Path) -> Snapshot:
    (snapshot,) = Watched(root).snapshots()
    return snapshot


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def lock_of(process: int, host: str | None = None) -> str:
    return f"host {host or socket.gethostname()} process {process} since 2026-01-01T00:00:00+00:00"


GOING = [START, EVALUATION, *steps(1, 4)]


@pytest.mark.parametrize(
    ("records", "age", "lock", "status", "why"),
    [
        (GOING, 0, None, "running", ""),
        ([], 0, None, "running", ""),
        (GOING, 500, None, "running", ""),  # less than parallel.timeout_minutes
        (GOING, 700, None, "failed?", "no end, and no line for 0.2 hours"),
        ([START, EVALUATION, *steps(1, 2, seconds=300)], 700, None, "running", ""),  # its steps take long
        ([*GOING, dict(event="end", step=10, finished=True)], 7000, None, "done", ""),
        ([*GOING, dict(event="end", step=4, finished=False)], 0, None, "stopped", "as --max_steps asked"),
        ([*GOING, dict(event="end", step=4, finished=False, stopped_by="SIGTERM on rank 1")], 0, None, "stopped",
         "by SIGTERM on rank 1"),
        (GOING, 0, "ended", "failed", "without an end"),
        (GOING, 0, "ours", "running", ""),
        (GOING, 0, "elsewhere", "running", ""),
        (GOING, 700, "elsewhere", "failed?", "no end"),
        (GOING, 0, "", "running", ""),  # about to be signed, or let go of
    ],
)  # fmt: skip
def test_status(tmp_path, records, age, lock, status, why):
    pid = {"ended": ended_process(), "ours": os.getpid(), "elsewhere": ended_process()}.get(lock)
    text = lock if pid is None else lock_of(pid, "another-host" if lock == "elsewhere" else None)
    make_run(tmp_path / "run", records, age, text)
    snapshot = only(tmp_path)
    assert snapshot.status == status and why in snapshot.why and bool(why) == bool(snapshot.why)


def test_what_a_snapshot_has(tmp_path):
    odd = ["[1, 2]", "not json", '{"event": "train", "step": "four"}', '{"event": "train", "step": %s}' % ("9" * 400),
           '{"event": "train", "step": 4, "loss": null, "seconds": NaN}']  # fmt: skip
    evaluation = EVALUATION | {"step": 2, "val_loss": 4.5, "seconds": 6.0}
    make_run(tmp_path / "run", [START, EVALUATION, *steps(1, 2), evaluation, *steps(3, 3), *odd])
    snapshot = only(tmp_path)
    assert (snapshot.name, snapshot.step, snapshot.total_steps) == ("run", 4, 10)
    assert snapshot.losses[:3] == pytest.approx([10, 5, 10 / 3]) and math.isnan(snapshot.losses[3])
    assert (snapshot.val_loss, snapshot.ranks, snapshot.ep_size, snapshot.experts) == (4.5, 2, 2, 16)
    assert (snapshot.effective_experts, snapshot.dead_experts) == (4.25, 10)
    assert snapshot.tokens_per_second == 200
    # Six steps of two seconds; the evaluation between took six seconds, and four steps were taken.
    assert snapshot.seconds_left == pytest.approx(6 * (2 + 6 / 4))


def test_time_left_spreads_evaluations_and_checkpoints_over_all_steps(tmp_path):
    """Steps of a second, every 500 an evaluation of 60 s, and a checkpoint of 40 s of which training waited 5 s."""
    records = [START | {"total_steps": 10_000}, EVALUATION | {"seconds": 60.0}]
    for step in range(500, 2001, 500):
        records += steps(step - 499, step, seconds=1.0)
        records += [EVALUATION | {"step": step, "seconds": 60.0}]
        records += [dict(event="checkpoint", step=step, seconds=40.0, blocked_seconds=5.0)]
    run = make_run(tmp_path / "run", [*records, *steps(2001, 2001, seconds=30.0)])
    assert only(tmp_path).seconds_left == pytest.approx(7999 * (1 + 65 / 500), rel=1e-3), "right after an evaluation"
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in steps(2002, 2100, seconds=1.0))
    assert only(tmp_path).seconds_left == pytest.approx(7900 * (1 + 4 * 65 / 2100)), "and later"


def test_runs_are_found_below_and_read_again_when_they_change(tmp_path):
    run = make_run(tmp_path / "a" / "seed_0", GOING)
    make_run(tmp_path / "done", [*GOING, dict(event="end", step=10, finished=True)])
    make_run(run / "checkpoints" / "inside", GOING)
    make_run(tmp_path / ".hidden", GOING)
    damaged = make_run(tmp_path / "damaged", GOING)
    (damaged / "config.yaml").write_text("name: [", encoding="utf-8")
    watched = Watched(tmp_path)
    assert [(s.name, s.status) for s in watched.snapshots()] == [
        ("a/seed_0", "running"), ("damaged", "failed"), ("done", "done"),
    ]  # fmt: skip
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(steps(5, 5)[0]) + "\n")
    assert watched.snapshots()[0].step == 5
    assert only(run).name == "."
    with pytest.raises(ValueError, match="no such folder"):
        Watched(tmp_path / "nothing")


@pytest.mark.parametrize("width", [24, 40, 80, 159, 160, 250])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_width_shows_what_matters(tmp_path, width, encoding):
    make_run(tmp_path / ("long_" * 30), GOING)
    make_run(tmp_path / "evil\x1b[2J[red]\u202eoops", [*GOING, dict(event="end", step=4, finished=False, stopped_by="\x07")])
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", newline="")
    console = Console(file=out, width=width)
    console.print(render(Watched(tmp_path).snapshots(), console))
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert not set(text) & set("\x1b\x07\u202e") and "\u00a0" not in text
    lines = text.splitlines()
    if encoding == "utf-8":
        assert max(map(cell_len, lines)) <= width
    else:
        assert text.isascii() and "\\u" not in text.replace("\\u202e", ""), "nothing of ours"
    joined = "".join(text.split())
    for part in ("4/10", "40%", "2.5000", "5.5000", "250", "4.2of16,10dead", "2,EP2"):
        assert part in joined, part
    if width > 24:
        assert "\\x1b[2J[red]" in joined or width == 160
    if width >= 160:
        assert len(lines) == 3, "a row each below the head"


def test_a_low_terminal_counts_what_does_not_fit(tmp_path):
    for number in range(9):
        make_run(tmp_path / f"run_{number}", GOING)
    for width in (60, 200):
        console = Console(file=io.StringIO(), width=width)
        console.print(render(Watched(tmp_path).snapshots(), console, height=8))
        lines = console.file.getvalue().splitlines()
        assert len(lines) <= 8 and "more that do not fit" in lines[-1]
        left_out = int(lines[-1].split()[1])
        assert left_out == 9 - sum(line.startswith("run_") for line in lines) > 0
    console = Console(file=io.StringIO(), width=60)
    snapshot = only(tmp_path / "run_0")
    assert [line.plain for line in block(snapshot, console, False)][0] == ".  running"


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([3.0], "▁"), ([1.0, 8.0], "▁█"), ([4.0, math.nan, 1.0], "█x▁"), ([math.nan], "x"), ([2.0] * 99, "▁" * 16)],
)
def test_sparkline(values, text):
    assert sparkline(values) == text
    assert sparkline(values, ascii_only=True).isascii()


def test_a_sparkline_has_the_means_of_equal_parts():
    assert sparkline([float(v) for v in range(160)]) == "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██"


def test_durations():
    assert [duration(s) for s in (0, 59.4, 60, 3599, 3900, 200000)] == [
        "0 s", "59 s", "1 min", "59 min", "1 h 05 min", "2 d 7 h",
    ]  # fmt: skip


def test_live_view_follows_a_run(tmp_path, monkeypatch):
    run, looks = make_run(tmp_path / "run", GOING), []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(steps(4 + len(looks), 4 + len(looks))[0]) + "\n")

    monkeypatch.setattr(watch.time, "sleep", sleep)
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20, _environ={"TERM": "xterm"})
    with pytest.raises(KeyboardInterrupt):
        watch.watch(Watched(tmp_path), console, 0.5, once=False)
    shown = console.file.getvalue()
    places = [shown.index(f"{step}/10") for step in (4, 5, 6)]
    assert places == sorted(places) and looks == [0.5] * 3
    assert shown.count("\x1b[?1049h") == shown.count("\x1b[?1049l") == 1, "the terminal is as it was before"


def test_command_line(tmp_path, monkeypatch, capsys):
    """Into a pipe it prints one snapshot and ends."""
    make_run(tmp_path / "run", GOING)
    command = [sys.executable, str(REPOSITORY / "tools" / "watch.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0 and "run  running" in done.stdout and "4/10" in done.stdout, done.stderr
    for words in ([str(tmp_path / "nothing")], [str(tmp_path), "--every", "0"], [str(tmp_path), "--serve", "99999"]):
        monkeypatch.setattr(sys, "argv", ["watch.py", *words])
        monkeypatch.setattr(watch, "report_page", lambda folders: "page")
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        with pytest.raises(SystemExit, match="2"):
            watch.main()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


class Report:
    """Stands in for the report; says what it was asked for."""

    def __init__(self):
        self.calls, self.error = [], None

    def __call__(self, folders: list[Path]) -> str:
        self.calls.append([folder.name for folder in folders])
        if self.error:
            raise self.error
        return f"<!doctype html>page {len(self.calls)}"


@pytest.fixture
def served(tmp_path):
    """A server on a free port, the runs that it watches, and what makes its page."""
    make_run(tmp_path / "a", GOING)
    make_run(tmp_path / "b", GOING)
    report = Report()
    with Server(Page(Watched(tmp_path), report, least_seconds=0), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server, tmp_path, report
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, method: str = "GET", path: str = "/", host: str | None = None) -> tuple[int, dict, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read().decode()
    connection.close()
    return answer


def test_the_report_is_served_and_made_anew_while_runs_go_on(served):
    server, root, report = served
    assert server.server_address[0] == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.server_port}/"
    code, headers, body = ask(server)
    assert (code, body, report.calls) == (200, "<!doctype html>page 1", [["a", "b"]])
    assert headers["Content-Type"].startswith("text/html") and int(headers["Refresh"]) > 0
    for host in (f"localhost:{server.server_port}", "localhost", "127.0.0.1"):  # without a port where that is 80
        assert ask(server, path="/?x=1", host=host)[2].endswith("page 1"), "nothing has changed"
    for name in ("a", "b"):
        with (root / name / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dict(event="end", step=10, finished=True)) + "\n")
    code, headers, body = ask(server)
    assert body.endswith("page 2") and "Refresh" not in headers, "all are done"
    code, headers, body = ask(server, "HEAD")
    assert (code, body, headers["Content-Length"]) == (200, "", str(len("<!doctype html>page 2")))


def test_a_run_that_dies_without_a_line_changes_the_page(served):
    server, root, report = served
    process = subprocess.Popen(["sleep", "1000"])
    try:
        (root / "a" / ".lock").write_text(lock_of(process.pid), encoding="utf-8")
        assert ask(server)[2].endswith("page 1") and ask(server)[2].endswith("page 1")
    finally:
        process.kill()
        process.wait()
    assert ask(server)[2].endswith("page 2")


def test_the_server_gives_nothing_else(served):
    server, root, report = served
    for path in ("/a/metrics.jsonl", "/../", "/%2e%2e/etc/passwd"):
        assert ask(server, path=path)[0] == 404
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, method)[0] == 501
    for host in ("evil.example:80", "evil.example", f"127.0.0.1.evil.example:{server.server_port}"):
        assert ask(server, host=host)[0] == 403
    assert not report.calls
    with pytest.raises(ValueError, match="cannot be had"):
        Server(server.page, server.server_port)
    with pytest.raises(ValueError, match="cannot be had"):
        Server(server.page, 99999)


def test_a_page_that_cannot_be_made_is_said_and_tried_again(served, capfd):
    server, root, report = served
    report.error = ValueError("plotly <b> is missing\x1b")
    code, _, body = ask(server)
    assert code == 500 and "plotly &lt;b&gt; is missing\\x1b" in body and "<b>" not in body
    assert "error: plotly" in capfd.readouterr().err
    report.error = None
    assert ask(server)[0] == 200


def test_a_closed_tab_says_nothing(tmp_path, capfd):
    make_run(tmp_path / "a", GOING)
    asked = threading.Event()

    def make(folders: list[Path]) -> str:
        assert asked.wait(120)
        return "x" * 50_000_000  # more than waits in any socket

    with Server(Page(Watched(tmp_path), make), 0) as server:
        server.daemon_threads = False  # so that its end waits for them
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with socket.create_connection(("127.0.0.1", server.server_port)) as tab:
            tab.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        asked.set()  # the page comes when nobody is there any more
        assert ask(server, "HEAD")[0] == 200
        server.shutdown()
        thread.join()
    assert capfd.readouterr().err == ""


def test_pages_are_not_made_more_often_than_allowed(tmp_path):
    report = Report()
    page = Page(Watched(tmp_path), report, least_seconds=1000)
    assert b"No runs yet" in page.get()[0] and page.get()[1] and not report.calls
    make_run(tmp_path / "a", [*GOING, dict(event="end", step=10, finished=True)])
    content, will_change = page.get()
    assert b"No runs yet" in content and will_change and not report.calls


def test_a_run_that_names_thousands_of_unused_files_is_as_good_as_any(tmp_path):
    """Earlier versions wrote a note on each into config.yaml, which made it larger than other settings may be."""
    folder = make_run(tmp_path / "run", [START, EVALUATION, *steps(1, 10), dict(event="end", step=10, finished=True)])
    notes = [f"/corpus/{'page ' * 15}{i:05}.txt: not used, neither train nor validation by its name" for i in range(9000)]
    values = load_experiment("quickstart").to_dict() | {"run": {"data": {"notes": notes}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert (folder / "config.yaml").stat().st_size > MOST_BYTES
    snapshot = only(folder)
    assert (snapshot.status, snapshot.why) == ("done", "")
    assert snapshot.experts is not None

"""The report of the runs below a folder on a local address, for `tools/watch.py --serve`: read-only, this machine only."""

import html
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tools.snapshots import Watched, stamp_of
from trainer.text import error_line

ADDRESS = "127.0.0.1"
SECONDS_BETWEEN_PAGES = 10
"""A page is made at most this often, however often runs write and browsers ask."""
SECONDS_TO_REFRESH = 30
"""After which a browser asks again, while any run goes on or there is none yet."""
EMPTY = '<!doctype html><html lang="en"><title>Runs</title><p>No runs yet.</p></html>'


class Page:
    """The report as it was last made; made anew when it is asked for, runs have changed, and it is not too young.

    Args:
        watched: the runs.
        make: HTML of the report of a list of run folders.
        least_seconds: between two pages.
    """

    def __init__(self, watched: Watched, make: Callable[[list[Path]], str], least_seconds: float = SECONDS_BETWEEN_PAGES):
        self._watched, self._make, self._least_seconds = watched, make, least_seconds
        self._lock = threading.Lock()
        self._stamps: list | None = None
        self._made = -float("inf")
        self._content = b""

    def get(self) -> tuple[bytes, bool]:
        """The page, and whether a run goes on, so that it will change. Raises what `make` does."""
        with self._lock:
            folders = self._watched.folders()
            snapshots = self._watched.snapshots()
            # A run that dies writes nothing more; what has changed is where it stands.
            stamps = [[(folder, stamp_of(folder)) for folder in folders], sorted((s.name, s.status) for s in snapshots)]
            if stamps != self._stamps and time.monotonic() >= self._made + self._least_seconds:
                text = self._make(folders) if folders else EMPTY
                self._content = text.encode("utf-8", "backslashreplace")
                self._stamps, self._made = stamps, time.monotonic()
            goes_on = any(snapshot.status == "running" for snapshot in snapshots)
            return self._content, goes_on or not folders or stamps != self._stamps


class Server(ThreadingHTTPServer):
    """Answers GET and HEAD of `/` on ADDRESS, and nothing else.

    Raises:
        ValueError: a port that cannot be had.
    """

    daemon_threads = True

    def __init__(self, page: Page, port: int):
        self.page = page
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--serve {port}: cannot be had ({error}); give another port") from None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def handle(self) -> None:
        """All requests of a connection."""
        try:
            super().handle()
        except ConnectionError:
            pass  # the tab was closed, or the page asked for again before it was there

    def do_GET(self) -> None:
        # A page from elsewhere may point a name of its own at this address; browsers then send that name.
        name = self.headers.get("Host", "").partition(":")[0]
        if name not in (ADDRESS, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, "only for this machine")
            return
        if self.path.partition("?")[0] != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        headers = {}
        try:
            content, goes_on = self.server.page.get()
            headers = {"Refresh": str(SECONDS_TO_REFRESH)} if goes_on else {}
            code = HTTPStatus.OK
        except Exception as error:
            # Whatever it is, the next page may work, and whoever looks at the browser should know.
            line = error_line(error)
            print(line, file=sys.stderr, flush=True)
            content, code = f"<!doctype html><title>error</title><p>{html.escape(line)}".encode(), 500
        self.send_response(code)
        headers |= {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(content))}
        for key, value in {**headers, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not worth a line."""


def serve(watched: Watched, port: int, make: Callable[[list[Path]], str]) -> None:
    """Serve until Ctrl-C.

    Raises:
        ValueError: a port that cannot be had, or a page that `make` refuses to make.
    """
    page = Page(watched, make)
    page.get()
    with Server(page, port) as server:
        print(f"{server.url} shows {len(watched.folders())} runs; Ctrl-C ends it", flush=True)
        server.serve_forever()

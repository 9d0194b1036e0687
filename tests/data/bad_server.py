"""A local HTTP server of a folder that stops, stalls or rejects requests as planned."""

import http.server
import threading
from contextlib import contextmanager
from pathlib import Path


class BadServer(http.server.ThreadingHTTPServer):
    """Serve ``folder``.

    ``plans``: file name -> what happens to its requests, one after another: ("stop", n) breaks after n bytes,
    ("stall", n) sends no more after n bytes, ("status", code) refuses, ("length", n) breaks after n bytes and had not
    sent no length; the last plan of a list stays, None is a normal answer.
    ``requests``: (file name, Range header) of each request.
    """

    daemon_threads = True

    def __init__(self, folder, ranges=True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = Path(folder), ranges
        self.plans, self.requests, self.ending = {}, [], threading.Event()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, name):
        return sum(1 for found, _ in self.requests if found == name)


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name, wanted = self.path.rpartition("/")[2], self.headers.get("Range")
        self.server.requests.append((name, wanted))
        plan = self.server.plans.get(name) or [None]
        kind, value = (plan.pop(0) if len(plan) > 1 else plan[0]) or (None, 0)
        file = self.server.folder / self.path.lstrip("/")
        if kind == "status" or not file.is_file():
            self.send_error(value or 404)
            return
        data, begin = file.read_bytes(), 0
        if self.server.ranges and wanted and self.headers.get("If-Range") in (None, f'"{len(data)}"'):
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if begin else 200)
        if kind != "length":
            self.send_header("Content-Length", str(len(data) - begin))
        if self.server.ranges:
            self.send_header("ETag", f'"{len(data)}"')
        self.end_headers()
        end = len(data) if kind is None else min(max(value, begin), len(data))
        self.wfile.write(data[begin:end])
        if kind == "stall":
            self.wfile.flush()
            self.server.ending.wait()


@contextmanager
def serving(folder, **options):
    """Run a server in its own thread."""
    with BadServer(folder, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()

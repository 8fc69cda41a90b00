"""A server that wandb takes for its own, and places where none answers."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Answers as much of wandb's protocol as a run needs, and notes what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ids: list[str] = []
        """Of the runs, one for each time that one was started."""
        self.rows: list[dict[str, Any]] = []
        """The lines of history."""
        self.files: list[str] = []
        """Names of files that wandb wanted to send."""
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def steps(self) -> list[int]:
        """Of the lines of training; norms have rows of their own."""
        return [row["step"] for row in self.rows if "train/loss" in row]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._sockets.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is cut off, or cuts off, is no error here."""

    def die(self) -> None:
        """From now on its port is refused, and what was connected is cut off."""
        self.shutdown()
        self.server_close()
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, path: str, sent: dict[str, Any]) -> Any:
        if path.endswith("/file_stream"):
            chunk = (sent.get("files") or {}).get("wandb-history.jsonl", {})
            self.rows += map(json.loads, chunk.get("content", []))
            return {}
        query, variables = sent.get("query", ""), sent.get("variables") or {}
        if "mutation UpsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": self._run(variables), "inserted": True}}}
        if "mutation CreateRunFiles" in query:
            self.files += variables["files"]
            named = [{"name": n, "uploadUrl": f"{self.url}/up"} for n in variables["files"]]
            files = {"runID": "run", "uploadHeaders": [], "files": named}
            return {"data": {"createRunFiles": files}}
        if "query RunResumeStatus" in query:
            self.ids.append(variables["name"])
            return {"data": {"model": self._known(variables["name"])}}
        return {"data": {}}

    def _known(self, name: str) -> Any:
        """What it has of a run before, where that is resumed."""
        if name not in self.ids[:-1]:
            return None
        return {
            "id": "p",
            "name": "p",
            "entity": {"id": "e", "name": "e"},
            "bucket": {
                "id": "run",
                "name": name,
                "displayName": name,
                "summaryMetrics": "{}",
                "logLineCount": 0,
                "historyLineCount": len(self.rows),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(row) for row in self.rows[-1:]]),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "notes": None,
                "wandbConfig": '{"t": 1}',
            },
        }

    @staticmethod
    def _run(variables: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "run",
            "name": variables.get("name"),
            "displayName": variables.get("displayName"),
            "config": "{}",
            "historyLineCount": 0,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            text = gzip.decompress(text)
        sent: Any = {}
        with suppress(ValueError):
            sent = json.loads(text)
        content = json.dumps(self.server.answer(self.path, sent or {})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def server() -> Iterator[WandbServer]:
    running = WandbServer()
    try:
        yield running
    finally:
        running.die()


@contextmanager
def black_hole() -> Iterator[str]:
    """The URL of what takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as taken:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def refused() -> str:
    """The URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def eventually(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.02)

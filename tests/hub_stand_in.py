"""A Hugging Face hub on this machine, as far as uploading needs it: repositories, and commits whose
large files come by Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_the_stand_in"


class Hub:
    """What has been uploaded: files by repository and name."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.refuses = 0
        """The status that every request is answered with, if not 0."""
        self.objects: dict[str, bytes] = {}
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """The status and JSON for a request."""
        if self.refuses:
            return self.refuses, {"error": "refused"}
        if method == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "who are you?"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo = path.removeprefix("/api/models/").removeprefix("/").partition(".git/")[0]
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": self._places(json.loads(body))}
        repo = "/".join(repo.split("/")[:2])
        if method == "GET":
            return 200, {"id": repo, "private": self.private[repo], "siblings": []}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(f) for f in json.loads(body)["files"]]}
        if "/commit/" in path:
            return 200, self._commit(repo, body)
        return 404, {"error": f"no {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = {"url": f"{self.address}/{repo}"}
        if repo in self.files:
            return 409, {**address, "error": "You already created this model repo"}
        self.files[repo] = {}
        self.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        return 200, address

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".png"))
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _places(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**one, "actions": {"upload": {"href": f"{self.address}/objects/{one['oid']}"}}}
            for one in asked["objects"]
        ]

    def _commit(self, repo: str, body: bytes) -> dict[str, Any]:
        for line in body.decode().splitlines():
            content = json.loads(line)
            value = content["value"]
            if content["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif content["key"] == "lfsFile":
                uploaded = self.objects[value["oid"]]
                assert hashlib.sha256(uploaded).hexdigest() == value["oid"]
                self.files[repo][value["path"]] = uploaded
        self.commits += 1
        oid = f"{self.commits:040x}"
        return {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.address}/{repo}/commit/{oid}",
        }


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization")
            status, content = hub.answer(self.command, self.path, body, token)
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

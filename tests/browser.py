"""A page in headless Chromium, as somebody would use it: keys, clicks, what it keeps and saves.

Speaks the DevTools protocol over pipes, which needs no package and no port.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-dev-shm-usage --remote-debugging-pipe"
).split()


class Browser:
    """One window, whose profile and downloads are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self.problems: list[str] = []
        """Console errors and exceptions so far."""
        here, there = os.pipe(), os.pipe()
        assert PROGRAM

        def wire() -> None:  # the browser reads 3 and writes 4
            first, second = os.dup(here[0]), os.dup(there[1])
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [PROGRAM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(here[0])
        os.close(there[1])
        self._out, self._in = os.fdopen(here[1], "wb", 0), os.fdopen(there[0], "rb", 0)
        self._rest, self._sent = b"", 0
        self._session: str | None = None
        target = self.send("Target.getTargets")["targetInfos"][0]["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._sent:
            self._note(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def open(self, page: Path) -> None:
        self.send("Page.navigate", url=page.absolute().as_uri())
        while self.run("document.readyState + location.protocol") != "completefile:":
            pass

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def close(self) -> None:
        self.send("Browser.close")
        self._process.wait(20)
        self._out.close()
        self._in.close()

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._in.read(1 << 16)
            assert more, "the browser ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        entry = event.get("params", {}).get("entry", {})
        if event.get("method") == "Runtime.exceptionThrown" or entry.get("level") == "error":
            self.problems.append(json.dumps(event["params"]))

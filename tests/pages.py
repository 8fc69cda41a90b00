"""HTML pages as tests look at them: well-formed, and in headless Chromium at every width."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests import browser

_VOID = {"meta", "img", "input", "path", "rect", "wbr", "link", "br"}


class Tags(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def is_well_formed(page: Path) -> bool:
    tags = Tags(page.read_text(encoding="utf-8"))
    return not tags.open and not tags.wrong


def looked_at(folder: Path, *pages: Path) -> browser.Browser:
    """A browser that has had each page open at desktop and phone width, light and dark; nothing
    scrolls sideways, and nothing is complained of. To be closed."""
    if not browser.PROGRAM:
        pytest.skip("no Chromium")
    window = browser.Browser(folder)
    for page in pages:
        for width in (1200, 390):
            phone = {"deviceScaleFactor": 1, "mobile": width < 500}
            window.send("Emulation.setDeviceMetricsOverride", width=width, height=900, **phone)
            for scheme in ("light", "dark"):
                wanted = [{"name": "prefers-color-scheme", "value": scheme}]
                window.send("Emulation.setEmulatedMedia", features=wanted)
                window.open(page)
                assert window.run("document.documentElement.scrollWidth <= innerWidth"), page
    assert window.problems == []
    return window

"""The pages themselves: links and anchors lead somewhere, every page is reachable, and the messages
that troubleshooting quotes are those that the program prints."""

import ast
import re
from functools import cache

import pytest

from scripts.reference import anchor
from tests.documented import documents, without_code
from train.config import ROOT

PAGES = documents()
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@cache
def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = anchor(plain)
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return found


def links(page):
    return [link for link in _LINK.findall(without_code(page.read_text("utf-8")))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for link in links(page):
        path, _, name = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (name and target.suffix == ".md" and name not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_reached_from_the_front_page_and_from_the_index():
    pages = {page for page in PAGES if page.parent == ROOT / "docs"}
    for start in (ROOT / "README.md", ROOT / "docs/README.md"):
        reached = {(start.parent / link.partition("#")[0]).resolve() for link in links(start)}
        missing = {page.name for page in pages - reached} - {"README.md"}
        assert not missing, f"{start.relative_to(ROOT)} does not link {', '.join(sorted(missing))}"


@cache
def literals():
    """All texts in the code, with a gap where a value stands."""
    found = []
    for folder in ("train", "data", "eval", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def is_said(message):
    """Whether the fixed parts of a message stand in one text of the code, in this order."""
    parts = [re.escape(part) for part in re.split(r"\s*…\s*", message) if part]
    said = re.compile(".*".join(parts), re.DOTALL)
    return any(said.search(text) for text in literals())


def quoted():
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    blocks = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_that_the_program_prints(message):
    assert is_said(message)


def test_a_message_that_nobody_prints_is_found():
    assert len(quoted()) > 25 and not is_said("the loss is infinite for …")

"""The Chinese README keeps step with the English one: commands, pictures, links, headings."""

import re

import pytest

from tests.documented import commands_of, without_code
from train.config import ROOT

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    return without_code(page.read_text("utf-8"))


def blocks(page):
    """Blocks of code, without the comments in them and what is explained beside files' names."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    shown = [
        (language, re.sub(r"\s+#.*$", "", text, flags=re.MULTILINE)) for language, text in found
    ]
    return [
        (language, re.sub(r"^(  \S+/?) {2,}.*$", r"\1", text, flags=re.M))
        for language, text in shown
    ]


def test_the_commands_are_the_same():
    english, chinese = ([one.words for one in commands_of(page)] for page in (ENGLISH, CHINESE))
    assert chinese == english


def test_so_are_all_blocks_but_for_comments():
    assert blocks(CHINESE) == blocks(ENGLISH)


def test_pictures_and_links_are_the_same():
    english, chinese = ({*_LINK.findall(prose(page))} for page in (ENGLISH, CHINESE))
    assert english <= chinese
    assert chinese - english <= {"docs/troubleshooting.md#the-hub-cannot-be-reached"}


@pytest.mark.parametrize("mark", ["# ", "## ", "### ", "**1.", "**6.", "| "])
def test_the_parts_are_as_many(mark):
    english, chinese = (
        sum(line.startswith(mark) for line in prose(page).splitlines())
        for page in (ENGLISH, CHINESE)
    )
    assert chinese == english


def test_each_begins_with_a_link_to_the_other():
    for page in (ENGLISH, CHINESE):
        head = page.read_text("utf-8")[:200]
        assert "[English](README.md)" in head and "[简体中文](README.zh.md)" in head

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.report import (
    Comparison,
    Grid,
    Panel,
    Section,
    Table,
    embed,
    facts,
    grids_of,
    heading,
    section_of,
    table_of,
    verdict_line,
    warning,
    write_page,
)

EVIL = '<script>alert("x")</script> & \'"'


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    panels = [Panel(picture, EVIL, EVIL)] * 3
    write_page(
        tmp_path / "report.html",
        title=EVIL,
        pieces=[
            verdict_line(EVIL),
            table_of(Table([EVIL], [(EVIL, [(EVIL, EVIL)])])),
            warning(EVIL),
            section_of(Section(EVIL, EVIL, [Comparison(EVIL, panels)])),
            section_of(Section("left out", "", [])),
            grids_of("left out", "", []),
            facts(EVIL, [(EVIL, EVIL)]),
        ],
    )
    page = _Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return page


def test_all_text_is_escaped_and_all_of_it_arrives(page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 20
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alts == [f"{EVIL}: {EVIL}"] * 3


def test_nothing_is_fetched(page):
    sources = [v for _, attributes in page.tags for k, v in attributes.items() if k == "src"]
    assert len(sources) == 3 and all(source.startswith("data:image/png") for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_an_empty_section_is_left_out(page):
    assert "left out" not in page.text


def test_phones_and_dark_screens_are_served(page):
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert "prefers-color-scheme: dark" in page.text


def _decode(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.sub("^.*base64,", "", address))))


def test_small_pictures_are_embedded_exactly_and_large_ones_scaled(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    assert (np.asarray(_decode(embed(pixels))) == pixels).all()
    Image.fromarray(pixels).resize((1536, 768)).save(tmp_path / "large.png")
    large = _decode(embed(tmp_path / "large.png"))
    assert large.size == (512, 256) and large.format == "JPEG"


def test_a_small_picture_that_takes_too_much_is_not_kept_exactly():
    noise = np.random.default_rng(0).integers(0, 256, (170, 170, 3), dtype=np.uint8)
    assert embed(noise, 512).startswith("data:image/jpeg")
    assert embed(np.zeros_like(noise), 512).startswith("data:image/png")
    assert len(embed(noise, 512)) < 100_000


def test_grids_keep_columns_aligned_and_escape_their_text():
    panel = Panel(np.zeros((8, 8, 3), np.uint8), "", EVIL)
    grid = Grid(EVIL, EVIL, [EVIL, EVIL], [(EVIL, [panel, panel]), ("short", [panel])])
    page = _Page()
    page.feed(grids_of(EVIL, EVIL, [grid]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 10
    assert [a["style"] for _, a in page.tags if "style" in a] == ["--n:2"]
    # Two labels, four cells and, above them, an empty corner and two heads fill three rows.
    inside = [tag for tag, _ in page.tags][[a.get("class") for _, a in page.tags].index("grid") :]
    assert inside.count("span") + inside.count("figure") == 3 * 3


def test_a_heading_needs_no_sentence():
    assert heading("A & B") == "<h2>A &amp; B</h2>"


def test_a_page_without_a_script_may_run_none(tmp_path):
    write_page(tmp_path / "page.html", title="t", pieces=["{policy} {title}"])
    text = (tmp_path / "page.html").read_text()
    assert "script" not in text and "style-src 'unsafe-inline'\">" in text
    assert "{policy} {title}" in text


def test_a_page_may_run_its_own_script_and_no_other(tmp_path):
    write_page(tmp_path / "page.html", title="t", pieces=[], script="let a = 1;")
    text = (tmp_path / "page.html").read_text()
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    assert f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">" in text
    assert text.count("<script>let a = 1;</script>") == 1

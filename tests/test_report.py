import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.report import Comparison, Panel, Section, Table, embed, write_report

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
    write_report(
        tmp_path / "report.html",
        title=EVIL,
        verdict=EVIL,
        table=Table([EVIL], [(EVIL, [(EVIL, EVIL)])]),
        warnings=[EVIL],
        sections=[
            Section(EVIL, EVIL, [Comparison(EVIL, [Panel(picture, EVIL, EVIL)] * 3)]),
            Section("left out", "", []),
        ],
        method=[(EVIL, EVIL)],
    )
    page = _Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return page


def test_all_text_is_escaped_and_all_of_it_arrives(page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) == 19
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

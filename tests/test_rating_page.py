import base64
import hashlib
import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from eval import rating_page
from eval.evaluated_runs import read_runs
from tests import browser
from tests.evaluated import evaluated
from tests.test_compare import remade
from train.config import UserError


@pytest.fixture
def sides(tmp_path):
    evaluated(tmp_path / "secret-one", grey=100)
    evaluated(tmp_path / "secret-two", grey=200)
    return read_runs([tmp_path / "secret-one", tmp_path / "secret-two"])


@pytest.fixture
def page(tmp_path, sides):
    rating_page.write(tmp_path / "page.html", sides, count=20)
    return tmp_path / "page.html"


def content_of(page):
    found = re.search(r'id="content">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def grey_of(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).getpixel((0, 0))[0]


def test_the_key_alone_says_whose_picture_is_where(page):
    content, key = content_of(page), json.loads(page.with_suffix(".key.json").read_text())
    for item, keyed in zip(content["items"], key["items"], strict=True):
        assert [grey_of(address) for address in item["pictures"]] == [
            [100, 200][side] for side in keyed["sides"]
        ]
        assert item["prompt"] == keyed["prompt"]


def test_the_page_names_neither_run_nor_file_nor_seed(page):
    text = page.read_text()
    for secret in ("secret", "finetuned", "00001.png", "1000001", "sides"):
        assert secret not in text
    assert set(content_of(page)["items"][0]) == {"prompt", "pictures"}


def test_what_a_file_says_beside_its_pixels_does_not_get_into_the_page(tmp_path, sides):
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("made by", "secret-one")
    for file in (tmp_path / "secret-one/eval/finetuned").glob("*.png"):
        Image.open(file).save(file, pnginfo=told)
    rating_page.write(tmp_path / "page.html", sides)
    for item in content_of(tmp_path / "page.html")["items"]:
        for address in item["pictures"]:
            assert b"secret" not in base64.b64decode(address.partition(",")[2])


def test_sides_are_balanced_and_order_is_shuffled_by_the_seed(sides):
    plans = [rating_page.plan(sides, kind="pair", count=20, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for plan in plans:
        assert sum(item["sides"] == [1, 0] for item in plan) == 10
        seeds = [item["seed"] for item in plan]
        assert seeds != sorted(seeds) and len(set(seeds)) == 20
        assert len({item["prompt"] for item in plan}) == 12  # from all prompts


def test_pictures_are_rated_one_at_a_time_each_once(tmp_path, sides):
    key = json.loads(
        rating_page.write(tmp_path / "page.html", sides, kind="score", count=5).read_text()
    )
    shown = content_of(tmp_path / "page.html")["items"]
    assert len(shown) == len(key["items"]) == 10
    assert {(item["seed"], *item["sides"]) for item in key["items"]} == {
        (item["seed"], side) for item in key["items"] for side in (0, 1)
    }
    assert all(len(item["pictures"]) == 1 for item in shown)


def test_the_policy_allows_this_script_and_style_and_nothing_else(page):
    text = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text, re.DOTALL)[1]
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_prompt_cannot_end_the_element_that_holds_it(tmp_path):
    evil = "</script><script>alert(1)</script> {script} &"
    runs = [
        evaluated(tmp_path / name, subject=evil, grey=grey) for name, grey in (("a", 1), ("b", 2))
    ]
    rating_page.write(tmp_path / "p.html", read_runs(runs), question=f"{evil}?")
    assert content_of(tmp_path / "p.html")["items"][0]["prompt"].startswith(evil)
    assert "<script>alert" not in (tmp_path / "p.html").read_text()


def test_the_page_of_other_pictures_is_not_overwritten(tmp_path, sides, page):
    before = page.read_bytes()
    rating_page.write(page, sides, count=20)  # the same again
    assert page.read_bytes() == before
    with pytest.raises(UserError, match="a page of other pictures; choose another name"):
        rating_page.write(page, sides, count=3)


def test_a_key_of_other_runs_or_of_pictures_made_anew_is_refused(tmp_path, sides, page):
    assert rating_page.read_key(page, sides)["names"] == ["secret-one", "secret-two"]
    with pytest.raises(UserError, match="name the same, in order"):
        rating_page.read_key(page, sides[::-1])
    with pytest.raises(UserError, match=r"no other\.key\.json beside it"):
        rating_page.read_key(tmp_path / "other.html", sides)
    for file in (tmp_path / "secret-two/eval/finetuned").glob("*.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    with pytest.raises(UserError, match="no longer those that were judged"):
        rating_page.read_key(page, sides)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda key: key.pop("items"), "items"),
        (lambda key: key.pop("page"), "page"),
        (lambda key: key.update(items=[{}]), r"items\.0\.prompt"),
        (lambda key: key["items"][0].update(sides=[5, 6]), "item 0"),
        (lambda key: key["items"][0].update(sides=[1, 1]), "item 0"),
        (lambda key: key["items"][0].update(sha256=[]), "item 0"),
        (lambda key: key.update(kind="score"), "item 0"),
        (lambda key: key.update(kind="other"), "kind"),
        (lambda key: key.update(names=["secret-one", "secret-two", "x"]), "pairs are of two"),
    ],
)
def test_a_damaged_key_is_refused_by_name(sides, page, change, said):
    path = page.with_suffix(".key.json")
    key = json.loads(path.read_text())
    change(key)
    path.write_text(json.dumps(key))
    with pytest.raises(UserError, match=rf"{path} is no key of a rating page \({said}"):
        rating_page.read_key(page, sides)


def test_pictures_of_an_interrupted_evaluation_are_not_shown(tmp_path, sides):
    remade(sides[1], 5, prompt="a cat")
    with pytest.raises(
        UserError, match=r"00005\.png was made with another prompt .* secret-two ag"
    ):
        rating_page.write(tmp_path / "page.html", sides)


def test_a_missing_picture_is_named(tmp_path, sides):
    (tmp_path / "secret-two/eval/finetuned/00004.png").unlink()
    with pytest.raises(UserError, match=r"00004\.png is gone; evaluate secret-two again"):
        rating_page.write(tmp_path / "page.html", sides)


@pytest.mark.slow
@pytest.mark.skipif(not browser.PROGRAM, reason="no Chromium here")
@pytest.mark.parametrize("kind", ["pair", "score"])
def test_in_a_browser_votes_are_taken_kept_undone_and_saved(tmp_path, sides, kind):
    page = tmp_path / "page.html"
    rating_page.write(page, sides, kind=kind, count=4)
    window = browser.Browser(tmp_path)
    progress = "document.getElementById('progress').textContent"
    keys, expected = {
        "pair": ("1029121", ["left", "equal", "right", "left"]),  # no 9; no more than four
        "score": ("1502341222", [1, 5, 2, 3, 4, 1, 2, 2]),
    }[kind]
    try:
        window.open(page)
        window.press(keys[0])
        window.press(keys[1])
        window.press("Backspace")
        assert window.run(progress).startswith("1 of")
        window.open(page)  # as after the tab was closed
        assert window.run(progress).startswith("1 of")
        for key in keys[1:]:
            window.press(key)
        window.run("document.getElementById('save').click()")  # refused: who is it?
        for key in "Ann 1":
            window.press(key)
        window.run("document.getElementById('save').click()")
        file = window.downloads / "votes-Ann_1.json"
        until = time.monotonic() + 10
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        saved = json.loads(file.read_text())
    finally:
        window.close()
    assert [vote["vote"] for vote in saved["votes"]] == expected
    assert (saved["rater"], saved["page"]) == ("Ann 1", content_of(page)["page"])
    assert window.problems == []
    assert len(list(window.downloads.iterdir())) == 1

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from data import checks
from data.checks import caption_statistics, short_batches, token_counter, warnings
from data.images import fit_geometry
from data.records import FILE, Record, Table
from eval.charts import Bar, Histogram, histograms, shapes
from eval.dataset_account import geometry
from eval.dataset_report import _with_boxes, verdict, write_dataset_report
from scripts.prepare import PrepareConfig
from train.config import Cropping

EVIL = '<script>alert("x")</script> & \'"'


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def table(tmp_path):
    records = []
    for number, size in enumerate([(64, 48), (48, 64), (96, 32)]):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", size, (40 * number, 90, 90)).save(file)
        name = f"{number} {EVIL}"
        records.append(Record(name, f"{FILE}{file}", (EVIL,), *size, f"{number:064x}"))
    return Table.of(records)


@pytest.fixture
def report(table, tmp_path):
    names = table.column("id")
    settings = PrepareConfig(source=EVIL, output=tmp_path, resolution=64, bucket_step=16)
    copies = [{"id": names[1], "distance": 3, "mirrored": True, "exact": False, "removed": True}]
    account = geometry(table, np.array([0, 2]), settings, batch_size=8)
    found = {
        "settings": settings.model_dump(mode="json"),
        "recognised": EVIL,
        "notes": [EVIL],
        "counts": {
            "found": 5,
            "rejected": 1,
            "removed": {"duplicates": 1, "smallest": 1},
            "kept": 2,
            "train": 2,
            "held_out": 0,
        },
        "rejected": [{"id": EVIL, "reason": EVIL, "location": ""}],
        "removed": {"smallest": [{"id": names[1], "reason": EVIL}]},
        "duplicates": {
            "copies": 1,
            "mirrored": 1,
            "other_captions": 0,
            "groups": [{"kept": names[0], "copies": copies}],
        },
        "against": None,
        "left_from_before": 0,
        "oddities": {"cmyk": {"meaning": EVIL, "pictures": 1, "ids": [EVIL]}},
        "scores": {"nsfw": {"limit": 0.5, "edges": [0, 0.5, 1], "pictures": [2, 1], "median": 0.1}},
        **account,
        "captions": caption_statistics(table, token_counter(None), max_tokens=5) | {"exact": False},
    }
    return found | {"warnings": warnings(found)}


def test_the_page_escapes_what_it_says_and_fetches_nothing(report, table, tmp_path):
    write_dataset_report(tmp_path / "report.html", report, table)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) > 12
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2 + 2 + 1  # crops, a pair of duplicates, a picture left out
    assert all(source.startswith("data:image/jpeg") for source in sources)
    assert not {"link", "iframe"} & {tag for tag, _ in page.tags}


def test_the_verdict_counts_what_there_is_to_look_at(report):
    assert verdict(report) == (
        "2 of 5 pictures are ready, in 2 buckets; 3 were left out; "
        f"{len(report['warnings'])} things to look at."
    )


def test_warnings_come_in_order_of_importance_and_only_where_they_are_due(report):
    keys = [each["key"] for each in report["warnings"]]
    assert keys == ["rejected", "few", "cut", "said_again", "short"]
    assert json.dumps(report["warnings"]).count("100 % of the captions are the same") == 1
    fine = report | {
        "counts": report["counts"] | {"rejected": 0, "train": 100},
        "captions": report["captions"] | {"cut": 0, "repeated": []},
        "buckets": [{"images": 100}],
    }
    assert warnings(fine) == []
    geometry = {"heavily_cropped": 1, "most_cropped": ["wide.jpg"]}
    geometry |= {"strongly_enlarged": 9, "most_enlarged": ["a.jpg", "b.jpg", "c.jpg"]}
    cropped, enlarged = warnings(fine | {"geometry": geometry})
    assert (cropped["key"], enlarged["key"]) == ("cropped", "enlarged")
    assert "1 picture (wide.jpg): see" in cropped["text"]
    assert "times (a.jpg, b.jpg, c.jpg and 6 more) and will" in enlarged["text"]


def test_the_last_batch_of_a_bucket_is_the_short_one():
    assert short_batches([{"images": 16}, {"images": 9}, {"images": 3}], 8) == (2, 5)


def test_tags_are_told_from_sentences_and_lengths_are_a_lower_bound():
    def statistics(*captions):
        records = [Record(str(k), "", (text,), 1, 1, "") for k, text in enumerate(captions)]
        return caption_statistics(records, token_counter(None), max_tokens=4)

    tagged = statistics("cat, sofa, red, night", "cat, garden, day, grass")
    assert (tagged["unit"], tagged["commonest"][0]) == ("tags", ["cat", 2])
    spoken = statistics("a cat on the sofa", "the cat, 12 years old")
    assert (spoken["unit"], spoken["commonest"][0]) == ("words", ["cat", 2])
    assert spoken["lengths"] == {"5": 1, "7": 1}  # each digit is a token of its own
    assert [cut["tokens"] for cut in spoken["longest_cut"]] == [7, 5]


def test_the_crop_that_is_drawn_is_the_crop_that_is_trained_on(table):
    found = geometry(table, np.array([2]), Cropping(resolution=32, bucket_step=16), batch_size=1)
    (shown,) = found["contact_sheet"]
    box = np.array(shown["boxes"][0]) * [96, 32, 96, 32]
    assert box == pytest.approx(fit_geometry(96, 32, tuple(shown["bucket"])).box, abs=0.01)
    drawn = np.asarray(
        _with_boxes(Image.new("RGB", (96, 32), (200, 200, 200)), [[0.25, 0, 0.75, 1]])
    )
    assert (drawn[16, 48] == 200).all() and (drawn[16, 10] < 100).all()


def test_shapes_are_to_scale_and_bars_in_proportion():
    page = shapes("t", "", [Bar((1024, 512), "wide", 10), Bar((512, 512), "square", 5)])
    tags = Page(page).tags
    rects = [attributes for tag, attributes in tags if tag == "rect"]
    assert [(r["width"], r["height"]) for r in rects] == [("40.0", "20.0"), ("20.0", "20.0")]
    assert [a["style"] for tag, a in tags if tag == "i"] == ["width:100.0%", "width:50.0%"]
    assert shapes("t", "", []) == ""


def test_a_histogram_reaches_to_its_limit():
    histogram = Histogram("t", "pictures", "score", [0.0, 1.0, 2.0], [3, 1], limit=4.5)
    tags = Page(histograms("t", "", [histogram])).tags
    paths = [attributes for tag, attributes in tags if tag == "path"]
    assert [p["class"] for p in paths].count("bar") == 2
    assert next(p["d"] for p in paths if p["class"] == "limit") == "M392 26V168"


@pytest.mark.parametrize("count, warned", [(0, False), (1, True), (5, True), (6, False)])
def test_too_few_held_out_to_judge_by_are_told(count, warned):
    said = checks._few_held_out({"counts": {"held_out": count}})
    assert bool(said) is warned and ("held_out=6 or more" in said) is warned

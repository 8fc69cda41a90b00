import copy
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from eval.galleries import by_prompt, evenly
from eval.presentation import console, present
from tests.evaluation_fixture import folders, picture, real, score, style_run, subject_run

EVIL = '<script>alert("x")</script> & \'"'


class Page(HTMLParser):
    """What stands on a report: its texts, its tags, and its cells row by row."""

    def __init__(self, metrics, folder, picture=real) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.inside = False
        present(metrics, folder, picture)
        self.html = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data

    def row(self, title):
        return next(row for row in self.rows if row[0].startswith(title))

    def section(self, title):
        """The HTML from a heading to the next."""
        parts = re.split(r"<h2>", self.html)
        return next((part for part in parts if part.startswith(f"{title}</h2>")), "")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The pictures of both, drawn once, and what their metrics.json say."""
    folder = tmp_path_factory.mktemp("written")
    found = {
        "subject": subject_run(folder, prompts=6, per_prompt=3, side=32),
        "style": style_run(folder / "style", images=40, side=32),
    }
    return folder, found


@pytest.fixture
def subject(written, tmp_path):
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(written[1]["subject"])


@pytest.fixture
def style(written, tmp_path):
    shutil.copytree(written[0] / "style", tmp_path, dirs_exist_ok=True)
    return copy.deepcopy(written[1]["style"])


def test_the_verdict_comes_first_with_a_word_and_a_colour(subject, tmp_path):
    for keep, word in (("keep", "Keep it"), ("unclear", "In doubt"), ("leave", "Leave it")):
        page = Page(subject | {"keep": keep}, tmp_path)
        assert f'class="verdict judged {keep}"' in page.html
        assert word in page.text and subject["verdict"] in page.text
        assert page.html.index("judged " + keep) < page.html.index("<table")


def test_base_and_baselines_stand_beside_every_number(subject, tmp_path):
    page = Page(subject, tmp_path)
    head = page.rows[0][1:]
    assert head == [
        "base",
        "base, class words",
        "fine-tuned",
        "change",
        "real pictures",
        "copy of the training set",
    ]
    row = page.row("DINO")
    assert "more is better" in row[0]
    assert row[1].startswith("0.312") and row[3] == "0.5120.482–0.542"
    assert row[4] == "+0.182better+0.146 to +0.218"
    assert page.row("CLIP-T")[4].startswith("−1.30worse")
    assert page.row("Forgetting")[1:] == ["", "", "0.3400.290–0.390", "", "", ""]


def test_a_column_that_no_score_has_is_left_out(style, tmp_path):
    style["arms"]["training"] = "copy of the training set"
    page = Page(style, tmp_path)
    assert page.rows[0] == ["", "base", "fine-tuned", "change"]
    assert "copy of the training set" not in page.text.lower()


def test_the_warning_of_a_number_follows_its_row(style, tmp_path):
    page = Page(style, tmp_path)
    at = page.rows.index(page.row("FID"))
    assert page.rows[at + 1] == [style["scores"]["fid"]["warning"]]
    assert page.rows[at + 2][0].startswith("KID")


def test_the_legend_says_what_each_change_is_measured_from(subject, style, tmp_path):
    assert "fine-tuned minus “base”." in Page(style, tmp_path).text
    said = Page(subject, tmp_path).text
    assert "minus “base, class words”; for " in said
    exceptions = said.split("class words”; for ")[1].split(" minus “base”")[0]
    assert exceptions == "CLIP score, Diversity, Class turned into the subject"


def test_a_change_of_a_score_without_a_better_side_is_not_judged(style, tmp_path):
    style["scores"]["vendi"] = score("Vendi score", None, {"base": 9.0, "finetuned": 7.0}, 0.1)
    row = Page(style, tmp_path).row("Vendi score")
    assert row[3].startswith("−2.00−2.12") and "is better" not in row[0]


def test_no_number_is_shown_as_zero_that_is_not(style, tmp_path):
    style["scores"]["kid"] = score("KID", "less", {"base": 0.00042, "finetuned": 0.00031}, 0.00002)
    row = Page(style, tmp_path).row("KID")
    assert row[1].startswith("0.000420") and row[3].startswith("−0.000110better")


def test_all_text_is_escaped_and_nothing_is_fetched(subject, tmp_path):
    for sample in subject["samples"]:
        sample["prompt"] = EVIL + sample["prompt"]
    subject |= {"title": EVIL, "verdict": EVIL, "warnings": [EVIL], "power": [EVIL]}
    subject["scores"]["dino"] |= {"title": EVIL, "how": EVIL, "warning": EVIL}
    subject["memorisation"]["said"] = EVIL
    subject["votes"] = {"said": EVIL, "columns": [EVIL], "rows": [[EVIL, [[EVIL, EVIL]]]]}
    subject["curves"]["scales"][0]["prompts"] = [EVIL] * 4
    page = Page(subject, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) > 15
    sources = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href")]
    assert sources and all(source.startswith("data:image/") for source in sources)


def test_grids_have_every_model_in_the_same_columns(subject, tmp_path):
    section = Page(subject, tmp_path).section("Side by side")
    assert section.count("<article>") == 6 and section.count("<img") == 6 * 3 * 3
    first = section.split("<article>")[1]
    assert re.findall(r'"seed">seed (\d+)', first) == ["1000000", "1000001", "1000002"]
    assert re.findall(r'class="arm">([^<]+)', first) == ["base", "base, class words", "fine-tuned"]
    scores = [f"{sample['scores']['dino']['finetuned']:.3f}" for sample in subject["samples"][:3]]
    assert re.findall(r"<figcaption>([^<]+)", first)[-3:] == scores


def test_a_model_with_a_missing_picture_is_not_shifted(subject, tmp_path):
    (tmp_path / subject["samples"][0]["pictures"]["base"]).unlink()
    first = Page(subject, tmp_path).section("Side by side").split("<article>")[1]
    assert re.findall(r'class="arm">([^<]+)', first) == ["base, class words", "fine-tuned"]


def test_prompts_are_spread_evenly_and_their_number_is_said(style, tmp_path):
    page = Page(style, tmp_path)
    section = page.section("Side by side")
    assert section.count("<article>") == 12 and "12 of 36 prompts, evenly spaced" in section
    assert len(set(re.findall("<h3>(.*?)</h3>", section))) == 12
    assert evenly(range(40), 4) == [0, 10, 20, 30] and evenly([1, 2], 4) == [1, 2]


def test_samples_without_a_prompt_stand_alone():
    groups = by_prompt([{"prompt": "a"}, {}, {"prompt": "a"}, {"prompt": None}])
    assert [len(group) for group in groups] == [2, 1, 1]


def test_best_and_worst_prompts_are_those_of_the_largest_mean_changes(subject, tmp_path):
    changes = (0.1, -0.3, 0.2, 0.0, 0.05, -0.01)
    for k, sample in enumerate(subject["samples"]):
        after = 0.4 + changes[k // 3] + (k % 3 - 1) * 0.5  # the mean decides, not one picture
        sample["scores"]["dino"] |= {"base": 9.0, "base_class": 0.4, "finetuned": after}
    page = Page(subject, tmp_path)
    won = re.findall(r"<h3>(\d):.*?<small>(.*?)<", page.section("Prompts that gained most"))
    lost = re.findall(r"<h3>(\d):.*?<small>(.*?)<", page.section("Prompts that lost most"))
    assert won[:3] == [("3", "DINO +0.200"), ("1", "DINO +0.100"), ("5", "DINO +0.050")]
    assert lost[:2] == [("2", "DINO −0.300"), ("6", "DINO −0.010")]


def test_where_less_is_better_the_gain_is_a_fall(subject, tmp_path):
    subject["scores"]["dino"]["better"] = "less"
    page = Page(subject, tmp_path)
    worst = max(
        range(6),
        key=lambda k: sum(
            s["scores"]["dino"]["finetuned"] for s in subject["samples"][3 * k :][:3]
        ),
    )
    assert page.section("Prompts that lost most").split("<h3>")[1].startswith(f"{worst + 1}:")


def test_copies_are_shown_beside_their_originals(subject, tmp_path):
    asked = []

    def remember(kind, name):
        asked.append((kind, name))
        return picture(0)

    section = Page(subject, tmp_path, remember).section("Nearest training pictures")
    assert f'<p class="warning">{subject["memorisation"]["said"]}' in section
    assert section.count("<img") == 2 * 8 and section.count("picture, suspicious<") == 4
    pairs = [("training", pair["id"]) for pair in subject["memorisation"]["pairs"]]
    assert [pair for pair in asked if pair[0] == "training"] == pairs
    subject["memorisation"]["flagged"] = False
    calm = Page(subject, tmp_path).section("Nearest training pictures")
    assert "warning" not in calm and "The most alike first." in calm


def test_a_real_picture_that_is_gone_leaves_out_its_pair(subject, tmp_path):
    subject["memorisation"]["pairs"][0]["id"] = "gone.png"
    section = Page(subject, tmp_path).section("Nearest training pictures")
    assert section.count("<article>") == 7


def test_without_a_judgement_the_nearest_training_pictures_come_most_alike_first(subject, tmp_path):
    subject["memorisation"] = None
    section = Page(subject, tmp_path).section("Nearest training pictures")
    found = [float(text) for text in re.findall(r"similarity ([\d.]+)", section)]
    assert len(found) == 12 and found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.8 + 0.003 * 17, abs=0.0005)


def test_curves_and_scales_are_drawn_and_shown_in_pictures(subject, tmp_path):
    page = Page(subject, tmp_path)
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert labels == [
        "DINO, more is better, over optimizer steps",
        "CLIP-T, more is better, over optimizer steps",
        "CLIP-I, more is better, over scale",
        "CLIP-T, more is better, over scale",
    ]
    films = page.section("Adapter scales in pictures")
    assert films.count("<article>") == 3 and films.count("<img") == 3 * 5
    assert re.findall("<figcaption>scale ([^<]+)", films)[:5] == ["0", "0.25", "0.5", "0.75", "1"]


def test_one_checkpoint_is_no_curve(subject, tmp_path):
    subject["curves"] = {"checkpoints": subject["curves"]["checkpoints"][:1], "scales": []}
    assert "<svg" not in Page(subject, tmp_path).html


def test_everything_needed_to_repeat_it_is_named(subject, tmp_path):
    page = Page(subject, tmp_path)
    section = page.section("How each number was computed")
    for needed in ("ab" * 32, "cd" * 32, "de" * 32, "ef" * 32, "12" * 32, "34" * 32):
        assert needed in section
    for needed in ("DDIMScheduler (v_prediction)", "25 steps", "guidance 7.5", "32x32"):
        assert needed in section
    for needed in ("seeds 1000000 to 1000017", "float32 on cpu", "p = 0.0004", "owl circle"):
        assert needed in section
    for content in subject["scores"].values():
        assert content["how"] in section


def test_what_is_missing_is_left_out(style, tmp_path):
    text = Page(style, tmp_path).text
    for absent in ("Nearest", "What else", "the class", "Over ", "scales", "people said", "None"):
        assert absent not in text
    assert "What could be seen" in text


def test_a_comparison_of_folders_has_one_arm_and_no_verdict_to_keep(tmp_path):
    page = Page(folders(tmp_path), tmp_path)
    assert page.rows[0] == ["", "images"] and "judged" not in page.html.split("<body>")[1]
    assert "Side by side" not in page.text and "Change" not in page.text
    assert page.section("Nearest held-out pictures").count("<img") == 16
    empty = Page(folders(tmp_path) | {"samples": [], "scores": {}}, tmp_path)
    assert "<table" not in empty.html and "<img" not in empty.html


def test_the_terminal_gets_aligned_columns_and_a_warning_below_its_metric(style, subject):
    lines = console(style).splitlines()
    at = lines[0].index("change")
    assert lines[1].startswith("FID (less is better)") and lines[1][at:].startswith("−13.70")
    assert lines[1].endswith("[−16.22 to −11.18]  better")
    assert lines[2] == f"  ! {style['scores']['fid']['warning']}"
    assert lines[3][at:].startswith("−0.0063") and lines[4].endswith("unclear")
    assert console(subject).splitlines()[0].split("  ")[-1].strip() == "change"
    assert "base, class words" in console(subject)


def test_a_report_of_many_large_pictures_stays_small(tmp_path, monkeypatch):
    """Photographs of 512 pixels, everything there is, of 64 prompts with 4 seeds."""
    rows, columns = np.mgrid[0:512, 0:512] / 40
    smooth = np.stack([np.sin(rows + k) + np.cos(columns * (k + 1)) for k in range(3)], -1)
    noise = np.random.default_rng(0).normal(0, 12, smooth.shape)
    photo = np.clip(128 + 50 * smooth + noise, 0, 255).astype(np.uint8)
    metrics = subject_run(tmp_path, prompts=12, per_prompt=4, side=32)
    monkeypatch.setattr("eval.report.embed", _once(photo))
    page = Page(metrics, tmp_path)
    assert 150 < page.html.count("<img") < 400
    assert len(page.html) < 15e6


def _once(photo):
    """As embedding does, of one photograph, whatever picture is asked for."""
    from eval.report import embed

    done: dict[int, str] = {}
    return lambda _, longest: done.setdefault(longest, embed(photo, longest))

"""Case 19: names with newlines, emoji, quotes or a dash in front, of 255 bytes, of bytes that are
no UTF-8, alike but for their Unicode form or their extension -> they work, or a message names them;
nothing is overwritten, and no prompt becomes a name."""

import json
import os
import unicodedata

import pytest

from tests.faults.hostile import picture, png
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "two names that are one in Unicode are both refused",
        "data/listing.py",
        "    _drop_twins(listing)\n",
        "",
        "copy",
    ),
    Removal(
        "temporary files have short names of their own",
        "data/files.py",
        'path.with_name(f".{digest}.{os.getpid()}.tmp")',
        'path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "copy",
    ),
    Removal(
        "names that are not UTF-8 are refused",
        "data/listing.py",
        "        spelled.encode()\n",
        "",
        "copy",
    ),
    Removal(
        "a caption is of one picture only",
        "data/captions.py",
        "        if owner != name:",
        "        if False:",
        "copy",
    ),
]
COMPOSED, SPLIT = (unicodedata.normalize(form, "na\u00efve") for form in ("NFC", "NFD"))
FINE = [
    *("new\nline", "tab\there", "\U0001f989 owl", 'it\'s "quoted" <b>&amp;', "-rf", "--help"),
    *("a.b", "..dots", "%s {0} $(touch x) `y`", " space ", "\u202egnp", "x" * 247, COMPOSED),
    *(
        "CON",
        "key=value",
        "#hash",
        "*?[a]",
        "\\back\\slash",
        "\u043f\u0440\u0438\u0432\u0435\u0442",
    ),
]
FINE.remove("..dots")  # hidden, like all that begins with a dot


@pytest.fixture
def folder(tmp_path):
    """Every picture with a colour of its own, so that none is taken for another."""
    folder = tmp_path / "set"
    for number, name in enumerate(FINE):
        picture(folder / f"{name}.png", (10 * number, 255 - 9 * number, 40), f"caption {number}")
    for form in ("NFC", "NFD"):
        twin = unicodedata.normalize(form, "\u00fcber")
        picture(folder / f"{twin}.png", (9, 9, 200))
    for number, end in enumerate(("png", "PNG", "jpg")):
        picture(folder / f"twice.{end}", (200 - number, 9, 9))
    with open(os.fsencode(folder) + b"/latin-\xe9.png", "wb") as file:
        file.write(png((1, 2, 3)))
    return folder


def before(folder):
    files = os.walk(os.fsencode(folder))
    paths = [os.path.join(top, name) for top, _, names in files for name in names]
    return {path: (open(path, "rb").read(), os.lstat(path).st_mtime_ns) for path in paths}


@pytest.mark.parametrize("how", ["copy", "link"])
def test_they_are_prepared_under_their_names_or_refused(starter, folder, tmp_path, how):
    source, out = before(folder), tmp_path / "out"
    args = (f"source={folder}", f"output={out}", "on_bad_image=quarantine", "duplicates=off")
    starter.finish("scripts/prepare.py", *args, f"files={how}")
    made = {path.name: path.read_bytes() for path in (out / "train").iterdir()}
    listed = map(json.loads, made["metadata.jsonl"].splitlines())
    texts = {line["file_name"]: line["text"] for line in listed}
    for number, name in enumerate(FINE):
        found = next(n for n in made if unicodedata.normalize("NFC", n) == f"{name}.png")
        assert made[found] == (folder / f"{name}.png").read_bytes()
        assert texts[f"{name}.png"] == f"caption {number}"
    pictures = [name for name in made if name.lower().endswith((".png", ".jpg"))]
    assert len(pictures) == len(FINE) + 1  # and the one that has the caption of three
    report = json.loads((out / "report.json").read_text("utf-8"))
    reasons = {each["id"]: each["reason"] for each in report["rejected"]}
    assert "Unicode form" in reasons["\u00fcber.png"]
    assert "not UTF-8" in reasons["latin-\\udce9.png"]
    assert sum("shares twice.txt" in why for why in reasons.values()) == 2
    assert before(folder) == source


@pytest.mark.slow
def test_a_run_trains_on_them(starter, world, folder, tmp_path):
    how = ("data.on_bad_image=report", "train.steps=2", "preview.every=2", "validation.every=0")
    prompts = 'preview.prompts=["../../../escaped", "/tmp/x", "a\\nb"]'
    run = arguments(world, tmp_path / "run", f"data.path={folder}", *how, prompts)
    said = starter.finish("train/lora.py", *run)
    assert f"{len(FINE) + 1} pictures" in said and "new\\nline" not in said.partition("left out")[0]
    names = {path.name for path in (tmp_path / "run" / "previews").rglob("*.png")}
    assert names == {"00.png", "01.png", "02.png", "grid.png"}
    assert not list(tmp_path.rglob("*escaped*"))


def test_the_names_of_pictures_are_not_made_of_prompts(starter, world, tmp_path):
    args = [
        f"model={world / 'base'}",
        f"output={tmp_path / 'out'}",
        "prompt=../../escaped/x\0"[:-1],
    ]
    how = ("steps=1", "width=64", "height=64")
    starter.finish("scripts/generate.py", *args, *how)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00000.png", "config.yaml"}
    assert not list(tmp_path.rglob("*escaped*"))

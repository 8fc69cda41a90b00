"""Case 18: links out of the folder or in a loop, pipes and devices, and metadata that names `../`,
absolute paths or URLs -> each is refused by name, nothing outside is read and nothing waits."""

import json
import os

import pytest

from tests.faults.hostile import picture, png
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "links out of the folder are not followed",
        "data/listing.py",
        "if not target.is_relative_to(folder):",
        "if False:",
        "traps",
    ),
    Removal(
        "links to folders are not followed",
        "data/listing.py",
        "if not entry.is_dir(follow_symlinks=False):",
        "if not entry.is_dir():",
        "traps",
    ),
    Removal(
        "what is no regular file is not opened",
        "data/listing.py",
        "return None if entry.is_file() else _NOT_REGULAR",
        "return None",
        "pipe",
    ),
    Removal(
        "metadata names files of the folder alone",
        "data/metadata.py",
        'if path.is_absolute() or ".." in path.parts or foreign or "://" in value:',
        "if False:",
        "outside",
    ),
]
SECRET = (3, 201, 77)
TIMEOUT = 60  # seconds; a pipe that is opened would be waited for


@pytest.fixture
def outside(tmp_path):
    picture(tmp_path / "outside" / "secret.png", SECRET, "the secret")
    os.mkfifo(tmp_path / "outside" / "pipe.png")
    return tmp_path / "outside"


@pytest.fixture
def folder(tmp_path, outside):
    folder = tmp_path / "set"
    for number in range(3):
        picture(folder / f"good-{number}.png", (80 * number, 90, 250 - 80 * number))
    return folder


@pytest.fixture
def traps(folder, outside):
    """Refused: name, and words of the reason."""
    links = {
        "link-out.png": outside / "secret.png",
        "link-pipe.png": outside / "pipe.png",
        "link-up.png": "../outside/secret.png",
        "link-device.png": "/dev/zero",
        "link-loop.png": "link-loop.png",
        "link-nowhere.png": "nowhere.png",
        "loop": ".",
        "out": outside,
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "inner.png").symlink_to("good-0.png")  # which is fine
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "good-1.caption")
    for name in ("link-out", "link-pipe", "link-up", "link-device", "pipe", "inner"):
        (folder / f"{name}.txt").write_text("a trap")
    (folder / "link-text.png").write_bytes(png())
    (folder / "link-text.txt").symlink_to(outside / "secret.txt")
    cannot = dict.fromkeys(["link-loop.png", "link-nowhere.png"], "cannot be reached")
    out = ("link-out.png", "link-pipe.png", "link-up.png", "link-device.png", "link-text.txt")
    return cannot | {
        **dict.fromkeys(out, "outside the folder"),
        **dict.fromkeys(["loop", "out"], "links to folders are not followed"),
        **dict.fromkeys(["pipe.png", "good-1.caption"], "is not a regular file"),
    }


def prepared(starter, folder, output):
    """report.json, and all that was written down of the pictures."""
    args = (f"source={folder}", f"output={output}", "duplicates=off", "on_bad_image=quarantine")
    starter.finish("scripts/prepare.py", *args, timeout=TIMEOUT)
    content = b"".join(file.read_bytes() for file in output.rglob("*") if file.is_file())
    assert png(SECRET) not in content and b"the secret" not in content
    return json.loads((output / "report.json").read_text("utf-8"))


def test_traps_in_a_folder_are_named_and_never_opened(starter, folder, traps, tmp_path):
    report = prepared(starter, folder, tmp_path / "out")
    found = {each["id"]: each["reason"] for each in report["rejected"]}
    assert [name for name, words in traps.items() if words not in found.get(name, "")] == []
    assert found.keys() - traps.keys() == {"link-text.png"}  # whose caption it was
    assert report["counts"]["train"] == 4
    assert not list((tmp_path / "out" / "quarantine").glob("*.png"))[1:]  # only link-text.png


def test_a_run_stops_at_them(starter, world, folder, traps, tmp_path):
    run = arguments(world, tmp_path / "run", f"data.path={folder}")
    said = starter.finish("train/lora.py", *run, code=2, timeout=TIMEOUT)
    assert [name for name in traps if f"{name}: " not in said] == []
    assert "Traceback" not in said


def test_metadata_names_nothing_outside(starter, folder, outside, tmp_path):
    (folder / "link.png").symlink_to(outside / "secret.png")
    os.mkfifo(folder / "pipe.png")
    secret = outside / "secret.png"
    names = [
        *("../outside/secret.png", "a/../../outside/secret.png", str(secret), secret.as_uri()),
        *("..\\outside\\secret.png", "http://127.0.0.1:9/secret.png"),
    ]
    lines = [{"file_name": name, "text": "x"} for name in names]
    lines += [{"file_name": f"good-{k}.png", "text": "x"} for k in range(2)]
    lines += [{"file_name": "good-2.png", "text": "x", "mask": "../outside/secret.png"}]
    lines += [{"file_name": name, "text": "x"} for name in ("link.png", "pipe.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = prepared(starter, folder, tmp_path / "out")
    found = {each["id"]: each["reason"] for each in report["rejected"]}
    for number in range(1, len(names) + 1):
        assert "must be a path below the folder" in found[f"metadata.jsonl:{number}"]
    assert "must be a path below the folder" in found["good-2.png"]
    assert "outside the folder" in found["link.png"]
    assert "not a regular file" in found["pipe.png"]
    assert report["counts"]["train"] == 2


def test_a_metadata_file_that_is_a_pipe_is_not_waited_for(starter, world, folder, tmp_path):
    os.mkfifo(folder / "metadata.jsonl")
    run = arguments(world, tmp_path / "run", f"data.path={folder}")
    said = starter.finish("train/lora.py", *run, code=2, timeout=TIMEOUT)
    assert "metadata.jsonl: is not a regular file" in said

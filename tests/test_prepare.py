import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import toy
from data.records import Record
from data.sources import scan
from scripts.prepare import main
from scripts.prepare_config import PrepareConfig
from tests.test_duplicates import photo
from tests.tiny import tiny_clip, tiny_tokenizer
from train.config import UserError, dump, load


def save(folder: Path, name: str, image: Image.Image, caption: str | None = "a cloud", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for number in range(12):
        save(folder, f"sub/{number:02d}.jpg", photo(number), f"cloud number {number}")
    return folder


@pytest.fixture
def troubled(source):
    """Every kind of problem that a folder of somebody's own has."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    save(source, "sideways.jpg", photo(20), exif=orientation)
    good = (source / "sub/00.jpg").read_bytes()
    for name, content in {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text": b"hello",
    }.items():
        (source / f"{name}.jpg").write_bytes(content)
        (source / f"{name}.txt").write_text("a cloud")
    save(source, "print.jpg", photo(21).convert("CMYK"))
    save(source, "small-copy.jpg", photo(1).resize((128, 96)), quality=60)
    save(source, "mirrored.png", ImageOps.mirror(photo(2)).resize((200, 150)), "cloud number 2")
    shutil.copy(source / "sub/03.jpg", source / "sub/same.jpg")
    (source / "sub/same.txt").write_text("cloud number 3")
    save(source, "tiny.png", photo(22, (40, 40)))
    save(source, "panorama.jpg", photo(23, (600, 100)))
    save(source, "speechless.jpg", photo(24), None)
    save(source, "wordy.jpg", photo(25), "many " * 80)
    save(source, "latin.jpg", photo(26), None)
    (source / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    see_through = photo(27).convert("RGBA")
    see_through.putalpha(Image.new("L", see_through.size, 128))
    save(source, "see-through.png", see_through)
    os.mkfifo(source / "pipe.jpg")
    (source / "link.jpg").symlink_to("/etc/hostname")
    return source


def prepare(source: Path | str, output: Path, *more: str) -> dict:
    main([f"source={source}", f"output={output}", "resolution=192", *more])
    return json.loads((output / "report.json").read_text())


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def everything_named(report: dict) -> dict[str, str]:
    named = {bad["id"]: bad["reason"] for bad in report["rejected"]}
    for by, rows in report["removed"].items():
        named |= {row["id"]: f"{by}: {row['reason']}" for row in rows}
    for kind, odd in report["oddities"].items():
        named |= {name: kind for name in odd["ids"]}
    return named | {cut["id"]: "too many tokens" for cut in report["captions"]["longest_cut"]}


def test_every_problem_of_a_real_folder_is_named_and_the_source_is_untouched(troubled, tmp_path):
    before = tree(troubled)
    output = tmp_path / "out"
    report = prepare(troubled, output, "smallest=64", "max_aspect=3")
    expected = {
        "sideways.jpg": "sideways",
        "truncated.jpg": "truncated",
        "empty.jpg": "is empty",
        "text.jpg": "not a picture",
        "print.jpg": "cmyk",
        "small-copy.jpg": "shows the same as sub/01.jpg",
        "mirrored.png": "shows the same as sub/02.jpg (mirrored",
        "sub/same.jpg": "the same file",
        "tiny.png": "40 x 40 pixels, a side under 64",
        "panorama.jpg": "6 to 1, over 3 to 1",
        "speechless.jpg": "has no caption: write one, or set caption",
        "wordy.jpg": "too many tokens",
        "latin.jpg": "not UTF-8",
        "see-through.png": "transparent",
        "pipe.jpg": "not a regular file",
        "link.jpg": "outside",
    }
    named = everything_named(report)
    assert {
        name: named.get(name, "") for name in expected if expected[name] not in named[name]
    } == {}
    assert named.keys() == expected.keys()
    page = (output / "report.html").read_text()
    assert all(name in page for name in expected)
    assert tree(troubled) == before


def test_the_result_is_an_ordinary_folder_of_the_kept_pictures(troubled, tmp_path):
    report = prepare(troubled, tmp_path / "out", "held_out=3", "smallest=64")
    train, held_out = (scan(tmp_path / "out" / name) for name in ("train", "held-out"))
    assert len(train.table) == report["counts"]["train"]
    assert len(held_out.table) == 3 == report["counts"]["held_out"]
    rows = [json.loads(line) for line in (tmp_path / "out/pictures.jsonl").open()]
    for name, found in (("train", train), ("held-out", held_out)):
        assert {row["id"] for row in rows if row.get("set") == name} == set(
            found.table.column("id")
        )
    original = {record.id: record for record in scan(troubled, on_bad="report").table}
    for record in (*train.table, *held_out.table):
        assert (record.sha256, record.captions) == (
            original[record.id].sha256,
            original[record.id].captions,
        )
        assert os.path.samefile(record.path, original[record.id].path)


def test_masks_depth_focus_and_several_captions_are_carried_along(source, tmp_path):
    picture = source / "sub/04.jpg"
    Image.new("L", (256, 192), 255).save(source / "sub/04.mask.png")
    for number in range(12):
        Image.new("L", (256, 192), number).save(source / f"sub/{number:02d}.depth.png")
    picture.with_suffix(".txt").write_text("one caption\nanother one\n")
    (source / "sub/04.focus.json").write_text('{"x": 0.25, "y": 0.75}')
    (source / "masks").mkdir()
    save(source / "masks", "carnival.jpg", photo(30))
    Image.new("L", (256, 192), 30).save(source / "masks/carnival.depth.png")
    prepare(source, tmp_path / "out", "masks=true", "depth=true", "files=copy", "crop=focus")
    found = scan(tmp_path / "out/train", masks=True, depth=True).table
    record: Record = next(record for record in found if record.id == "sub/04.jpg")
    assert record.captions == ("one caption", "another one")
    assert record.focus == (0.25, 0.75)
    assert Path(record.mask).read_bytes() == (source / "sub/04.mask.png").read_bytes()
    assert Path(record.depth).read_bytes() == (source / "sub/04.depth.png").read_bytes()
    assert not os.path.samefile(record.path, picture)
    assert len(found) == 13 and all(record.depth for record in found)


def test_the_same_command_again_changes_nothing(troubled, tmp_path):
    prepare(troubled, tmp_path / "out", "held_out=0.3")
    before = tree(tmp_path / "out")
    prepare(troubled, tmp_path / "out", "held_out=0.3")
    after = tree(tmp_path / "out")
    # The index also knows when a file was last linked to, and learns it in the second run.
    assert {name: content for name, (_, content) in before.items() if name != "index.arrow"} == {
        name: content for name, (_, content) in after.items() if name != "index.arrow"
    }
    pictures = [name for name in before if name.endswith((".jpg", ".png"))]
    assert pictures and all(before[name][0] == after[name][0] for name in pictures)


def test_what_is_no_longer_chosen_goes_and_what_others_put_there_stays(source, tmp_path):
    output = tmp_path / "out"
    prepare(source, output)
    (output / "train/mine.txt").write_text("mine")
    (source / "sub/00.jpg").unlink()
    save(source, "sub/new.jpg", photo(40))
    prepare(source, output)
    names = {path.name for path in (output / "train").rglob("*") if path.is_file()}
    expected = {f"{number:02d}.jpg" for number in range(1, 12)}
    assert names == expected | {"new.jpg", "mine.txt", "metadata.jsonl"}
    # A file that nobody here wrote is never overwritten.
    save(source, "sub/other.jpg", photo(41))
    (output / "train/sub/other.jpg").write_bytes(b"precious")
    with pytest.raises(UserError, match="train/sub/other.jpg, which this command did not put"):
        prepare(source, output)
    assert (output / "train/sub/other.jpg").read_bytes() == b"precious"


def test_a_link_in_the_source_becomes_the_file_that_it_leads_to(source, tmp_path):
    (source / "linked.jpg").symlink_to("sub/05.jpg")
    (source / "linked.txt").write_text("the same again")
    prepare(source, tmp_path / "out", "duplicates=report")
    target = tmp_path / "out/train/linked.jpg"
    assert not target.is_symlink() and os.path.samefile(target, source / "sub/05.jpg")
    target.unlink()
    target.symlink_to("sub/05.jpg")  # as an earlier version of this wrote it
    prepare(source, tmp_path / "out", "duplicates=report")
    assert not target.is_symlink() and len(scan(tmp_path / "out/train").table) == 13


def test_links_become_copies_and_damaged_files_are_mended(source, tmp_path):
    picture, target = source / "sub/04.jpg", tmp_path / "out/train/sub/04.jpg"
    prepare(source, tmp_path / "out")
    assert os.path.samefile(picture, target)
    prepare(source, tmp_path / "out", "files=copy")
    assert not os.path.samefile(picture, target)
    target.write_bytes(b"damaged")
    prepare(source, tmp_path / "out", "files=copy")
    assert target.read_bytes() == picture.read_bytes()
    content = bytearray(target.read_bytes())
    content[1000] ^= 1
    target.write_bytes(content)
    prepare(source, tmp_path / "out", "files=copy")
    assert target.read_bytes() == picture.read_bytes()
    prepare(source, tmp_path / "out")
    assert os.path.samefile(picture, target)


@pytest.mark.parametrize("files", ["link", "copy"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_picture_that_changes_after_the_scan_is_not_taken_for_what_it_was(
    source, tmp_path, monkeypatch, files, gone
):
    import scripts.prepare

    def meanwhile(*arguments, **options):
        if gone:
            (source / "sub/02.jpg").unlink()
        else:
            shutil.copy(source / "sub/01.jpg", source / "sub/02.jpg")
        publish(*arguments, **options)

    publish = scripts.prepare.publish
    monkeypatch.setattr(scripts.prepare, "publish", meanwhile)
    with pytest.raises(UserError, match=r"02\.jpg was changed while .* run this again"):
        prepare(source, tmp_path / "out", f"files={files}")
    monkeypatch.undo()
    prepare(source, tmp_path / "out", f"files={files}")
    assert not (tmp_path / "out/train/sub/02.jpg").exists()  # a duplicate now, or gone


def test_a_folder_can_become_a_picture_and_a_picture_a_folder(source, tmp_path):
    save(source, "x.jpg/y.jpg", photo(40))
    save(source, "z.jpg", photo(41))
    prepare(source, tmp_path / "out")
    shutil.rmtree(source / "x.jpg")
    (source / "z.jpg").unlink()
    save(source, "x.jpg", photo(42))
    save(source, "z.jpg/y.jpg", photo(43))
    prepare(source, tmp_path / "out")
    train = tmp_path / "out/train"
    assert (train / "x.jpg").is_file() and (train / "z.jpg/y.jpg").is_file()
    assert len(scan(train).table) == 14
    # Not where somebody else has put something there.
    shutil.rmtree(source / "z.jpg")
    save(source, "z.jpg", photo(44))
    (train / "z.jpg/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds train/z.jpg/mine.txt, which this command did not"):
        prepare(source, tmp_path / "out")


def test_names_that_metadata_could_mistake_are_read_back(source, tmp_path):
    for number, name in enumerate(["a\\b", "line\nbreak", "cafe\u0301", "100% #?", "http:/x"]):
        save(source, f"{name}.jpg", photo(50 + number))
    prepare(source, tmp_path / "out")
    assert len(scan(tmp_path / "out/train").table) == 17


def test_names_that_are_not_utf8_are_named_and_refused_as_output(source, tmp_path):
    shutil.copy(source / "sub/00.jpg", os.fsencode(source) + b"/odd\xff.jpg")
    report = prepare(source, tmp_path / "out")
    assert report["counts"]["rejected"] == 1 and "odd" in report["rejected"][0]["id"]
    with pytest.raises(UserError, match="output.* is not UTF-8"):
        prepare(source, os.fsdecode(os.fsencode(tmp_path) + b"/out\xff"))


def test_two_runs_do_not_write_to_one_output(source, tmp_path):
    from data.prepared import alone

    prepare(source, tmp_path / "out")
    with alone(tmp_path / "out"), pytest.raises(UserError, match="written by another run"):
        prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out")


def test_a_report_without_files_says_what_it_left(source, tmp_path):
    prepare(source, tmp_path / "out")
    report = prepare(source, tmp_path / "out", "files=none", "duplicates=off")
    assert any("files=none left the 13 files" in each["text"] for each in report["warnings"])
    assert len(scan(tmp_path / "out/train").table) == 12


def test_an_animation_cut_after_its_first_frame_is_looked_at(source, tmp_path):
    frames = [photo(number) for number in (30, 31, 32)]
    path = save(source, "cut.gif", frames[0], save_all=True, append_images=frames[1:])
    content = path.read_bytes()
    for end in range(len(content) // 2, len(content), len(content) // 11):
        path.write_bytes(content[:end])
        report = prepare(source, tmp_path / "out", "files=none")
        assert report["counts"]["train"] == 13
        assert report["oddities"]["animated"]["ids"] == ["cut.gif"]


def test_a_picture_that_cannot_be_looked_at_is_named(source, tmp_path, monkeypatch):
    import data.fingerprints

    def broken(*arguments, **options):
        raise SyntaxError("broken chunk")

    monkeypatch.setattr(data.fingerprints, "open_image", broken)
    with pytest.raises(UserError, match=r"00\.jpg cannot be decoded: broken chunk: mend it"):
        prepare(source, tmp_path / "out")


def test_a_run_that_was_broken_off_goes_on(source, tmp_path, monkeypatch):
    import data.prepared

    put, count = data.prepared._put, 0

    def failing(*arguments, **options):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        put(*arguments, **options)

    monkeypatch.setattr(data.prepared, "_put", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out")
    assert len(list((tmp_path / "out/train").rglob("*.jpg"))) == 5
    monkeypatch.undo()
    prepare(source, tmp_path / "out")
    assert len(scan(tmp_path / "out/train").table) == 12


def test_a_held_out_set_that_exists_is_kept_apart(source, tmp_path):
    save(tmp_path / "held", "first.png", ImageOps.mirror(photo(5)).resize((128, 96)), None)
    against = f"against={tmp_path / 'held'}"
    report = prepare(source, tmp_path / "out", against, "duplicates=report")
    assert "held shows, so an evaluation" in report["warnings"][0]["text"]
    assert report["counts"]["train"] == 12
    report = prepare(source, tmp_path / "out", against)
    assert [row["id"] for row in report["removed"]["against"]] == ["sub/05.jpg"]
    assert not (tmp_path / "out/train/sub/05.jpg").exists()


def test_what_cannot_be_read_of_a_held_out_set_is_said(source, tmp_path):
    save(tmp_path / "held", "good.png", photo(70), None)
    (tmp_path / "held/bad.jpg").write_text("hello")
    report = prepare(source, tmp_path / "out", f"against={tmp_path / 'held'}")
    assert report["against"]["pictures"] == 1
    assert [bad["id"] for bad in report["against"]["rejected"]] == ["bad.jpg"]
    assert any("1 file in" in w["text"] and "(bad.jpg)" in w["text"] for w in report["warnings"])
    (tmp_path / "held/good.png").unlink()
    for folder in (tmp_path / "held", tmp_path / "none"):
        with pytest.raises(UserError, match=f"against={folder}") as error:
            prepare(source, tmp_path / "out", f"against={folder}")
        assert "data." not in str(error.value)


def sets(output: Path) -> dict[str, str]:
    rows = (output / "pictures.jsonl").read_text().splitlines()
    return {row["id"]: row["set"] for row in map(json.loads, rows) if "set" in row}


def test_no_other_setting_moves_a_picture_between_the_sets(source, tmp_path):
    for number in range(12):
        save(source, f"small-{number}.jpg", photo(number).resize((128, 96)))
    found = []
    for number, option in enumerate(["duplicates=remove", "duplicates=report", "smallest=150"]):
        prepare(source, tmp_path / str(number), "held_out=0.4", option)
        found.append(sets(tmp_path / str(number)))
    assert {"train", "held-out"} == set(found[0].values())
    for one in found[1:]:
        assert {name: one[name] for name in found[0]} == found[0]


@pytest.mark.parametrize("held_out", ["0.4", "4"])
def test_a_better_twin_stays_on_the_side_of_the_picture_it_replaces(source, tmp_path, held_out):
    options = f"held_out={held_out}", "duplicates=remove"
    prepare(source, tmp_path / "out", *options)
    before = sets(tmp_path / "out")
    for number in range(12):
        save(source, f"large-{number:02d}.png", photo(number).resize((512, 384)))
    prepare(source, tmp_path / "out", *options)
    after = sets(tmp_path / "out")
    assert after == {f"large-{name[4:6]}.png": side for name, side in before.items()}
    prepare(source, tmp_path / "out", f"held_out={held_out}", "duplicates=off")
    both = sets(tmp_path / "out")
    assert both == before | after


def test_near_duplicates_are_held_out_together(source, tmp_path):
    for number in range(6):
        save(source, f"copy-{number}.jpg", photo(number).resize((128, 96)))
    for seed in range(3):
        prepare(source, tmp_path / "out", "held_out=0.5", "duplicates=report", f"seed={seed}")
        rows = (tmp_path / "out/pictures.jsonl").read_text().splitlines()
        sets = {row["id"]: row["set"] for row in map(json.loads, rows)}
        assert len(set(sets.values())) == 2
        assert all(sets[f"copy-{n}.jpg"] == sets[f"sub/{n:02d}.jpg"] for n in range(6))


def test_scores_choose_and_are_reported(source, tmp_path):
    clip = tiny_clip(tmp_path / "clip")
    options = [f"clip.model={clip}", "files=none", "score_batch_size=5"]
    report = prepare(source, tmp_path / "out", *options)
    median = report["scores"]["clip"]["median"]
    assert sum(report["scores"]["clip"]["pictures"]) == 12
    report = prepare(source, tmp_path / "out", *options, f"clip.minimum={median}")
    assert report["counts"]["removed"] == {"clip": 6}
    assert "under" in report["removed"]["clip"][0]["reason"]
    assert not (tmp_path / "out/train").exists()


def test_tokens_are_counted_by_the_tokenizer_that_is_given(source, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "base/tokenizer")
    save(source, "long.jpg", photo(50), "x" * 90)
    report = prepare(source, tmp_path / "out", f"tokenizer={tmp_path / 'base'}", "files=none")
    assert [cut["id"] for cut in report["captions"]["longest_cut"]] == ["long.jpg"]
    estimated = prepare(source, tmp_path / "out", "files=none")
    assert estimated["captions"]["cut"] == 0 and not estimated["captions"]["exact"]


def test_small_pictures_are_left_out_where_none_may_be_enlarged(source, tmp_path):
    save(source, "small.png", photo(60, (60, 60)))
    report = prepare(source, tmp_path / "out", "upscale=false", "files=none")
    assert [row["id"] for row in report["removed"]["upscale"]] == ["small.png"]
    assert report["geometry"]["enlarged"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["source={0}/source", "output={0}/source/out"], "overlap"),
        (["source={0}/source/sub", "output={0}/source"], "overlap"),
        (["source={0}/none", "output={0}/out"], "source={0}/none does not exist"),
        (["source={0}/source", "output={0}/out", "held_out=1.5"], "a whole number"),
        (["source={0}/source", "output={0}/out", "held_out=12"], "none to train on"),
        (["source={0}/source", "output={0}/out", "tokenizer={0}"], "no vocab.json"),
        (["source={0}/source", "output={0}/out", "background=[300, -5, 0]"], "from 0 to 255"),
        (["source={0}/source", "output={0}/out", "smalest=3"], "did you mean 'smallest'"),
        (["source={0}/source", "output={0}/out", "smallest=999"], "no picture is left"),
    ],
)
def test_mistakes_are_answered_with_a_remedy(source, tmp_path, options, message):
    with pytest.raises(UserError) as error:
        main([option.format(tmp_path) for option in options])
    assert message.format(tmp_path) in str(error.value)


def test_bad_pictures_abort_or_are_put_aside_where_that_is_asked_for(source, tmp_path):
    (source / "empty.jpg").write_bytes(b"")
    (source / "empty.txt").write_text("x")
    (source / "text.jpg").write_text("hello")
    (source / "text.txt").write_text("x")
    with pytest.raises(UserError, match="on_bad_image=report"):
        prepare(source, tmp_path / "out", "on_bad_image=abort")
    prepare(source, tmp_path / "out", "on_bad_image=quarantine")
    assert (tmp_path / "out/quarantine/text.jpg").read_text() == "hello"


def test_rows_of_a_dataset_become_files_of_their_kind(tmp_path):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    rows = {"image": [photo(number) for number in range(3)], "text": ["a", "b", "c"]}
    features = Features({"image": ImageColumn(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    prepare(tmp_path / "rows", tmp_path / "out")
    found = scan(tmp_path / "out/train").table
    assert sorted(record.captions[0] for record in found) == ["a", "b", "c"]
    pixels = {np.asarray(Image.open(record.path).convert("RGB")).tobytes() for record in found}
    assert pixels == {np.asarray(photo(number)).tobytes() for number in range(3)}
    before = tree(tmp_path / "out/train")
    prepare(tmp_path / "rows", tmp_path / "out")
    after = tree(tmp_path / "out/train")
    assert all(after[name] == before[name] for name in before if name != "metadata.jsonl")


def test_an_output_that_holds_something_else_is_refused(tmp_path):
    source = tmp_path / "source"
    toy.write_pictures(source, 3, seed=0)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "report.html").write_text("of a run")
    with pytest.raises(UserError, match="holds something else"):
        main([f"source={source}", f"output={run}"])
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "report.html"]


@pytest.mark.parametrize(
    ("limit", "model"),
    [
        ("aesthetic.minimum=6", "aesthetic.head"),
        ("clip.minimum=0.2", "clip.model"),
        ("nsfw.maximum=0.3", "nsfw.model"),
    ],
)
def test_a_limit_without_what_measures_it_is_refused(tmp_path, limit, model):
    with pytest.raises(UserError, match=f"{model} is not"):
        main([f"source={tmp_path}", f"output={tmp_path / 'out'}", limit])


def test_a_written_configuration_is_one_that_is_read(tmp_path):
    needed = [f"source={tmp_path}", f"output={tmp_path / 'out'}"]
    config = load(PrepareConfig, needed)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(PrepareConfig, [f"--config={tmp_path / 'again.yaml'}"]) == config

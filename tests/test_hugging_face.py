"""data/hugging_face.py and data/columns.py: rows of a dataset as records."""

import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import hugging_face
from data.hugging_face import is_dataset
from data.sources import scan
from tests.hf_sets import dataset, loaded_before, parquet, picture
from tests.runs import ROOT
from train.config import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return tmp_path / "cache"


@pytest.fixture
def saved(tmp_path):
    """Saves a dataset and gives its path."""

    def save(rows=None, name="saved"):
        (rows or dataset()).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    return save


def complaint(*args, **options):
    with pytest.raises(UserError) as caught:
        scan(*args, **options)
    return str(caught.value)


def test_only_datasets_are_taken_for_one(tmp_path, saved):
    assert is_dataset("hf:someone/set") and is_dataset(saved())
    assert is_dataset(str(parquet(tmp_path / "pq", 1)))
    assert is_dataset(str(tmp_path / "pq/data/train-00000-of-00001.parquet"))
    other = tmp_path / "other"
    other.mkdir()
    dataset(1).to_parquet(other / "metadata.parquet")
    datasets.Dataset.from_dict({"vector": [b"abc"]}).to_parquet(other / "vectors.parquet")
    (other / "broken.parquet").write_bytes(b"PAR1")
    (other / "state.json").write_text("{}")
    os.mkfifo(other / "pipe.parquet")
    assert not is_dataset(str(other)) and not is_dataset(str(tmp_path / "nowhere"))


def test_rows_become_records_and_their_bytes_are_as_they_were(saved):
    found = scan(saved())
    assert [record.width for record in found.table] == [40, 41, 42]
    assert [record.captions for record in found.table] == [(f"picture {w}",) for w in (40, 41, 42)]
    assert [record.read() for record in found.table] == [picture(w) for w in (40, 41, 42)]
    assert [record.id for record in found.table] == sorted(record.id for record in found.table)
    assert "save_to_disk" in found.recognised and "column image" in found.recognised


def test_pictures_are_turned_by_nobody_else(saved):
    turned = [{"bytes": picture(50, orientation=6), "path": None}]
    (record,) = scan(saved(dataset(1, image=turned))).table
    assert (record.width, record.height) == (30, 50)
    assert record.read() == turned[0]["bytes"]


def test_another_process_reads_the_same_bytes(saved):
    record = scan(saved()).table[1]
    code = "import sys; from data.hugging_face import read_row; print(read_row(sys.argv[1]).hex())"
    where = record.location.removeprefix("row:")
    result = subprocess.run(
        [sys.executable, "-c", code, where], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == picture(41).hex()


def test_a_row_that_is_gone_is_said(saved, tmp_path):
    record = scan(saved()).table[0]
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    hugging_face._kept_open.cache_clear()
    with pytest.raises(UserError, match="run the command again"):
        record.read()


def test_parquet_files_are_read_in_their_order(tmp_path):
    folder = parquet(tmp_path / "pq", 3, 1, 2)
    assert [record.width for record in scan(folder).table] == [40, 41, 42, 43, 44, 45]
    single = folder / "data" / "train-00001-of-00003.parquet"
    assert [record.width for record in scan(single).table] == [43]


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path, saved):
    folder = parquet(tmp_path / "pq", 2)
    parquet(folder, 1, split="test", first=90)
    assert [record.width for record in scan(folder, split="test").table] == [90]
    message = complaint(folder, split="validation")
    assert "data.split=validation" in message and "train, test" in message
    assert "data.split=train" in complaint(saved(), split="test")


def test_a_second_scan_reads_no_picture_again(saved, tmp_path, monkeypatch):
    path, index = saved(), tmp_path / "index.arrow"
    before = list(scan(path, index=index).table)
    monkeypatch.setattr(hugging_face, "decoded_size", lambda content: 1 / 0)
    assert list(scan(path, index=index).table) == before
    other = scan(path, index=index, caption="all", caption_column=None).table
    assert [record.sha256 for record in other] == [record.sha256 for record in before]
    saved(dataset(3, first=60))
    assert "division" in complaint(path, index=index)


def test_an_edited_parquet_file_is_read_anew(tmp_path):
    folder, index = parquet(tmp_path / "pq", 2), tmp_path / "index.arrow"
    scan(folder, index=index)
    parquet(folder, 2, first=70)
    found = scan(folder, index=index)
    assert [record.width for record in found.table] == [70, 71]
    assert [record.read() for record in found.table] == [picture(70), picture(71)]


def test_bad_rows_are_named_with_their_reasons(saved):
    contents = [picture(), b"", b"no picture", picture()[:200], None, picture(), picture()]
    rows = dataset(
        image=[None if c is None else {"bytes": c, "path": None} for c in contents],
        text=["good", "a", "b", "c", "d", " \n", "nul\0"],
    )
    path = saved(rows)
    found = scan(path, on_bad="report")
    assert [record.captions for record in found.table] == [("good",)]
    reasons = {bad.id: bad.reason for bad in found.rejected}
    words = ["is empty", "not a picture", "Truncated", "no picture", "no caption", "NUL"]
    assert len(reasons) == 6
    for number, word in enumerate(words, start=1):
        assert word in reasons[f"row {number:08d}"]
    message = complaint(path)
    assert "row 00000003" in message and "on_bad_image" in message
    assert any("left out (6)" in note for note in found.notes)


def test_a_caption_that_is_too_long_or_not_utf8_is_of_its_row(saved, tmp_path):
    path = saved(dataset(2, text=["good", "x" * (1 << 17)]))
    found = scan(path, on_bad="report")
    assert len(found.table) == 1 and "more than 65536" in found.rejected[0].reason
    pictures = [{"bytes": picture(), "path": "x"}] * 2
    texts = pa.array([b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"image": pictures, "text": texts}), tmp_path / "latin.parquet")
    found = scan(tmp_path / "latin.parquet", on_bad="report")
    assert found.table[0].captions == ("fine",) and "UTF-8" in found.rejected[0].reason


def test_captions_may_be_several_or_one_for_all(saved):
    path = saved(dataset(2, text=[["a  cat", "", "a\npet"], []]))
    first, second = scan(path, caption="a thing").table
    assert first.captions == ("a cat", "a pet") and second.captions == ("a thing",)


def test_a_row_may_name_a_file_of_its_own_folder_only(saved, tmp_path):
    inside, outside = tmp_path / "saved" / "one.jpg", tmp_path / "outside.jpg"
    os.mkdir(tmp_path / "saved")
    os.mkfifo(tmp_path / "saved" / "pipe.jpg")
    inside.write_bytes(picture())
    outside.write_bytes(picture())
    names = [str(inside), "one.jpg", str(outside), "../outside.jpg", "pipe.jpg", "gone.jpg"]
    names += [outside.as_uri(), "https://example.org/one.jpg", "/proc/self/environ"]
    rows = datasets.Dataset.from_dict(
        {"image": [{"path": name, "bytes": None} for name in names], "text": names},
        features=datasets.Features(
            {
                "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                "text": datasets.Value("string"),
            }
        ),
    )
    found = scan(saved(rows), on_bad="report")
    assert [record.captions[0] for record in found.table] == names[:2]
    assert all(record.path == inside for record in found.table)
    reasons = " | ".join(bad.reason for bad in found.rejected)
    assert reasons.count("outside the dataset's folder") == 3
    assert "not a regular file" in reasons and "cannot be reached" in reasons
    assert reasons.count("not on this machine") == 2


def test_links_out_of_a_dataset_are_refused(tmp_path):
    folder = parquet(tmp_path / "pq", 1)
    file = next((folder / "data").iterdir())
    file.rename(tmp_path / "elsewhere.parquet")
    file.symlink_to(tmp_path / "elsewhere.parquet")
    assert "outside the dataset's folder" in complaint(folder)


def test_columns_are_chosen_or_asked_for(saved):
    pair = dataset(1, image_depth=[{"bytes": picture(99), "path": None}], prompt=["other"])
    path = saved(pair, "pair")
    found = scan(path)
    assert found.table[0].width == 40 and "image_depth, prompt" in found.notes[0]
    asked = scan(path, image_column="image_depth", caption_column="prompt").table[0]
    assert (asked.width, asked.captions) == (99, ("other",))
    assert "data.image_column=text" in complaint(path, image_column="text")
    assert "image, text" in complaint(path, caption_column="title")
    several = saved(pair.rename_column("image", "image_a"), "several")
    assert "image_a, image_depth" in complaint(several)
    numbers = saved(dataset(1, text=[3]), "numbers")
    assert "int64" in complaint(numbers)
    bare = saved(dataset(1).remove_columns("text"), "bare")
    assert "data.caption" in complaint(bare)
    assert scan(bare, caption="a thing").table[0].captions == ("a thing",)
    assert "no column of pictures" in complaint(saved(dataset(1).remove_columns("image"), "none"))


def test_plain_bytes_named_like_a_picture_are_one(saved):
    rows = datasets.Dataset.from_dict({"jpg": [picture()], "txt": ["a thing"]})
    found = scan(saved(rows)).table[0]
    assert found.read() == picture() and found.captions == ("a thing",)


def test_a_dataset_on_the_hub_that_was_loaded_before_is_found_offline(tmp_path, cache):
    path = loaded_before(cache, parquet(tmp_path / "pq", 2), "someone", "pictures")
    found = scan(path)
    assert [record.width for record in found.table] == [40, 41]
    assert found.table[1].read() == picture(41) and "hub" in found.recognised
    assert "data.split=test" in complaint(path, split="test")


def test_troubles_with_the_hub_are_said_with_a_remedy(tmp_path, monkeypatch):
    assert "HF_HUB_OFFLINE" in complaint("hf:someone/unknown")
    assert "hf:OWNER/NAME" in complaint("hf:only-a-name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "set").mkdir(parents=True)
    assert "lies here" in complaint("hf:someone/set")
    for error, words in (
        (datasets.exceptions.DatasetNotFoundError("It is a gated dataset."), "hf auth login"),
        (ValueError("Config name is missing."), "hf:OWNER/NAME:PART"),
        (OSError("Not enough disk space."), "Not enough disk space"),
    ):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(datasets, "load_dataset_builder", fail)
        assert words in complaint("hf:someone/other")


def test_no_code_of_a_dataset_is_run(tmp_path):
    folder = parquet(tmp_path / "pq", 1)
    (folder / "pq.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    complaint(folder)
    assert not (tmp_path / "canary").exists()

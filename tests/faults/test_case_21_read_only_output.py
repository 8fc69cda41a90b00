"""Case 21: the output cannot be written -> the run is refused before the model loads."""

import os

import pytest

from tests.faults.light import complaint, contents
from tests.faults.mounts import needs_mounts, read_only
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "a file is made, and gone again, where the output is to be",
        "train/rundir.py",
        "with tempfile.TemporaryFile(dir=parent):",
        "if True:",
    ),
]


@needs_mounts
@pytest.mark.parametrize("output", ["run", "."], ids=["new", "there"])
@pytest.mark.parametrize("more", [[], ["dry_run=true"]], ids=["run", "dry run"])
def test_an_output_on_a_read_only_disk_is_refused(world, tmp_path, output, more):
    folder = tmp_path / "disk"
    folder.mkdir()
    values = arguments(world, folder / output, *more)
    said = complaint("train/lora.py", *values, within=read_only(folder))
    assert f"output={folder / output}" in said and "Read-only file system" in said
    assert "another output=" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused(world, tmp_path):
    (tmp_path / "disk").mkdir(mode=0o555)
    said = complaint("train/lora.py", *arguments(world, tmp_path / "disk/run"))
    assert f"output={tmp_path / 'disk/run'}" in said and "Permission denied" in said


def test_an_output_below_a_file_is_refused(world, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    said = complaint("train/lora.py", *arguments(world, tmp_path / "file/run"))
    assert f"output={tmp_path / 'file/run'}" in said
    assert contents(tmp_path) == before

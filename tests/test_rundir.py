import json
import os
import shutil
from collections import namedtuple

import pytest
import yaml

from train import rundir
from train.config import DreamBoothRun, LoraRun, UserError, load, validate


def config(output, **changes):
    values = {"output": str(output), "data": {"path": "pictures"}, "train": {"steps": 7}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return validate(LoraRun, values, where="the test")


def trained(folder, wanted):
    """A run directory with a checkpoint: only then is it bound to its configuration."""
    rundir.create(wanted, {"base": {"sha256": {"unet": "a"}}, "dataset": {"sha256": "b"}})
    (folder / "checkpoints/step-00000002").mkdir(parents=True)


def test_a_run_that_never_trained_does_not_bind_its_directory(tmp_path):
    rundir.create(config(tmp_path, model__path="mistyped"), {})
    assert rundir.check(config(tmp_path, model__path="right"), result="adapter") is False


def test_another_base_or_other_pictures_are_refused_on_resume(tmp_path):
    trained(tmp_path, config(tmp_path))
    same = {"base": {"sha256": {"unet": "a"}}, "dataset": {"sha256": "b"}}
    rundir.check_unchanged(tmp_path, same)
    with pytest.raises(UserError, match="dataset: 'b' -> 'c'"):
        rundir.check_unchanged(tmp_path, same | {"dataset": {"sha256": "c"}})
    with pytest.raises(UserError, match="base.unet: 'a' -> 'z'"):
        rundir.check_unchanged(tmp_path, same | {"base": {"sha256": {"unet": "z"}}})


def test_a_new_directory_is_not_finished_and_checking_writes_nothing(tmp_path):
    assert rundir.check(config(tmp_path / "a/b"), result="adapter") is False
    assert not list(tmp_path.iterdir())


def test_the_written_configuration_repeats_the_run(tmp_path):
    wanted = config(tmp_path / "run", optim__learning_rate=3e-5, lora__targets=["proj"])
    rundir.create(wanted, {"processes": 1})
    assert load(LoraRun, ["--config", str(tmp_path / "run/config.yaml")]) == wanted
    assert sorted(os.listdir(tmp_path / "run")) == ["config.yaml", "manifest.json"]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["processes"] == 1
    assert manifest["packages"]["torch"] and manifest["python"]


def test_a_run_is_finished_once_its_result_and_last_checkpoint_are_there(tmp_path):
    wanted = config(tmp_path)
    rundir.create(wanted, {})
    (tmp_path / "adapter").mkdir()
    assert not rundir.check(wanted, result="adapter")
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    assert rundir.check(wanted, result="adapter")
    assert not rundir.check(wanted, result="full")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"train__steps": 8}, "train.steps: 7 -> 8"),
        ({"optim__learning_rate": 0.5}, "optim.learning_rate: 0.0001 -> 0.5"),
        ({"lora__targets": ["proj"]}, "lora.targets: ['attention'] -> ['proj']"),
        ({"model__path": "other"}, "model.path: .* -> 'other'"),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(tmp_path, change, line):
    trained(tmp_path, config(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        rundir.check(config(tmp_path, **change), result="adapter")
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"dry_run": True},
        {"train__micro_batch_size": 1},
        {"train__gradient_checkpointing": True},
        {"checkpoint__every": 3},
        {"preview__every": 4},
        {"evaluation__images": 4},
        {"data__workers": 0},
        {"tracking__every": 1},
    ],
)
def test_what_does_not_change_the_training_may_change(tmp_path, change):
    trained(tmp_path, config(tmp_path))
    assert rundir.check(config(tmp_path, **change), result="adapter") is False


def test_a_moved_run_directory_resumes(tmp_path):
    trained(tmp_path / "old", config(tmp_path / "old"))
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert rundir.check(config(tmp_path / "new"), result="adapter") is False


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just text", b""])
def test_a_damaged_configuration_is_the_users_to_mend(tmp_path, content):
    trained(tmp_path, config(tmp_path))
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="config.yaml"):
        rundir.check(config(tmp_path), result="adapter")


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        rundir.check(config(tmp_path / "run"), result="adapter")


def test_a_read_only_place_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="read-only"):
        rundir.check(config(tmp_path / "run"), result="adapter")


def test_too_little_space_is_told_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10 * 2**30, 8 * 2**30, 2 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    rundir.check_space(tmp_path / "not/yet", 2 * 2**30, what="checkpoints")
    with pytest.raises(UserError, match="checkpoints: 3.00 GiB needed, 2.00 GiB free"):
        rundir.check_space(tmp_path / "not/yet", 3 * 2**30, what="checkpoints")


def test_keys_of_other_versions_are_passed_over(tmp_path):
    wanted = config(tmp_path)
    trained(tmp_path, wanted)
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["optim"]["decay"], old["validation"]
    old |= {"gone": 1, "train": old["train"] | {"gone": {"too": 2}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert rundir.check(wanted, result="adapter") is False


BLOCKS, OTHERS = {"up_blocks.*": 1}, {"down_blocks.*": 1}


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ({"blocks": BLOCKS}, {}, "lora.blocks"),
        ({}, {"blocks": BLOCKS}, "lora.blocks"),
        ({"blocks": BLOCKS}, {"blocks": OTHERS}, "lora.blocks"),
        ({"blocks": BLOCKS}, {"blocks": BLOCKS | OTHERS}, "lora.blocks"),
        ({"text_encoder": {}}, {}, "lora.text_encoder"),
        ({}, {"text_encoder": {}}, "lora.text_encoder"),
        ({"text_encoder": {}}, {"text_encoder": {"rank": 2}}, "lora.text_encoder.rank"),
        (None, {}, "lora"),
        ({}, None, "lora"),
    ],
)
def test_a_section_that_may_be_left_out_is_compared_too(tmp_path, before, after, key):
    def run(lora):
        values = {"output": str(tmp_path), "data": {"path": "pictures"}, "lora": lora}
        return validate(DreamBoothRun, values | {"dreambooth": {"prior": "none"}}, where="test")

    trained(tmp_path, run(before))
    assert rundir.check(run(before), result="adapter") is False
    with pytest.raises(UserError, match=f"another configuration: {key}: [^;]* -> [^;]*$"):
        rundir.check(run(after), result="adapter")

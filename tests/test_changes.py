"""What a run that is resumed may have changed, and what is said of it."""

import pytest
import yaml

from tests.test_rundir import config
from train import changes, rundir
from train.config import DreamBoothRun, FullRun, LoraRun, UserError
from train.families import BaseModel, Family

BASE = BaseModel("base", "diffusers folder", Family(2, 4), "v_prediction")
SOURCE = {"name": "pictures", "path": "pictures", "pictures": 9, "sha256": "s"}
DATASET = {"sha256": "b", "sources": [SOURCE]}
HASHES = {"unet": "a", "vae": "v"}
AGREED = {"checkpoint": {"accept_changes": True}}


def trained(wanted, *, processes=1):
    """A run directory with a checkpoint: only then is it bound to what it began with."""
    base = {"family": "SD 2", "prediction_type": "v_prediction", "timesteps": 1000}
    manifest = {
        "base": base | {"sha256": HASHES},
        "dataset": DATASET,
        "processes": processes,
    }
    rundir.create(wanted, manifest)
    (wanted.output / "checkpoints/step-00000002").mkdir(parents=True)


def found(wanted, base=BASE, dataset=DATASET):
    return [str(change) for change in changes.since(wanted, base, dataset)]


def test_a_run_that_never_trained_does_not_bind_its_directory(tmp_path):
    rundir.create(config(tmp_path, model__path="mistyped"), {})
    assert found(config(tmp_path, model__path="right")) == []


def test_nothing_is_found_where_nothing_changed(tmp_path):
    trained(config(tmp_path))
    assert found(config(tmp_path)) == []
    assert changes.since_loaded(config(tmp_path), HASHES) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"optim__learning_rate": 0.5}, "optim.learning_rate: 0.0001 -> 0.5"),
        ({"model__path": "other"}, "model.path: .* -> 'other'"),
        ({"train__steps": 8}, r"train.steps: 7 -> 8 \(the learning rate's schedule spans"),
        ({"train__steps": 8, "optim__schedule": "constant"}, "train.steps: 7 -> 8;"),
        ({"lora__alpha": 2}, "lora.alpha: 8.0 -> 2.0"),
    ],
)
def test_another_configuration_needs_consent(tmp_path, change, line):
    trained(config(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=f"{line}.*checkpoint.accept_changes=true"):
        found(config(tmp_path, **change))
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert found(config(tmp_path, **change, **AGREED))


@pytest.mark.parametrize(
    "change",
    [
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
    trained(config(tmp_path))
    (found,) = changes.since(config(tmp_path, **change), BASE, DATASET)
    assert found.is_harmless and found.key == next(iter(change)).replace("__", ".")


def test_what_belongs_to_one_command_is_no_change(tmp_path):
    trained(config(tmp_path))
    assert found(config(tmp_path, dry_run=True, **AGREED)) == []


def test_a_moved_run_directory_resumes(tmp_path):
    trained(config(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    (change,) = changes.since(config(tmp_path / "new"), BASE, DATASET)
    assert change.key == "output" and change.is_harmless


def test_another_number_of_processes_is_noted(tmp_path, monkeypatch):
    trained(config(tmp_path), processes=2)
    assert found(config(tmp_path)) == ["processes: 2 -> 1"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert found(config(tmp_path)) == []


def test_other_class_pictures_are_told_from_other_pictures(tmp_path):
    trained(config(tmp_path))
    now = DATASET | {"sha256": "c", "classes": []}
    assert found(config(tmp_path, **AGREED), dataset=now) == [
        "dataset: 'b' -> 'c' (class pictures)"
    ]


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([SOURCE | {"pictures": 10, "sha256": "t"}], "pictures: 9 pictures -> 10"),
        ([SOURCE | {"sha256": "t"}], "pictures: other pictures, captions or sizes, as many"),
        ([SOURCE, SOURCE | {"name": "more"}], "new: more"),
        ([SOURCE | {"name": "other"}], "no more pictures; new: other"),
        ([SOURCE], "sha256"),
    ],
)
def test_other_pictures_are_told_by_their_source(tmp_path, sources, told):
    trained(config(tmp_path))
    now = {"sha256": "c", "sources": sources}
    line = f"dataset: 'b' -> 'c' ({told})"
    with pytest.raises(UserError) as caught:
        found(config(tmp_path), dataset=now)
    assert line in str(caught.value)
    assert found(config(tmp_path, **AGREED), dataset=now) == [line]


def test_another_base_needs_consent(tmp_path):
    trained(config(tmp_path))
    other = HASHES | {"unet": "z"}
    with pytest.raises(UserError, match="base.unet: 'a' -> 'z'.*accept_changes"):
        changes.since_loaded(config(tmp_path), other)
    (change,) = changes.since_loaded(config(tmp_path, **AGREED), other)
    assert change.key == "base.unet" and not change.is_harmless
    epsilon = BaseModel("base", "diffusers folder", Family(2, 4), "epsilon")
    with pytest.raises(UserError, match="base.prediction_type: 'v_prediction' -> 'epsilon'"):
        found(config(tmp_path), base=epsilon)


BLOCKS, OTHERS = {"up_blocks.*": 1}, {"down_blocks.*": 1}


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ({"blocks": BLOCKS}, {}, "lora.blocks"),
        ({}, {"blocks": BLOCKS}, "lora.blocks"),
        ({"blocks": BLOCKS}, {"blocks": OTHERS}, "lora.blocks"),
        ({"blocks": BLOCKS}, {"blocks": BLOCKS | OTHERS}, "lora.blocks"),
        ({}, {"rank": 2}, "lora.rank"),
        ({}, {"targets": ["proj"]}, "lora.targets"),
        ({}, {"dora": True}, "lora.dora"),
        ({"text_encoder": {}}, {}, "lora.text_encoder"),
        ({}, {"text_encoder": {}}, "lora.text_encoder"),
        ({"text_encoder": {}}, {"text_encoder": {"rank": 2}}, "lora.text_encoder.rank"),
        (None, {}, "lora"),
        ({}, None, "lora"),
    ],
)
def test_other_parameters_cannot_go_on_even_with_consent(tmp_path, before, after, key):
    def run(lora):
        return config(tmp_path, DreamBoothRun, lora=lora, dreambooth={"prior": "none"}, **AGREED)

    trained(run(before))
    assert found(run(before)) == []
    with pytest.raises(UserError, match=f"cannot go on with {key}: [^;]*$"):
        found(run(after))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optim__name": "adafactor"}, "optim.name"),
        ({"optim__decay": "all"}, "optim.decay"),
    ],
)
def test_another_optimizer_cannot_go_on(tmp_path, change, key):
    trained(config(tmp_path))
    with pytest.raises(UserError, match=f"cannot go on with {key}: .*besides: seed: 0 -> 1"):
        found(config(tmp_path, seed=1, **change, **AGREED))


@pytest.mark.parametrize(("schema", "goes_on"), [(LoraRun, True), (FullRun, False)])
def test_without_decay_weights_are_in_other_groups_where_vectors_train(tmp_path, schema, goes_on):
    trained(config(tmp_path, schema))
    assert found(config(tmp_path, schema, optim__weight_decay=0.1, **AGREED))
    none = config(tmp_path, schema, optim__weight_decay=0, **AGREED)
    if goes_on:
        assert found(none) == ["optim.weight_decay: 0.01 -> 0.0"]
        return
    with pytest.raises(UserError, match="cannot go on with optim.weight_decay: 0.01 -> 0.0"):
        found(none)


def test_another_method_or_family_cannot_go_on(tmp_path):
    trained(config(tmp_path))
    with pytest.raises(UserError, match="method: 'lora' -> 'full'"):
        found(config(tmp_path, FullRun, **AGREED))
    old = BaseModel("base", "diffusers folder", Family(1, 4), "v_prediction")
    with pytest.raises(UserError, match="base.family: 'SD 2' -> 'SD 1'"):
        found(config(tmp_path, **AGREED), base=old)


def test_fewer_steps_than_are_done_cannot_be(tmp_path):
    trained(config(tmp_path))
    assert found(config(tmp_path, train__steps=2, **AGREED))
    with pytest.raises(UserError, match="train.steps=1 is less than the 2"):
        found(config(tmp_path, train__steps=1, **AGREED))


@pytest.mark.parametrize("file", ["config.yaml", "manifest.json"])
@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"just text", b""])
def test_a_damaged_file_is_the_users_to_mend(tmp_path, file, content):
    trained(config(tmp_path))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=file):
        found(config(tmp_path))


def test_keys_of_other_versions_are_passed_over(tmp_path):
    wanted = config(tmp_path)
    trained(wanted)
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["optim"]["decay"], old["validation"]
    old |= {"gone": 1, "train": old["train"] | {"gone": {"too": 2}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert found(wanted) == []

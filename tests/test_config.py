import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from train import config
from train.config import (
    ROOT,
    FullRun,
    LoopConfig,
    LoraRun,
    Section,
    UserError,
    describe,
    dump,
    fields,
    load,
    validate,
)

NEEDED = ["output=out", "data.path=pictures"]


def lora(*arguments):
    return load(LoraRun, [*NEEDED, *arguments])


def refused(*arguments, schema=LoraRun, needed=NEEDED):
    with pytest.raises(UserError) as caught:
        load(schema, [*needed, *arguments])
    return str(caught.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output: out\ndata: {path: p}\ntrain: {steps: 5, batch_size: 2}\n")
    loaded = load(LoraRun, ["--config", str(file), "train.steps=9", "lora.rank=16"])
    train = loaded.train
    assert (train.steps, train.batch_size, loaded.lora.rank) == (9, 2, 16)
    assert train.clip_norm == 1.0
    assert load(LoraRun, [f"--config={file}", "train.steps=9", "lora.rank=16"]) == loaded


def test_the_default_file_is_used_only_without_config(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"output: {name}\ndata: {{path: p}}\n")
    default = tmp_path / "a"
    assert load(LoraRun, [], default=default).output == Path("a")
    chosen = load(LoraRun, ["--config", str(tmp_path / "b")], default=default)
    assert chosen.output == Path("b")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.learning_rate=1e-5", "optim.learning_rate", 1e-5),
        ("optim.betas=[0.8, 0.9]", "optim.betas", (0.8, 0.9)),
        ("preview.prompts=[a cat, a dog]", "preview.prompts", ["a cat", "a dog"]),
        ("lora.targets=[attention, proj]", "lora.targets", ["attention", "proj"]),
        ("data.flip=true", "data.flip", True),
        ("train.micro_batch_size=null", "train.micro_batch_size", None),
        ("data.path=with=sign", "data.path", "with=sign"),
        ("data.caption=a [photo", "data.caption", "a [photo"),
        ("data.caption=", "data.caption", ""),
        ("tracking.project=äöü 🐈", "tracking.project", "äöü 🐈"),
    ],
)
def test_values_are_yaml(override, key, value):
    found = lora(override)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [
        ("optim.learning_rat=1", "optim.learning_rate"),
        ("optim.lr_rate=1", None),
        ("learning_rate=1", "optim.learning_rate"),
        ("lora.rnk=1", "lora.rank"),
        ("trian.steps=1", "'train'"),
        ("steps=1", ".steps"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(wrong, suggested):
    message = refused(wrong)
    assert f"unknown key '{wrong.partition('=')[0].partition('.')[0]}" in message
    if suggested:
        assert "did you mean" in message and suggested in message
    else:
        assert "optim.learning_rate" in message


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.steps=many",
        "optim.learning_rate=-1",
        "optim.learning_rate=.nan",
        "optim.learning_rate=.inf",
        "train.mixed_precision=fp8",
        "lora.targets=[attention, everything]",
        "data.bucket_step=12",
        "data.caption_dropout=1.5",
        "checkpoint.keep=1",
        "preview.resolution=100",
        "lora=8",
    ],
)
def test_an_invalid_value_is_named_with_its_key(override):
    key, _, _ = override.partition("=")
    assert f"'{key}" in refused(override)


def test_a_missing_value_says_what_to_add_and_every_problem_is_listed():
    message = refused("lora.rank=0", "train.stepz=1", needed=["output=out"])
    for part in ("'data' is required", "'lora.rank'=0", "unknown key 'train.stepz'"):
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["optim.warmup_steps=100", "train.steps=100"], "optim.warmup_steps=100 must be less"),
        (["optim.final_learning_rate=1"], "optim.final_learning_rate=1.0 must not exceed"),
    ],
)
def test_values_that_contradict_each_other_are_refused(arguments, part):
    assert part in refused(*arguments)


def test_a_constant_rate_has_no_floor_to_be_above():
    values = {"output": "x", "optim": {"learning_rate": 5e-7, "schedule": "constant"}}
    assert validate(LoopConfig, values, where="the test").optim.learning_rate == 5e-7


@pytest.mark.parametrize("content", ["a: [", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert str(file) in refused("--config", str(file))


@pytest.mark.parametrize("arguments", [["--config"], ["train.steps"], ["--steps=5"], ["-x=1"]])
def test_arguments_of_another_kind_are_refused_with_the_right_form(arguments):
    message = refused(*arguments)
    assert "--config" in message


def test_a_missing_file_and_a_binary_one_are_named(tmp_path):
    assert "nowhere.yaml" in refused("--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "binary" in refused("--config", str(tmp_path / "binary"))


def test_yaml_can_not_build_objects(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output: !!python/object/apply:os.system ['touch canary']\n")
    assert "not valid YAML" in refused("--config", str(file))


def test_what_is_dumped_loads_to_the_same(tmp_path):
    wanted = lora("optim.learning_rate=3e-5", "preview.prompts=['a: b', '#c', 'no', 'ü']", "seed=4")
    file = tmp_path / "config.yaml"
    file.write_text(dump(wanted), encoding="utf-8")
    assert load(LoraRun, ["--config", str(file)]) == wanted


def test_previews_are_as_large_as_the_training_s_pictures_unless_told():
    assert lora("data.resolution=512").preview.resolution == 512
    assert lora("data.resolution=512", "preview.resolution=256").preview.resolution == 256


def test_two_configurations_share_no_values():
    first = lora()
    first.train.steps = 1
    assert lora().train.steps != 1


@pytest.mark.parametrize("schema", [LoopConfig, LoraRun, FullRun])
def test_help_explains_every_key(schema):
    text = describe(schema, ROOT / "configs/toy/lora.yaml")
    for name, field in fields(schema):
        assert field.description, f"{name} has no docstring"
        assert f"  {name}  (" in text


def test_help_prints_and_ends_well(capsys):
    with pytest.raises(SystemExit) as ended:
        load(LoraRun, ["--help"])
    assert ended.value.code == 0
    assert "optim.learning_rate" in capsys.readouterr().out


class Example(Section):
    """An example."""

    size: int = Field(1, ge=1)
    """Pixels."""


def test_a_section_of_ones_own_is_checked_alike():
    assert validate(Example, {"size": 3}, where="here").size == 3
    with pytest.raises(UserError, match="configuration .here.: unknown key 'sise'; .*'size'"):
        validate(Example, {"sise": 3}, where="here")


def test_an_error_names_where_the_mistake_was_made(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("output: x\ndata: {path: y}\nlora: {rank: 4}\n")
    for mistake in ("train.step=60", "train.steps=sixty"):
        with pytest.raises(UserError, match=r"^configuration \(the command line\): .*train.step"):
            load(LoraRun, [f"--config={file}", mistake])
    file.write_text("output: x\ndata: {path: y}\nlora: {rnk: 4}\n")
    with pytest.raises(UserError, match=rf"^configuration \({file}\): .*lora.rnk"):
        load(LoraRun, [f"--config={file}", "train.steps=sixty"])


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path):
    script = "from train.config import LoraRun, command, load\ncommand(lambda a: load(LoraRun, a))"
    done = subprocess.run(
        [sys.executable, "-c", script, "lora.rnk=4", "output=x", "data.path=y"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_every_process_says_what_stopped_it(monkeypatch, capsys):
    def main(arguments):
        raise UserError("wrong")

    for rank, said in (("0", "error: wrong\n"), ("1", "error (process 1): wrong\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            config.command(main)
        assert ended.value.code == 2 and capsys.readouterr().err == said


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def main(arguments):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        config.command(main)


def test_defaults_are_those_of_the_published_recipe():
    defaults = yaml.safe_load(dump(lora()))
    assert defaults["optim"]["betas"] == [0.9, 0.999]
    assert defaults["train"]["clip_norm"] == 1.0
    diffusion = defaults["diffusion"]
    assert diffusion["prediction_type"] is None and diffusion["min_snr_gamma"] is None
    assert diffusion["loss"] == "mse" and diffusion["timesteps"] == "uniform"
    assert not (diffusion["noise_offset"] or diffusion["input_perturbation"])


def test_texts_on_the_command_line_are_taken_as_they_stand():
    config = load(
        LoraRun,
        ["output=runs/1", "data.path=1e3", "data.caption=a cat: big", "model.revision=0123456"],
    )
    assert config.data.caption == "a cat: big"
    assert config.model.revision == "0123456"
    assert str(config.data.path) == "1e3"
    assert load(LoraRun, ["output=x", "data.path=y", "data.caption=null"]).data.caption is None


def test_no_is_a_word_and_true_and_false_are_not(tmp_path):
    (tmp_path / "run.yaml").write_text("train: {mixed_precision: no}\ndata: {flip: true}\n")
    file = ["--config", str(tmp_path / "run.yaml"), *NEEDED]
    assert load(LoraRun, file).train.mixed_precision == "no"
    assert load(LoraRun, file).data.flip is True
    assert lora("train.mixed_precision=no", "data.flip=false").train.mixed_precision == "no"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources=[{pth: a}]", "did you mean 'data.sources[].path'"),
        ("data.captions.shufle_tags=true", "did you mean 'data.captions.shuffle_tags'"),
        ("data.sources=[{path: a, weight: 0.5}, {path: b}]", "all of them a weight, or none"),
        ("data.sources=[{path: x/a}, {path: y/a}]", "give each a `name:`"),
        ("data.sources=[{path: a, name: ../b}]", "must be a word"),
        ("data.resolution=[512, 512]", "different sides"),
        ("data.sources=[{path: a, masks: true}]", "known there: data.sources[].path"),
        ("data.captions.templates=objects", "'data.captions.templates'='objects'"),
        ("data.captions=5", "set its keys: data.captions.prefix"),
        ("data.background=white", "data.background='[..., ...]'"),
        ("data.captions.drop-out=1", "unknown key 'data.captions.drop-out'"),
        ("train.batch-size=4", "'train.batch-size'; did you mean 'train.batch_size'"),
        ("data.resolution=abc", "'data.resolution'='abc'"),
        ("data.resolution=16", "at least 32"),
        ("data.background=[0, 0, 256]", "from 0 to 255"),
    ],
)
def test_a_wrong_data_section_is_explained(override, words):
    arguments = [f"{override}", "output=x"]
    if "sources" not in override:
        arguments.append("data.path=x")
    with pytest.raises(UserError) as error:
        load(LoraRun, arguments)
    assert words in str(error.value)


def test_a_missing_section_is_asked_for_by_its_first_key():
    with pytest.raises(UserError, match="'data' is required: add data.path="):
        load(LoraRun, ["output=x"])


def test_one_of_path_and_sources_is_needed():
    for extra in (["data.flip=true"], ["data.path=x", "data.sources=[{path: y}]"]):
        with pytest.raises(UserError, match=r"data.sources; (neither is given|.*data.path=null)"):
            load(LoraRun, ["output=x", *extra])


def test_sources_take_over_what_they_leave_out():
    config = load(
        LoraRun,
        [
            "output=x",
            "data.caption=a cat",
            "data.crop=focus",
            "data.sources=[{path: in/a}, {path: hf:o/b, crop: random, caption: a dog}]",
        ],
    )
    one, two = config.data.named_sources()
    assert (one.name, one.caption, one.crop, one.split) == ("a", "a cat", "focus", "train")
    assert (two.name, two.caption, two.crop, two.resolution) == ("b", "a dog", "random", 768)
    assert load(LoraRun, ["output=x", *_as_overrides(config)]) == config


def _as_overrides(config):
    data = yaml.safe_load(dump(config))["data"]
    return [
        f"data.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in data.items()
        if value is not None
    ]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_that_comes_when_all_is_done_changes_nothing(name):
    script = (
        "import atexit, os, signal\nfrom train.config import command\n"
        f"atexit.register(lambda: os.kill(os.getpid(), signal.{name}))\ncommand(lambda _: None)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert ended.returncode == 0

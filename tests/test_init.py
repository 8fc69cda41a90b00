"""scripts/init.py: three kinds of folders, each to a configuration that trains at once."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data import toy
from scripts import init
from scripts.initial import choosing, looking, writing
from scripts.planning import SCHEMAS
from tests.folders import picture
from train import dreambooth, lora
from train.config import LoraRun, UserError, load

SHORT = ("train.steps=2", "train.batch_size=2", "preview.every=0", "optim.warmup_steps=0")


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """Captioned pictures of mixed shapes."""
    folder = tmp_path_factory.mktemp("pictures") / "style"
    toy.write_pictures(folder, 24, seed=0)
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        if number % 3 == 0:
            Image.open(path).resize((160, 96)).save(path)
    return folder


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Six pictures of one thing, without captions."""
    folder = tmp_path_factory.mktemp("pictures") / "my_owl"
    toy.write_pictures(folder, 6, seed=1)
    for path in folder.glob("*.txt"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """As Hugging Face's imagefolder has them, some of them damaged."""
    folder = tmp_path_factory.mktemp("pictures") / "listed"
    toy.write_pictures(folder, 12, seed=2)
    lines = []
    for path in sorted(folder.glob("*.png")):
        text = path.with_suffix(".txt")
        lines.append(json.dumps({"file_name": path.name, "text": text.read_text().strip()}))
        text.unlink()
    (folder / "00003.png").write_bytes(b"no picture")
    whole = (folder / "00004.png").read_bytes()
    (folder / "00004.png").write_bytes(whole[: len(whole) // 2])
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def written(folder: Path, file: Path, *overrides: str) -> dict:
    init.main([f"data={folder}", "base=toy", f"output={file}", "card=none", *overrides])
    return yaml.safe_load(file.read_text())


def test_a_style_becomes_a_lora_with_prompts_of_its_own(style, tmp_path, capsys):
    made = written(style, tmp_path / "a.yaml")
    captions = [file.read_text().strip() for file in style.glob("*.txt")]
    assert made["lora"]["rank"] == 16 and made["data"]["resolution"] == 128
    assert set(made["preview"]["prompts"]) <= set(captions)
    said = capsys.readouterr().out
    assert f"accelerate launch train/lora.py --config {tmp_path / 'a.yaml'}" in said
    assert f"scripts/prepare.py source={style} output=prepared/a held_out=0.1" in said


def test_few_pictures_without_captions_become_a_subject(subject, tmp_path):
    made = written(subject, tmp_path / "b.yaml")
    assert made["data"]["caption"] == "a photo of zwx owl"
    assert made["dreambooth"]["class_prompt"] == "a photo of a owl"
    assert "on_bad_image" not in made["data"]


def test_what_is_damaged_is_left_out_and_named(listed, tmp_path, capsys):
    made = written(listed, tmp_path / "c.yaml")
    assert made["data"]["on_bad_image"] == "report" and "caption" not in made["data"]
    said = capsys.readouterr().out
    assert "left out 00003.png" in said and "left out 00004.png" in said


@pytest.mark.parametrize("method", ["lora", "dreambooth", "textual_inversion", "full"])
def test_every_method_is_a_valid_configuration_with_reasons(style, tmp_path, method):
    file = tmp_path / f"{method}.yaml"
    written(style, file, f"method={method}", "noun=owl")
    text = file.read_text()
    assert all(len(line) <= 100 for line in text.splitlines() if line[0] != "#")
    values = [line for line in text.splitlines() if ": " in line and not line.startswith("#")]
    assert sum("#" in line for line in values) > len(values) / 2


def test_the_style_trains_at_once(style, tmp_path, capsys):
    written(style, tmp_path / "a.yaml")
    lora.main(begun(tmp_path, "a"))
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_the_subject_and_the_listed_pictures_train_at_once(subject, listed, tmp_path):
    written(subject, tmp_path / "b.yaml")
    dreambooth.main(begun(tmp_path, "b"))
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()
    (tmp_path / "run").rename(tmp_path / "before")
    written(listed, tmp_path / "c.yaml", "method=lora")
    lora.main(begun(tmp_path, "c"))
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("kind", ["subject", "listed"])
def test_the_others_pass_a_dry_run(kind, tmp_path, capsys, request):
    made = written(request.getfixturevalue(kind), tmp_path / "b.yaml")
    entry = dreambooth if "dreambooth" in made else lora
    entry.main([*begun(tmp_path, "b"), "dry_run=true"])
    assert "everything checked" in capsys.readouterr().out


def begun(folder: Path, name: str) -> list[str]:
    where = (f"output={folder / 'run'}", f"data.cache={folder / 'cache'}", "data.workers=0")
    return ["--config", str(folder / f"{name}.yaml"), *where, *SHORT]


def test_a_file_that_is_there_stays(subject, tmp_path):
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(UserError, match="force=true"):
        written(subject, tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "mine"
    assert "model" in written(subject, tmp_path / "a.yaml", "force=true")


def test_on_a_terminal_it_asks_and_takes_what_is_proposed(subject, tmp_path, monkeypatch):
    asked = []
    answers = iter(["", "toy", "", "bird"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(looking, "card", lambda: None)
    monkeypatch.setattr("builtins.input", lambda text: (asked.append(text), next(answers))[1])
    init.main([f"data={subject}", f"output={tmp_path / 'a.yaml'}"])
    made = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert "bird" in made["data"]["caption"] and made["model"]["path"] == "data/assets/toy-base"
    assert len(asked) == 4 and "dreambooth" in asked[0]


def a_card(style: Path, gib: float, method: choosing.Method = "lora") -> choosing.Answers:
    base = looking.Base(looking.SD21, 768, False)
    return choosing.Answers(looking.pictures(str(style)), base, method, "owl", gib, "a")


def planned(answers, settings) -> float:
    """About what the planner says of a LoRA on SD 2.1 at 768 px, GiB."""
    keys = {one.key: one.value for one in settings}
    each = 0.57 if "train.gradient_checkpointing" in keys else 2.58
    saved = 0.3 * ("optim.name" in keys) + 0.1 * ("train.quantize" in keys)
    training = 2.3 + each * keys["train.micro_batch_size"] - saved
    return max(training, 3.6 if "data.cache_batch_size" in keys else 7.8)


@pytest.mark.parametrize(
    "gib, micro, more",
    [
        (40, 8, set()),
        (24, 4, set()),
        (12, 2, set()),
        (8, 1, {"data.cache_batch_size"}),
        (5.2, 4, {"data.cache_batch_size", "train.gradient_checkpointing"}),
        (4.1, 2, {"data.cache_batch_size", "train.gradient_checkpointing"}),
    ],
)
def test_the_quickest_way_that_fits_the_card_is_taken(style, monkeypatch, gib, micro, more):
    asked = []
    monkeypatch.setattr(init, "peak", lambda *given: asked.append(1) or planned(*given))
    answers = a_card(style, gib)
    way, taken = init.fitting(answers, [])
    chosen = {one.key: one for one in way}
    assert chosen["train.micro_batch_size"].value == micro
    assert chosen.keys() == {"train.mixed_precision", "train.micro_batch_size", *more}
    assert taken == planned(answers, way) <= init.MARGIN * gib and len(asked) <= 4
    assert f"{taken:.1f} of {gib:g} GiB" in chosen["train.micro_batch_size"].why


def test_where_nothing_fits_the_smallest_is_taken_and_said(style, monkeypatch):
    monkeypatch.setattr(init, "peak", lambda *_: 100.0)
    way, taken = init.fitting(a_card(style, 12), [])
    assert taken == 100 and ("train.quantize", "nf4") in [one[:2] for one in way]
    assert "100.0 of 12 GiB" in next(one.why for one in way if one.key == choosing.AT_ONCE)


@pytest.mark.parametrize("method", ["lora", "dreambooth", "textual_inversion", "full"])
def test_every_way_is_of_keys_that_the_method_has(style, method):
    for way in choosing.ladder(a_card(style, 12, method)):
        words = [
            *writing.values(choosing.settings(a_card(style, 12, method))),
            *writing.values(way),
        ]
        load(SCHEMAS[method], words)


@pytest.mark.slow
def test_the_planner_is_asked_of_the_whole_configuration(style):
    """Of the toy base, as if it were none."""
    base = looking.Base("data/assets/toy-base", 128, False)
    answers = dataclasses.replace(a_card(style, 12), base=base)
    run, ways = list(choosing.settings(answers)), choosing.ladder(answers)
    assert init.peak(answers, [*run, *ways[0]]) > init.peak(answers, [*run, *ways[-2]]) > 0.5


def test_without_pictures_the_key_is_named(tmp_path):
    with pytest.raises(UserError, match="data=my/pictures"):
        init.main(["yes=true"])
    with pytest.raises(UserError, match="nothing-here"):
        init.main([f"data={tmp_path / 'nothing-here'}"])


@pytest.mark.parametrize(
    "name, noun",
    [("my/dog", "dog"), ("photos_of_grey_cat2", "cat"), ("data/train", "thing"), ("x", "thing")],
)
def test_a_folder_s_name_may_say_what_it_shows(name, noun):
    assert looking.kind_of(name) == noun


def test_small_pictures_are_not_enlarged(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png", f"a thing {number}", size=(600, 500))
    found = looking.pictures(str(tmp_path))
    side, why = choosing.resolution(found, looking.Base("x", 768, False))
    assert side == 512 and "about 548 px" in why
    assert found.twice == 2 and found.trigger is None


@pytest.mark.parametrize("word, known", [("zwx", True), ("<owl>", True), ("red", False)])
def test_a_word_that_is_in_no_language_is_a_subject_s(tmp_path, word, known):
    for number in range(4):
        picture(tmp_path / f"{number}.png", f"a photo of {word} dog {number % 2} on grass")
    found = looking.pictures(str(tmp_path))
    assert found.trigger == (word if known else None)
    assert choosing.method_for(found)[0] == ("dreambooth" if known else "lora")


def test_values_survive_yaml_and_the_command_line():
    one = choosing.Setting("preview.prompts", ["a: b", "it's {x}", "#1"], "why")
    text = writing.text(["head"], [one])
    assert yaml.safe_load(text) == {"preview": {"prompts": one.value}}
    config = load(LoraRun, ["output=x", "data.path=y", *writing.values([one])])
    assert config.preview.prompts == one.value
    assert text.startswith("# head\n")


@pytest.mark.parametrize("base", ["/no/such", "./none", "~/none", "a/b/c", "none.safetensors"])
def test_a_base_that_is_not_there_is_no_hub_id(base):
    with pytest.raises(UserError, match="no such folder or file"):
        looking.base(base)
    assert looking.base("somebody/a-model").path == "somebody/a-model"


def test_commands_are_words_of_a_shell(style, tmp_path, capsys):
    written(style, tmp_path / "my photos.yaml")
    said = capsys.readouterr().out
    assert f"--config '{tmp_path}/my photos.yaml'" in said
    assert "'output=prepared/my photos' held_out=0.1" in said
    assert "'data.path=prepared/my photos/train'" in said and "validation.every=40" in said


def test_pictures_held_out_beside_are_found(style, tmp_path, capsys):
    held_out = tmp_path / "prepared/held-out"
    shutil.copytree(style, tmp_path / "prepared/train")
    toy.write_pictures(held_out, 3, seed=9)
    made = written(tmp_path / "prepared/train", tmp_path / "a.yaml")
    assert made["evaluation"]["path"] == str(held_out)
    assert made["validation"]["every"] == made["train"]["steps"] // 10
    assert "held_out=0.1" not in capsys.readouterr().out
    lora.main([*begun(tmp_path, "a"), "dry_run=true"])
    assert f"3 of 3 pictures in {held_out}, every 40 steps" in capsys.readouterr().out


def test_many_pictures_without_captions_are_no_captioned_style():
    found = looking.Pictures("x", 40, 0, [], 512, (1.0, 1.0), 0, [], "")
    assert choosing.method_for(found) == (
        "lora",
        "40 pictures without captions: a style sooner than a subject",
    )

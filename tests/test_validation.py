"""The held-out loss: on what it is measured, that it changes nothing, and what is read off it."""

import json
import math
import shutil
import statistics

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from data import toy
from data.noising import Noising
from tests.runs import ROOT, arguments, finish, launch, make_world
from tests.tiny import tiny_pipeline
from train import full, lora, pictures, report, textual_inversion, validation_data
from train.config import FullRun, LoraRun, UserError, ValidationConfig, load
from train.overfitting import Measured, Side, lowest, read, risen, standard_error
from train.validation import Validation

QUIET = ("preview.every=0", "checkpoint.every=100")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("world"), pictures=12)
    toy.write_pictures(world / "others", 6, seed=5)
    (world / "held-out").mkdir()
    for path in (world / "others").glob("*.png"):
        Image.open(path).reduce(2).save(world / "held-out" / path.name)
        text = path.with_suffix(".txt").read_text()
        (world / "held-out" / path.name).with_suffix(".txt").write_text(text)
    return world


def validated(world, output, *overrides):
    wanted = [f"validation.path={world / 'held-out'}", "validation.every=2", "validation.images=5"]
    return arguments(world, output, *QUIET, *wanted, *overrides)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    lora.main(validated(world, output))
    return output


def lines(output):
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "validation/loss" in line]


def adapter(output):
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


# A whole run


def test_a_run_measures_the_base_every_so_often_and_its_end(run):
    assert [line["step"] for line in lines(run)] == [0, 2, 4, 6]
    first = lines(run)[0]
    quarters = [first[f"validation/loss_q{quarter}"] for quarter in (1, 2, 3, 4)]
    assert first["validation/loss"] == pytest.approx(np.mean(quarters))
    gap = first["validation/loss"] - first["validation/train_loss"]
    assert first["validation/gap"] == pytest.approx(gap)
    assert first["validation/loss_se"] > 0
    assert len({line["validation/loss"] for line in lines(run)}) == 4
    held_out = [measured.held_out for measured in read(run / "validation")]
    assert all(side.same_as(held_out[0]) for side in held_out) and len(held_out) == 4


def test_measuring_changes_nothing_of_the_training(world, run, tmp_path):
    lora.main(arguments(world, tmp_path / "run", *QUIET))
    plain, other = adapter(tmp_path / "run"), adapter(run)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def opened(world, tmp_path, *overrides, schema=LoraRun):
    """The held-out set of a run, and the base it is of."""
    from train.feeding import batches
    from train.models import load_pipeline

    config = load(schema, validated(world, tmp_path / "run", *overrides))
    pipeline = load_pipeline(str(world / "base"))
    pipeline.unet.eval()
    text_trains = schema is FullRun and config.full.text_encoder
    found = batches(
        pictures.find(config.data),
        pipeline,
        config,
        Accelerator(cpu=True),
        cache_captions=not text_trains,
    )
    return found.held_out, pipeline


@torch.no_grad()
def test_losses_of_the_base_are_those_of_plain_code_one_by_one(world, run, tmp_path):
    held_out, pipeline = opened(world, tmp_path)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    (first, *_) = read(run / "validation")
    assert first.held_out.ids == held_out.ids["held_out"] and len(first.train.ids) == 5
    for at, side in enumerate((first.held_out, first.train)):
        for picture, repeat in ((0, 0), (2, 1), (4, 3)):
            sample = held_out.samples.sample(0, 5 * at + picture, repeat)
            latents, noise = sample["latents"][None], sample["noise"][None]
            timestep = torch.tensor([side.timesteps[picture, repeat]])
            noisy = scheduler.add_noise(latents, noise, timestep)
            text = sample["prompt_embeds"][None]
            prediction = pipeline.unet(noisy, timestep, encoder_hidden_states=text).sample
            loss = (prediction - scheduler.get_velocity(latents, noise, timestep)).square().mean()
            assert float(loss) == pytest.approx(side.losses[picture, repeat], abs=1e-5)


@pytest.mark.slow
def test_two_processes_find_the_same(world, run, tmp_path):
    finish(launch("train/lora.py", *validated(world, tmp_path / "two"), processes=2))
    assert [line["step"] for line in lines(tmp_path / "two")] == [0, 2, 4, 6]
    one, two = (read(output / "validation")[0] for output in (run, tmp_path / "two"))
    for side in ("held_out", "train"):
        ours, theirs = getattr(one, side), getattr(two, side)
        assert ours.same_as(theirs)
        np.testing.assert_allclose(theirs.losses, ours.losses, atol=1e-5)


def test_a_text_encoder_in_training_gets_ids_and_is_measured_as_it_is(world, tmp_path):
    same = ["optim.learning_rate=1e-3", "train.steps=2", *QUIET]
    values = [a for a in validated(world, tmp_path / "run", *same)]
    values[0] = _without_lora(tmp_path, values[0])
    full.main([*values, "full.text_encoder=true"])
    full.main([*values, f"output={tmp_path / 'other'}"])
    with_text, without = (lines(tmp_path / name) for name in ("run", "other"))
    first, second = (found[0]["validation/loss"] for found in (with_text, without))
    assert first == pytest.approx(second, abs=2e-3)  # the cache keeps embeddings in fp16
    assert with_text[1]["validation/loss"] != pytest.approx(without[1]["validation/loss"], abs=1e-6)


def _without_lora(folder, config):
    text = open(config.removeprefix("--config=")).read()
    start, end = text.index("lora:"), text.index("train:")
    (folder / "full.yaml").write_text(text[:start] + text[end:])
    return f"--config={folder / 'full.yaml'}"


def test_masks_and_captions_of_several_lengths_share_no_batch_they_cannot(world, tmp_path):
    folder = tmp_path / "held-out"
    folder.mkdir()
    for path in (world / "held-out").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00001.txt").write_text("word " * 30)
    Image.new("L", Image.open(folder / "00002.png").size, 255).save(folder / "00002.mask.png")
    overrides = ["data.masks=true", "data.captions.max_tokens=150", "train.micro_batch_size=3"]
    held_out, _ = opened(world, tmp_path, *overrides, f"validation.path={folder}")
    batches = list(held_out)
    lengths = {batch["prompt_embeds"].shape[1] for batch in batches}
    assert lengths == {77, 154} and all("mask" in batch for batch in batches)
    assert len(batches) == len(held_out)
    rows = torch.cat([batch["row"] for batch in batches])
    assert sorted(rows.tolist()) == list(range(2 * 5 * 4))


@pytest.mark.parametrize("family", ["sd2-depth", "sd2-inpainting"])
def test_what_such_a_base_sees_beside_the_latents_is_there_for_held_out_pictures_too(
    world, tmp_path, family
):
    tiny_pipeline(family=family).save_pretrained(tmp_path / "base")
    for name in ("pictures", "held-out"):
        (tmp_path / name).mkdir()
        for file in (world / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
            if file.suffix == ".png":
                grey = Image.linear_gradient("L").resize(Image.open(file).size)
                grey.save((tmp_path / name / file.name).with_suffix(".depth.png"))
    where = f"validation.path={tmp_path / 'held-out'}"
    depth = f"data.depth={str(family == 'sd2-depth').lower()}"
    cache = f"data.cache={tmp_path / 'cache'}"
    lora.main(validated(tmp_path, tmp_path / "run", where, depth, cache, "train.steps=2"))
    assert all(math.isfinite(line["validation/loss"]) for line in lines(tmp_path / "run"))


def test_every_process_has_as_many_batches_and_every_row_once(world, tmp_path):
    from dataclasses import replace

    held_out, _ = opened(world, tmp_path)
    shares = [list(replace(held_out, rank=rank, world=3)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch["row"].tolist()]
    assert sorted(row for row in rows if row >= 0) == list(range(2 * 5 * 4))
    assert any(row < 0 for row in rows)


def test_noise_is_the_picture_s_and_not_that_of_how_many_there_are(world, tmp_path):
    some, _ = opened(world, tmp_path, "validation.images=6")
    fewer, _ = opened(world, tmp_path, "validation.images=5")
    for picture, name in enumerate(fewer.ids["held_out"]):
        one = fewer.samples.sample(0, picture, 2)
        other = some.samples.sample(0, some.ids["held_out"].index(name), 2)
        assert torch.equal(one["noise"], other["noise"])
        assert torch.equal(one["latents"], other["latents"])
    repeats = [fewer.samples.sample(0, 0, repeat)["noise"] for repeat in range(4)]
    assert not any(torch.equal(repeats[0], other) for other in repeats[1:])


def test_captions_are_worded_as_in_training_but_neither_shuffled_nor_dropped(world, tmp_path):
    worded = ["data.captions.trigger=owl", "data.caption_dropout=1", "data.captions.separator= "]
    random = ["data.captions.shuffle_tags=true", "data.captions.tag_dropout=0.5", "data.flip=true"]
    held_out, pipeline = opened(world, tmp_path, *worded, *random)
    caption = (world / "held-out" / held_out.ids["held_out"][0]).with_suffix(".txt").read_text()
    ids = held_out.samples.sample(0, 0, 3)["input_ids"]
    wanted = pipeline.tokenizer(f"owl {caption.strip()}").input_ids
    assert ids[: len(wanted)].tolist() == wanted


# Before the run


def test_the_plan_says_what_is_held_out_and_finds_what_is_wrong_with_it(world, tmp_path, capsys):
    lora.main(validated(world, tmp_path / "run", "dry_run=true"))
    said = capsys.readouterr().out
    assert f"held out 5 of 6 pictures in {world / 'held-out'}, every 2 steps" in said
    with pytest.raises(UserError, match=r"validation\.path=.*nowhere.*validation\.every=0"):
        lora.main(validated(world, tmp_path / "run", f"validation.path={tmp_path / 'nowhere'}"))
    Image.new("RGB", (64, 64)).save(tmp_path / "no-caption.png")
    with pytest.raises(UserError, match=r"(?s)validation\.path=.*holds 1 pictures but no captions"):
        lora.main(validated(world, tmp_path / "run", f"validation.path={tmp_path}"))


def test_held_out_pictures_that_are_trained_on_are_named(world, tmp_path, capsys):
    both = f"validation.path={world / 'pictures'}"
    lora.main(validated(world, tmp_path / "run", both, "dry_run=true"))
    assert "held-out pictures that are trained on, too, so that" in capsys.readouterr().out


def test_the_best_needs_something_to_be_the_best_on(world, tmp_path):
    best = "validation.use_best=true"
    lora.main(validated(world, tmp_path / "run", best, "dry_run=true"))
    for settings in (("validation.every=0",), ("validation.path=null",)):
        with pytest.raises(UserError, match=r"use_best=true needs held-out.*validation\.path="):
            lora.main(validated(world, tmp_path / "run", best, *settings))


def inverted(world, folder, held_out):
    """A run of two tokens, each from a source of its own."""
    values = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())
    del values["lora"], values["data"]
    names = {"a": "<x>", "b": "<y>"}
    values["data"] = {
        "resolution": 64,
        "caption_dropout": 0,
        "cache": str(folder / "cache"),
        "sources": [{"name": name, "path": str(world / "pictures")} for name in names],
    }
    tokens = [{"token": t, "initial": "o", "source": name} for name, t in names.items()]
    values |= {"textual_inversion": {"tokens": tokens}, "dry_run": True}
    values |= {"output": str(folder / "run"), "model": {"path": str(world / "base")}}
    values["validation"] = {"every": 2, "path": str(held_out)}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return [f"--config={folder / 'run.yaml'}"]


def test_held_out_captions_without_the_token_that_is_learned_are_refused(world, tmp_path):
    held_out = tmp_path / "held-out"
    shutil.copytree(world / "held-out", held_out)
    with pytest.raises(UserError, match="no caption of the held-out.*<x> or <y>.*every=0"):
        textual_inversion.main(inverted(world, tmp_path, held_out))
    textual_inversion.main([*inverted(world, tmp_path, held_out), "lora.rank=2"])
    (held_out / "00001.txt").write_text("a photo of a <Y>")
    textual_inversion.main(inverted(world, tmp_path, held_out))


def test_the_space_for_the_average_and_the_best_is_asked_for_too(world, tmp_path, monkeypatch):
    from train import rundir

    def needed(*settings):
        asked = {}
        patch = lambda folder, needed, what: asked.update({what: needed})  # noqa: E731
        monkeypatch.setattr(rundir, "check_space", patch)
        lora.main(arguments(world, tmp_path / "run", "dry_run=true", *settings))
        return asked["checkpoints"]

    held_out = ("validation.every=2", f"validation.path={world / 'held-out'}")
    plain, ema = needed(), needed("train.ema_decay=0.9")
    both = needed("train.ema_decay=0.9", *held_out)
    one = (needed(*held_out) - plain) // 3  # a checkpoint is the weights and two moments
    assert (ema - plain, both - ema) == (3 * one, 4 * one) and one > 0


def test_the_evaluation_s_pictures_are_the_default_and_none_are_none(world, tmp_path):
    config = load(LoraRun, arguments(world, tmp_path, f"evaluation.path={world / 'held-out'}"))
    assert len(validation_data.find(config).sizes) == 6
    config.validation.every = 0
    assert validation_data.find(config) is None
    assert validation_data.find(load(LoraRun, arguments(world, tmp_path))) is None


def test_pictures_are_chosen_from_all_parts_and_by_the_seed(world):
    values = arguments(world, world / "run")
    found = pictures.find(load(LoraRun, values).data)
    some = [[r.id for r in validation_data.choose(found, 4, seed).records] for seed in range(20)]
    ids = [record.id for record in found.records]
    for chosen in some:
        assert [ids.index(name) // 3 for name in chosen] == [0, 1, 2, 3]
    assert len({tuple(chosen) for chosen in some}) > 10
    assert len(validation_data.choose(found, 100, 0).sizes) == 12


@pytest.mark.parametrize("pictures_", [1, 5, 64, 1001])
@pytest.mark.parametrize("each", [4, 8])
def test_timesteps_cover_every_quarter_evenly(pictures_, each):
    noising = Noising(first=100, count=800)
    found = validation_data.timesteps(noising, pictures_, each, seed=3)
    assert found.shape == (pictures_, each)
    for column in range(each):
        low = 100 + 800 * column / each
        shares = (found[:, column] - low) / (800 / each)
        assert 0 <= shares.min() and shares.max() < 1
        # As many in each of n equal parts as whole timesteps allow.
        middles = (np.arange(pictures_) + 0.5) / pictures_
        assert np.abs(np.sort(shares) - middles).max() <= each / 800
    if pictures_ > 4:
        ranks = found.argsort(0).argsort(0)
        assert np.abs(np.corrcoef(ranks.T) - np.eye(each)).max() < 0.95


# What is read off it


def measured(step, losses, train=None):
    losses = np.asarray(losses, np.float64)
    timesteps = np.tile(np.arange(4) * 250, (len(losses), 1))
    ids = [f"{k}.png" for k in range(len(losses))]
    held_out = Side(ids, timesteps, losses)
    return Measured(step, held_out, held_out if train is None else Side(ids, timesteps, train))


def level(step, mean, *, spread=0.0, pictures=16):
    """Pictures that differ much from each other, and change by nearly the same."""
    random = np.random.default_rng(7)
    hard = random.uniform(0.1, 0.9, (pictures, 1)) + np.zeros((1, 4))
    noise = np.random.default_rng(step).normal(0, 1, (pictures, 4)) * spread
    return measured(step, hard + mean + noise)


def test_metrics_are_means_and_their_standard_error_is_over_pictures():
    losses = [[1, 2, 3, 6], [3, 4, 5, 8]]
    found = measured(5, losses, train=np.full((2, 4), 2.0)).metrics()
    assert found == {
        "validation/loss": 4.0,
        "validation/loss_q1": 2.0,
        "validation/loss_q2": 3.0,
        "validation/loss_q3": 4.0,
        "validation/loss_q4": 7.0,
        "validation/loss_se": pytest.approx(math.sqrt(((3 - 4) ** 2 + (5 - 4) ** 2) / 1 / 2)),
        "validation/train_loss": 2.0,
        "validation/gap": 2.0,
    }
    broken = measured(5, [[1, 2, 3, math.nan]]).metrics()
    assert broken["validation/loss"] is None and broken["validation/loss_q1"] == 1.0
    assert broken["validation/loss_se"] is None


def test_eight_timesteps_are_two_in_each_quarter():
    losses = np.arange(8.0)[None]
    side = Side(["a"], np.arange(8)[None], losses)
    assert [side.mean(f"loss_q{q}") for q in (1, 2, 3, 4)] == [0.5, 2.5, 4.5, 6.5]


def test_a_rise_is_sure_at_two_validations_in_a_row_by_the_paired_statistic():
    falling, low, high, higher = level(0, 0), level(2, -0.1), level(4, -0.08), level(6, -0.07)
    assert risen([falling, low, high], "loss") is None
    rise = risen([falling, low, high, higher], "loss")
    assert (rise.step, rise.best, rise.amount) == (6, 2, pytest.approx(0.03))
    assert risen([falling, low, high, higher, level(8, -0.2)], "loss") is None
    # The pictures' own spread is far larger than the rise, yet it does not hide it.
    assert standard_error(low.held_out.of_pictures("loss")) > 0.03
    noisy = level(6, -0.07, spread=0.02)
    rise = risen([falling, low, high, noisy], "loss")
    changes = (noisy.held_out.losses.mean(1) - low.held_out.losses.mean(1)).tolist()
    t = statistics.mean(changes) / (statistics.stdev(changes) / math.sqrt(16))
    assert rise.amount / rise.error == pytest.approx(t)
    uncertain = [level(4, -0.098, spread=0.1), level(6, -0.098, spread=0.1)]
    assert risen([falling, low, *uncertain], "loss") is None
    assert "since step 2" in str(rise) and "validation.use_best=true" in str(rise)


def test_a_rise_over_the_base_says_that_training_made_it_worse():
    rise = risen([level(0, 0), level(2, 0.1), level(4, 0.2)], "loss")
    assert rise.best == 0 and "above the base's" in str(rise) and "use_best" not in str(rise)


def test_one_picture_and_losses_that_are_not_finite_warn_of_nothing():
    alone = [level(step, mean, pictures=1) for step, mean in ((0, 0), (2, 1), (4, 2))]
    assert risen(alone, "loss") is None
    lost = [measured(step, [[math.nan] * 4] * 3) for step in (0, 2, 4)]
    assert risen(lost, "loss") is None and lowest(lost, "loss") is None
    assert risen([], "loss") is None


def test_files_are_read_as_written_and_what_is_torn_or_of_other_pictures_is_left_out(tmp_path):
    measured(0, [[9, 9, 9, 9]]).write(tmp_path)
    written = measured(2, [[0.1, 1 / 3, math.nan, 4], [1, 2, 3, 4]])
    written.write(tmp_path)
    (tmp_path / "step-00000004.json").write_text('{"step": 4, "held_out"')
    (found,) = read(tmp_path)
    assert found.step == 2 and found.held_out.same_as(written.held_out)
    np.testing.assert_array_equal(found.held_out.losses, written.held_out.losses)
    assert "NaN" not in (tmp_path / "step-00000002.json").read_text()


class Table:
    """A held-out set of 3 pictures of either side, whose losses are `level` plus the row."""

    def __init__(self):
        self.level = 0.0
        self.ids = {"held_out": ["a", "b", "c"], "train": ["x", "y", "z"]}
        self.timesteps = {side: np.arange(12).reshape(3, 4) for side in self.ids}

    def __len__(self):
        return 4

    def __iter__(self):
        rows = torch.randperm(24)
        for part in rows.split(7):
            yield {"row": part, "value": self.level + part.float()}
        yield {"row": torch.tensor([-1, -1]), "value": torch.tensor([1e6, 1e6])}


class Looked(nn.Module):
    """Returns the values of its batch; of its two parts one trains and one rests."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Dropout(0.5), nn.Dropout(0.5)
        self.other.eval()

    def forward(self, batch):
        assert not self.one.training and not torch.is_grad_enabled()
        return batch["value"]


def validation(table, output, *, start=0, kept=()):
    config = ValidationConfig(every=2)
    return Validation(table, config, output, Accelerator(cpu=True), start=start, kept=kept)


def course(validation, table, levels):
    """What is found at each level: {step: level}."""
    model, found = Looked(), {}
    for step, height in levels.items():
        table.level = height
        if validation.due(step, 9):
            found[step] = validation.run(model, step)
            validation.write(found[step])
    assert model.training and model.one.training and not model.other.training
    return found


def test_rows_come_back_in_order_whatever_the_batches(tmp_path):
    table = Table()
    found = course(validation(table, tmp_path), table, {0: 0.0})[0]
    assert found.value("loss") == np.arange(12).mean()
    assert found.metrics()["validation/train_loss"] == np.arange(12, 24).mean()
    (one,) = read(tmp_path)
    np.testing.assert_array_equal(one.held_out.losses, np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(one.train.losses, np.arange(12, 24).reshape(3, 4))


def test_it_is_due_before_the_first_step_every_so_often_and_at_the_end(tmp_path):
    some = validation(Table(), tmp_path)
    assert [done for done in range(10) if some.due(done, 9)] == [0, 2, 4, 6, 8, 9]
    assert not any(validation(None, tmp_path).due(done, 9) for done in range(10))
    off = Validation(Table(), ValidationConfig(every=0), tmp_path, Accelerator(cpu=True), start=0)
    assert not any(off.due(done, 9) for done in range(10))


def test_the_best_is_the_lowest_after_training_began(tmp_path):
    table, best = Table(), []
    some = validation(table, tmp_path)
    for step, level in {0: 1.0, 2: 3, 4: 2, 6: 2, 8: math.nan, 9: 1.5}.items():
        found = course(some, table, {step: level})[step]
        best += [step] if some.best is found else []
    assert best == [2, 4, 9]


def test_the_best_of_a_resumed_run_is_one_that_has_a_checkpoint(tmp_path):
    table = Table()
    course(validation(table, tmp_path), table, {0: 0.0, 2: 3, 4: 1, 6: 2, 8: 2.5})
    kept = {None: (), 4: (2, 4, 6, 8), 6: (2, 6, 8), 8: (8,)}
    for best, steps in kept.items():
        found = validation(table, tmp_path, start=8, kept=steps).best
        assert best == (found and found.step)
    # What comes later was measured by the run that is forgotten.
    assert validation(table, tmp_path, start=2, kept=(2, 4)).best.step == 2


def test_it_warns_once_with_figures(tmp_path, capsys):
    table = Table()
    course(validation(table, tmp_path), table, {0: 3.0, 2: 1, 4: 2, 6: 2, 8: 3})
    said = capsys.readouterr().out
    assert said.count("warning:") == 1
    assert "risen since step 2 at 2 validations in a row, at step 6 by 1 ± 0" in said


def test_a_resumed_run_knows_what_was_measured_up_to_there_and_forgets_the_rest(tmp_path, capsys):
    table = Table()
    course(validation(table, tmp_path), table, {0: 3.0, 2: 1, 4: 2, 6: 2, 8: 0.1})
    resumed = validation(table, tmp_path, start=6, kept=(2, 4, 6))
    assert [one.step for one in read(tmp_path)] == [0, 2, 4, 6]
    assert not resumed.due(6, 9) and resumed.due(8, 9)
    capsys.readouterr()
    course(resumed, table, {8: 1.5})
    assert resumed.best.step == 2
    course(resumed, table, {9: 0.5})
    assert resumed.best.step == 9
    assert "warning" not in capsys.readouterr().out  # it was given before
    validation(table, tmp_path, start=0)
    assert read(tmp_path) == []


def test_what_was_measured_on_other_pictures_is_no_measure(tmp_path):
    table, other = Table(), Table()
    course(validation(table, tmp_path), table, {0: 0.0, 2: 0.0})
    other.ids = {**other.ids, "held_out": ["a", "b", "d"]}
    resumed = validation(other, tmp_path, start=2, kept=(2,))
    assert resumed.due(2, 9) and resumed.best is None
    assert course(resumed, other, {4: 5.0})[4] is resumed.best


def test_where_a_score_of_pictures_chooses_it_still_warns_by_the_mean(tmp_path, capsys):
    table, config = Table(), ValidationConfig(every=2, metric="fid")
    some = Validation(table, config, tmp_path, Accelerator(cpu=True), start=0)
    course(some, table, {0: 3.0, 2: 1, 4: 2, 6: 2})
    assert "risen since step 2" in capsys.readouterr().out and some.title == "held-out loss"


def test_what_a_resumed_run_forgets_does_not_hide_what_it_knows(tmp_path):
    """After step 2 it went on on other pictures."""
    table, other = Table(), Table()
    course(validation(table, tmp_path), table, {0: 1.0, 2: 0.0})
    other.ids = {**other.ids, "held_out": ["a", "b", "d"]}
    course(validation(other, tmp_path, start=2), other, {4: 0.0})
    assert validation(table, tmp_path, start=2, kept=(2,)).best.step == 2


def test_a_run_that_starts_anew_drops_what_was_said_of_its_base(tmp_path):
    from train.tracking import MetricsFile

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "validation/loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    MetricsFile(path, start=1).finish()
    assert len(path.read_text().splitlines()) == 2
    MetricsFile(path, start=0).finish()
    assert path.read_text() == ""


# The report


def test_the_report_shows_the_course_the_best_step_and_the_warning(tmp_path):
    for one in (level(0, 0), level(20, -0.1), level(40, -0.05), level(60, -0.04)):
        one.write(tmp_path / "validation")
    usual = {"epoch": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": 0.1, "images_per_second": 9}
    logged = [{"step": step, **usual} for step in (20, 40, 60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in logged))
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "The held-out loss has risen since step 20 at 2 validations in a row" in page
    assert "Held-out loss, mean over the schedule, less is better, ± standard error" in page
    assert page.count("Best: step 20") == 2 and "Most noise" in page
    assert page.index("Loss, mean squared") < page.index("Held-out loss,") < page.index("Speed,")


def test_a_report_without_validation_has_no_held_out_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert "Held-out" not in report.write(tmp_path).read_text(encoding="utf-8")

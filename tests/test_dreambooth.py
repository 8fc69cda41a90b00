"""train/dreambooth.py end to end on a tiny base: pairs, weights, what moves, what resumes."""

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from eval import generation
from tests.runs import arguments, finish, launch, make_world, preview_again
from tests.tiny import tiny_pipeline
from train import class_pictures, dreambooth, feeding, models, pictures, rundir
from train.config import ROOT, DreamBoothRun, LoraRun, RunFailed, TrainConfig, UserError, load
from train.diffusion import Objective

COMPARABLE = ("lora.dropout=0", "optim.learning_rate=1e-3", "optim.eps=1e-6")
CLASS = (
    "dreambooth.class_prompt=a circle",
    "dreambooth.class_images=7",
    "dreambooth.class_steps=1",
    "dreambooth.class_guidance=1",
    "preview.every=0",
)
FULL = ("lora=null",)
PREDICTION = ("dreambooth.prior=prediction",)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world: Path, output: Path, *overrides: str) -> list[str]:
    return arguments(world, output, *CLASS, *overrides)


def run(world: Path, output: Path, *overrides: str) -> Path:
    dreambooth.main(settings(world, output, *overrides))
    return output


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("runs") / "run", "preview.every=3")


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpainting")
    tiny_pipeline(family="sd2-inpainting").save_pretrained(folder)
    return f"model.path={folder}"


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def prepared(world: Path, output: Path, *overrides: str):
    """(configuration, pipeline, batches) as the entry makes them."""
    config = load(DreamBoothRun, settings(world, output, *overrides))
    accelerator = Accelerator(cpu=True)
    found = pictures.find(config.data)
    pipeline = models.load_base(config, accelerator)
    beside = class_pictures.Planned(config).complete(found, pipeline, accelerator)
    cached = not dreambooth.trains_text_encoder(config)
    made = feeding.batches(
        found, pipeline, config, accelerator, cache_captions=cached, classes=beside
    )
    return config, pipeline, made


def method_of(config, pipeline):
    return dreambooth.DreamBooth(
        pipeline,
        Objective.of(pipeline.scheduler, config.diffusion),
        config.lora,
        text_encoder=config.dreambooth.text_encoder,
        prior=dreambooth.frozen_base(config, pipeline),
        seed=config.seed,
    )


def class_folders(world: Path) -> list[Path]:
    return sorted((world / "cache").glob("prior-*/*"))


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("prior-*/*/*.png")}


# Batches


def test_a_step_has_pairs_of_one_bucket_and_weighs_the_means(world, tmp_path):
    weight = "dreambooth.prior_weight=0.5"
    config, _, batches = prepared(world, tmp_path, weight, "train.batch_size=6")
    seen = set()
    for step in range(6):
        batch = batches.training_set.gather(step, rank=0, world=1)
        half = len(batch["ids"]) // 2
        assert all(name.startswith("pictures/") for name in batch["ids"][:half])
        assert all(name.startswith("class/pictures/") for name in batch["ids"][half:])
        wanted = torch.tensor([1 / half] * half + [0.5 / half] * half)
        torch.testing.assert_close(batch["weight"], wanted)
        assert "prior" not in batch
        seen |= set(batch["ids"][half:])
        timesteps = batch["timestep"].tolist()
        assert timesteps[:half] != timesteps[half:]
    assert len(seen) > 3
    order = batches.training_set.order
    assert order.batch_size == 3 and order.samples_in(0) == 9


def test_generated_pictures_have_the_buckets_of_the_subject(world, tmp_path):
    prepared(world, tmp_path)
    (folder,) = class_folders(world)
    sizes = [Image.open(path).size for path in folder.glob("*.png")]
    own = {tuple(size) for size in pictures.find(load_data(world, tmp_path)).sizes.tolist()}
    assert len(sizes) == 7 and set(sizes) == own


def load_data(world, tmp_path):
    return load(DreamBoothRun, settings(world, tmp_path)).data


def test_more_class_pictures_are_only_added_and_fewer_taken(world, tmp_path):
    where = f"data.cache={tmp_path / 'cache'}"
    prepared(world, tmp_path, where)
    before = stamps(tmp_path / "cache")
    prepared(world, tmp_path, where, "dreambooth.class_images=9")
    after = stamps(tmp_path / "cache")
    assert len(after) == 9 and before.items() <= after.items()
    _, _, batches = prepared(world, tmp_path, where, "dreambooth.class_images=4")
    assert len(batches.training_set.records) == 9 + 4


def test_another_subject_s_picture_only_adds_class_pictures(world, tmp_path):
    own = tmp_path / "pictures"
    shutil.copytree(world / "pictures", own)
    where = [f"data.path={own}", f"data.cache={tmp_path / 'cache'}", "data.caption=x"]
    prepared(world, tmp_path, *where)
    before = stamps(tmp_path / "cache")
    Image.new("RGB", (64, 64), "red").save(own / "one-more.png")
    _, _, batches = prepared(world, tmp_path, *where)
    after = stamps(tmp_path / "cache")
    assert before.items() <= after.items() and len(after) < 7 + 4
    assert len(batches.training_set.records) == 10 + 7


def test_damaged_class_pictures_are_made_again(world, tmp_path):
    where = f"data.cache={tmp_path / 'cache'}"
    prepared(world, tmp_path, where)
    first, second, *_ = sorted(stamps(tmp_path / "cache"))
    before = first.read_bytes()
    first.write_bytes(before[:-60])
    second.unlink()
    prepared(world, tmp_path, where)
    assert len(stamps(tmp_path / "cache")) == 7 and first.read_bytes() == before


def test_class_pictures_are_as_the_checkpoint_samples_whatever_is_overridden(world, tmp_path):
    where = f"data.cache={tmp_path / 'cache'}"
    prepared(world, tmp_path, where)
    before = stamps(tmp_path / "cache")
    _, pipeline, _ = prepared(world, tmp_path, where, "diffusion.zero_terminal_snr=true")
    assert stamps(tmp_path / "cache") == before
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    made = [json.loads(Image.open(path).info["sd-atelier"])["scheduler"] for path in before]
    assert {one["timestep_spacing"] for one in made} == {"leading"}
    assert not any(one["rescale_betas_zero_snr"] for one in made)


def test_the_base_is_hashed_no_oftener_for_more_classes(world, tmp_path, monkeypatch):
    hashed, real = [], models.fingerprint
    monkeypatch.setattr(models, "fingerprint", lambda part: hashed.append(part) or real(part))
    counts = []
    several_classes = (*several(world, tmp_path / "own"), "dreambooth.class_prompt=null")
    for k, sources in enumerate([(), several_classes]):
        hashed.clear()
        prepared(world, tmp_path, f"data.cache={tmp_path / str(k)}", *sources)
        counts.append(len(hashed))
    assert counts[0] == counts[1]


def test_of_wildcards_each_class_picture_keeps_what_it_was_made_with(world, tmp_path):
    prompt = "dreambooth.class_prompt=a {red|green|blue} circle"
    _, _, batches = prepared(world, tmp_path, prompt, "dreambooth.class_images=12")
    training_set = batches.training_set
    captions = set()
    for index in range(9, 9 + 12):
        record = training_set.records[index]
        asked = json.loads(Image.open(record.path).info["sd-atelier"])["prompt"]
        assert record.captions == (asked,)
        captions.add(asked)
    assert captions == {f"a {colour} circle" for colour in ("red", "green", "blue")}


def test_class_pictures_that_another_machine_has_are_missed_by_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr("train.made_pictures.jointly", lambda accelerator, work: work())
    with pytest.raises(UserError, match=r"data\.cache=.*not the same folder for all processes"):
        prepared(world, tmp_path, f"data.cache={tmp_path / 'cache'}")


def test_too_many_class_pictures_at_once_are_named(world, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generation, "_sample", full)
    with pytest.raises(RunFailed, match=r"dreambooth\.class_batch_size=4 .*lower it"):
        prepared(world, tmp_path, f"data.cache={tmp_path / 'cache'}")


@pytest.mark.parametrize("own", [None, "a caption of its own"])
def test_given_class_pictures_have_their_own_captions_or_the_class_prompt(world, tmp_path, own):
    given = write_class(tmp_path / "class", *[(64 + 4 * k, 64) for k in range(5)])
    for picture in list((tmp_path / "class").glob("*.png")) if own else []:
        picture.with_suffix(".txt").write_text(own)
    overrides = [given, "data.captions.replace=a photo of zwx", "data.caption_dropout=0"]
    before = class_folders(world)
    _, pipeline, batches = prepared(world, tmp_path / "run", *overrides)
    assert class_folders(world) == before  # nothing is made
    batch = batches.training_set.gather(0, rank=0, world=1)
    encode = models.caption_encoder(pipeline.tokenizer, pipeline.text_encoder)
    half = len(batch["ids"]) // 2
    for row, caption in enumerate(["a photo of zwx"] * half + [own or "a circle"] * half):
        expected = encode([caption])[0]
        torch.testing.assert_close(batch["prompt_embeds"][row], expected, atol=2e-3, rtol=0)


def several(world: Path, folder: Path, *, same: bool = False) -> list[str]:
    """The pictures as two concepts, of two classes or of one."""
    for name in ("dog", "cat"):
        (folder / name).mkdir(parents=True)
    for k, picture in enumerate(sorted((world / "pictures").glob("*.png"))):
        (folder / ("dog", "cat")[k % 2] / picture.name).write_bytes(picture.read_bytes())
    classes = ("", "") if same else (", class_prompt: a dog", ", class_prompt: a cat")
    listed = ", ".join(
        f"{{path: {folder / name}, caption: a photo of my {name}{kind}}}"
        for name, kind in zip(("dog", "cat"), classes, strict=True)
    )
    return [f"data.sources=[{listed}]", "data.path=null"]


def test_each_concept_has_pictures_of_its_own_class(world, tmp_path):
    sources = several(world, tmp_path / "own")
    none = "dreambooth.class_prompt=null"
    _, _, batches = prepared(world, tmp_path / "run", *sources, none)
    concepts = set()
    for step in range(8):
        ids = batches.training_set.gather(step, rank=0, world=1)["ids"]
        for own, beside in zip(ids[: len(ids) // 2], ids[len(ids) // 2 :], strict=True):
            assert beside.startswith(f"class/{own.split('/')[0]}/")
            concepts.add(own.split("/")[0])
    assert concepts == {"dog", "cat"}
    assert len(batches.training_set.records) == 9 + 2 * 7


def test_concepts_of_one_class_share_its_pictures(world, tmp_path):
    sources = several(world, tmp_path / "own", same=True)
    _, _, batches = prepared(world, tmp_path / "run", *sources)
    assert len(batches.training_set.records) == 9 + 7
    batch = batches.training_set.gather(0, rank=0, world=1)
    assert {name.rpartition("/")[0] for name in batch["ids"][2:]} == {"class/dog"}


def test_prior_prediction_shows_each_picture_again_with_the_class_prompt(world, tmp_path):
    _, _, batches = prepared(world, tmp_path, *PREDICTION)
    training_set = batches.training_set
    batch = training_set.gather(0, rank=0, world=1)
    half = len(batch["ids"]) // 2
    assert batch["ids"][half:] == [f"class/{name}" for name in batch["ids"][:half]]
    assert batch["prior"].tolist() == [False] * half + [True] * half
    assert (batch["noise"][:half] != batch["noise"][half:]).all()
    keys, count = training_set.latent_keys.keys, len(training_set.records) // 2
    assert all(keys(index) == keys(count + index) for index in range(count))
    assert training_set.wordings[1].variants(("any",)) == ["a circle"]


def test_the_base_predicts_all_of_a_picture_whatever_its_mask(world, tmp_path):
    own = tmp_path / "pictures"
    shutil.copytree(world / "pictures", own)
    for path in list(own.glob("*.png")):
        mask = Image.new("L", Image.open(path).size)
        mask.paste(255, (0, 0, 24, 24))
        mask.save(path.with_suffix(".mask.png"))
    masks = [f"data.path={own}", "data.masks=true"]
    for prior in (PREDICTION, ()):
        config, pipeline, batches = prepared(world, tmp_path, *masks, *prior)
        batch = batches.training_set.gather(0, rank=0, world=1)
        half = len(batch["ids"]) // 2
        assert batch["mask"][:half].mean() < 0.3 and batch["mask"][half:].min() == 1
        if prior:
            assert method_of(config, pipeline).model(batch)[half:].max() < 1e-8


def test_of_weighted_sources_each_sample_is_predicted_for_its_own_class(world, tmp_path):
    sources = several(world, tmp_path / "own")
    sources[0] = sources[0].replace("dog, cap", "dog, weight: 0.3, cap")
    sources[0] = sources[0].replace("cat, cap", "cat, weight: 0.7, cap")
    null = "dreambooth.class_prompt=null"
    _, pipeline, batches = prepared(world, tmp_path, *sources, null, *PREDICTION,
                                    "data.caption_dropout=0", "train.batch_size=8")  # fmt: skip
    encode = models.caption_encoder(pipeline.tokenizer, pipeline.text_encoder)
    concepts = []
    for step in range(12):
        batch = batches.training_set.gather(step, rank=0, world=1)
        half = len(batch["ids"]) // 2
        assert batch["ids"][half:] == [f"class/{name}" for name in batch["ids"][:half]]
        for row in range(half, 2 * half):
            concepts.append(batch["ids"][row].split("/")[1])
            expected = encode([f"a {concepts[-1]}"])[0]
            torch.testing.assert_close(batch["prompt_embeds"][row], expected, atol=2e-3, rtol=0)
    assert concepts.count("cat") > 1.5 * concepts.count("dog") > 0


# Given class pictures


def write_class(folder: Path, *sizes: tuple[int, int]) -> str:
    folder.mkdir()
    for k, size in enumerate(sizes):
        Image.new("RGB", size, (40 * k, 90, 30)).save(folder / f"{k}.png")
    return f"dreambooth.class_path={folder}"


def test_what_becomes_of_given_class_pictures_is_said(world, tmp_path, capsys):
    given = write_class(tmp_path / "class", *[(24, 16), (160, 64), (64, 160), (200, 200)])
    run(world, tmp_path / "run", given, "dry_run=true")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("class ")]
    assert line.startswith("class    a circle: 4 pictures (") and "1 enlarged" in line
    assert "% of them cropped" in line


def test_class_pictures_are_not_enlarged_where_none_shall_be(world, tmp_path, capsys):
    large = [(200, 200), (100, 200), (200, 100)]
    given = write_class(tmp_path / "class", (16, 16), *large)
    small = [given, "data.upscale=false"]
    run(world, tmp_path / "run", *small, "dry_run=true")
    assert "3 pictures" in (said := capsys.readouterr().out) and "1 smaller than" in said
    _, _, batches = prepared(world, tmp_path, *small)
    beside = list(batches.training_set.records)[9:]
    assert {(one.width, one.height) for one in beside} == set(large)


def test_class_pictures_all_too_small_are_named(world, tmp_path):
    given = write_class(tmp_path / "class", *[(24, 16)] * 6)
    with pytest.raises(UserError, match=r"class_path=.*large enough.*data\.upscale=true"):
        run(world, tmp_path / "run", given, "data.upscale=false")


# The loss


def by_hand(pipeline, batch, row: int) -> float:
    """Squared error in v of one sample, with the base and arithmetic of its own."""
    alpha_bar = pipeline.scheduler.alphas_cumprod[batch["timestep"][row]].item()
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    latents, noise = batch["latents"][row], batch["noise"][row]
    with torch.no_grad():
        prediction = pipeline.unet(
            (alpha * latents + sigma * noise)[None],
            batch["timestep"][row],
            encoder_hidden_states=batch["prompt_embeds"][row][None],
        ).sample[0]
    return float((prediction - (alpha * noise - sigma * latents)).square().mean())


def test_the_loss_is_the_mean_over_instances_and_so_much_of_that_over_the_class(world, tmp_path):
    output = run(world, tmp_path / "run", "dreambooth.prior_weight=0.3", "train.steps=1",
                 "optim.warmup_steps=0", "lora.dropout=0")  # fmt: skip
    config, pipeline, batches = prepared(world, tmp_path / "other", "dreambooth.prior_weight=0.3")
    batch = batches.training_set.gather(0, rank=0, world=1)
    errors = [by_hand(pipeline, batch, row) for row in range(len(batch["ids"]))]
    half = len(errors) // 2
    expected = sum(errors[:half]) / half + 0.3 * sum(errors[half:]) / half
    assert losses(output)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("overrides", [(), ("lora.text_encoder={}",), FULL])
def test_before_the_first_step_the_base_is_predicted_without_an_error(world, tmp_path, overrides):
    config, pipeline, batches = prepared(world, tmp_path, *PREDICTION, *overrides)
    method = method_of(config, pipeline)
    batch = batches.training_set.gather(1, rank=0, world=1)
    found = method.model(batch)
    half = len(found) // 2
    assert found[half:].max() < 1e-8 and found[:half].min() > 1e-3


def test_a_moved_adapter_is_measured_against_the_base(world, tmp_path):
    config, pipeline, batches = prepared(world, tmp_path, *PREDICTION)
    batch = batches.training_set.gather(1, rank=0, world=1)
    base = {row: by_base(pipeline, batch, row) for row in range(len(batch["ids"]))}
    method = method_of(config, pipeline)
    method.model.eval()
    for name, parameter in method.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    found = method.model(batch)
    found.sum().backward()
    half = len(found) // 2
    for row in range(half, 2 * half):
        moved = by_base(pipeline, batch, row)
        expected = float((moved - base[row]).square().mean())
        assert expected > 1e-3
        assert found[row].item() == pytest.approx(expected, rel=1e-3)
    gradients = [p.grad for p in method.model.parameters() if p.requires_grad]
    assert len(gradients) > 0 and all(g is not None for g in gradients)


def by_base(pipeline, batch, row: int) -> torch.Tensor:
    alpha_bar = pipeline.scheduler.alphas_cumprod[batch["timestep"][row]]
    noisy = alpha_bar.sqrt() * batch["latents"][row] + (1 - alpha_bar).sqrt() * batch["noise"][row]
    with torch.no_grad():
        text = batch["prompt_embeds"][row][None]
        return pipeline.unet(
            noisy[None], batch["timestep"][row], encoder_hidden_states=text
        ).sample[0]


# Runs


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    pipeline = models.load_pipeline(str(folder))
    return {
        part: {name: value.clone() for name, value in getattr(pipeline, part).state_dict().items()}
        for part in ("unet", "text_encoder", "vae")
    }


@pytest.mark.parametrize("prior", ["images", "prediction", "none"])
@pytest.mark.parametrize("text", [False, True])
def test_in_full_what_is_asked_for_moves_and_nothing_else(world, tmp_path, prior, text):
    output = run(world, tmp_path / "run", *FULL, f"dreambooth.prior={prior}",
                 f"dreambooth.text_encoder={text}", "train.steps=2")  # fmt: skip
    before, after = weights(world / "base"), weights(output / "full")
    for part, moves in (("unet", True), ("text_encoder", text), ("vae", False)):
        for name, value in before[part].items():
            assert torch.equal(value, after[part][name]) != moves, name


@pytest.mark.parametrize("prior", ["images", "prediction"])
@pytest.mark.parametrize("text", [False, True])
def test_of_a_lora_all_that_is_asked_for_moves(world, tmp_path, prior, text):
    overrides = [f"dreambooth.prior={prior}", *(["lora.text_encoder={rank: 2}"] if text else [])]
    output = run(world, tmp_path / "run", *overrides, "train.steps=3")
    last = "checkpoints/step-00000003/model.safetensors"
    config, pipeline, _ = prepared(world, tmp_path / "other", *overrides)
    start = {
        name: parameter
        for name, parameter in method_of(config, pipeline).model.named_parameters()
        if parameter.requires_grad
    }
    after = load_file(output / last)
    assert after.keys() == start.keys()
    assert all(not torch.equal(after[name], start[name]) for name in after)
    assert any(name.startswith("text_encoder.") for name in after) == text
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_the_result_gives_the_pixels_of_the_last_preview(world, finished):
    pipeline = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(finished / "adapter"))
    preview = np.asarray(Image.open(finished / "previews" / "step-00000006" / "01.png"))
    assert np.array_equal(preview_again(pipeline, "a small blue star", seed=1), preview)


def test_a_whole_pipeline_gives_the_pixels_of_the_last_preview(world, tmp_path):
    output = run(world, tmp_path / "run", *FULL, "preview.every=2", "train.steps=2")
    pipeline = StableDiffusionPipeline.from_pretrained(output / "full", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    preview = np.asarray(Image.open(output / "previews" / "step-00000002" / "00.png"))
    assert np.array_equal(preview_again(pipeline, "a large red circle", seed=0), preview)


@pytest.mark.parametrize("overrides", [(), PREDICTION, (*PREDICTION, *FULL)])
def test_a_resumed_run_ends_in_the_same_bits(world, tmp_path, finished, overrides, monkeypatch):
    whole = run(world, tmp_path / "whole", *overrides) if overrides else finished
    from train.checkpoint import Checkpoints

    save = Checkpoints.save

    def killed(self, step, *args, **options):
        save(self, step, *args, **options)
        if step == 4:
            raise KeyboardInterrupt

    preview = "preview.every=0" if overrides else "preview.every=3"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        run(world, tmp_path / "parts", *overrides, preview)
    assert not any((tmp_path / "parts" / result).exists() for result in ("adapter", "full"))
    run(world, tmp_path / "parts", *overrides, preview)
    last = "checkpoints/step-00000006/model.safetensors"
    assert_same(load_file(tmp_path / "parts" / last), load_file(whole / last))
    assert losses(tmp_path / "parts") == losses(whole)


@pytest.mark.parametrize("overrides", [(), PREDICTION])
def test_micro_batches_only_cut_the_batch(world, tmp_path, overrides):
    for size in (1, 4):
        cut = f"train.micro_batch_size={size}"
        run(world, tmp_path / str(size), *overrides, cut, *COMPARABLE)
    one, four = adapter(tmp_path / "1"), adapter(tmp_path / "4")
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), PREDICTION])
def test_two_processes_make_and_train_on_the_same(world, tmp_path, overrides):
    one, two = (
        settings(world, tmp_path / name, *overrides, *COMPARABLE, f"data.cache={tmp_path / cache}")
        for name, cache in (("one", "cache-one"), ("two", "cache-two"))
    )
    dreambooth.main(one)
    said = finish(launch("train/dreambooth.py", *two, processes=2))
    assert said.count("class    a circle") == (1 if overrides else 2)
    first, second = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)


@pytest.mark.parametrize("overrides", [PREDICTION, (*PREDICTION, *FULL)])
def test_mixed_precision_starts_from_the_base_s_prediction(world, tmp_path, overrides):
    config, pipeline, batches = prepared(world, tmp_path, *overrides, "train.mixed_precision=bf16")
    if config.lora:
        models.store_in(pipeline, TrainConfig(mixed_precision="bf16"))
    batch = batches.training_set.gather(0, rank=0, world=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = method_of(config, pipeline).model(batch)
    half = len(found) // 2
    assert found[half:].max() < 1e-3 < 0.1 < found[:half].min()


@pytest.mark.parametrize("overrides", [PREDICTION, (*PREDICTION, *FULL)])
def test_mixed_precision_trains_in_fp32(world, tmp_path, overrides):
    precision = "train.mixed_precision=bf16"
    output = run(world, tmp_path / "run", *overrides, precision, "train.steps=3")
    assert all(np.isfinite(losses(output)))
    saved = load_file(output / "checkpoints/step-00000003/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_several_concepts_train_in_one_run(world, tmp_path, capsys):
    sources = several(world, tmp_path / "own")
    output = run(world, tmp_path / "run", *sources, "dreambooth.class_prompt=null", "train.steps=2")
    said = capsys.readouterr().out
    assert "class    a dog: 7 pictures that the base makes" in said
    manifest = json.loads((output / "manifest.json").read_text())
    assert [one["prompt"] for one in manifest["dataset"]["classes"]] == ["a dog", "a cat"]
    assert manifest["dataset"]["pictures"] == 9


def test_other_class_pictures_are_another_run(world, tmp_path):
    given = write_class(tmp_path / "class", *[(64, 64)] * 4)
    run(world, tmp_path / "run", given, "train.steps=2")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "class" / "3.png")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match="other pictures"):
        run(world, tmp_path / "run", given, "train.steps=2")


def test_an_inpainting_base_predicts_for_the_same_mask(world, tmp_path, inpainting):
    config, pipeline, batches = prepared(world, tmp_path, *PREDICTION, inpainting)
    batch = batches.training_set.gather(0, rank=0, world=1)
    found = method_of(config, pipeline).model(batch)
    assert found[2:].max() < 1e-8 and found[:2].min() > 1e-3


def test_a_finished_run_needs_no_space_and_no_old_batch_size(world, tmp_path, monkeypatch, capsys):
    short = ["train.steps=1", "optim.warmup_steps=0"]
    output = run(world, tmp_path / "run", *short)
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 9, 1))
    run(world, output, *short, "dreambooth.class_batch_size=2")
    assert "is finished" in capsys.readouterr().out


def test_space_for_all_classes_is_asked_for_together(world, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(rundir, "check_space", lambda _, many, what: needed.append((what, many)))
    for sources in ((), (*several(world, tmp_path / "own"), "dreambooth.class_prompt=null")):
        run(world, tmp_path / "run", "dry_run=true", *sources)
    one, two = (many for what, many in needed if what == "class pictures")
    assert two == 2 * one > 7 * 3 * 48 * 48


def test_class_pictures_made_otherwise_on_the_way_are_told(world, tmp_path, capsys):
    where = f"data.cache={tmp_path / 'cache'}"
    output = run(world, tmp_path / "run", where, "train.steps=2")
    told = "made anew, and differ by rounding"
    assert told not in capsys.readouterr().out
    shutil.rmtree(output / "adapter")
    picture = min(stamps(tmp_path / "cache"))
    with Image.open(picture) as image:
        about = PngInfo()
        about.add_text("sd-atelier", image.info["sd-atelier"])
        Image.eval(image.convert("RGB"), lambda value: value ^ 1).save(picture, pnginfo=about)
    run(world, output, where, "train.steps=2")
    assert told in capsys.readouterr().out


# What is refused, before anything heavy


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(models, "load_base", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("dreambooth.class_prompt=null",), r"dreambooth\.class_prompt is missing: .*prior=none"),
        (("dreambooth.class_prompt= ", *PREDICTION), r"dreambooth\.class_prompt is missing"),
        (("train.batch_size=5",), r"train\.batch_size=5 .*make it even"),
        (("train.batch_size=5", *PREDICTION), r"train\.batch_size=5 .*make it even"),
        (("dreambooth.text_encoder=true",), r"lora\.text_encoder"),
        (("dreambooth.class_images=2",), r"a circle: 2 class pictures .* 3 buckets"),
        (("dreambooth.class_path=no/such/folder",), r"dreambooth\.class_path=no/such/folder"),
        (("lora.blocks={up_blocks.9: 0}",), r"lora\.blocks: 'up_blocks\.9'"),
        (("data.streaming=true",), r"data\.streaming: class pictures"),
        (("diffusion.zero_terminal_snr=true", *PREDICTION), r"prior=prediction: .*terminal_snr"),
        (("diffusion.prediction_type=epsilon", *PREDICTION), r"predicts v_prediction .*=epsilon"),
        (("data.depth=true",), r"data\.depth: .*prior=prediction"),
    ],
)
def test_what_cannot_be_done_is_named_before_weights_are_loaded(
    world, tmp_path, no_weights, overrides, said
):
    with pytest.raises(UserError, match=said):
        run(world, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_base_that_needs_more_than_words_makes_no_class_pictures(
    world, tmp_path, no_weights, inpainting
):
    with pytest.raises(UserError, match=r"SD 2 inpainting .* from words alone.*prior=prediction"):
        run(world, tmp_path / "run", inpainting)


def test_a_concept_without_a_class_prompt_is_named(world, tmp_path, no_weights):
    sources = several(world, tmp_path / "own")
    sources[0] = sources[0].replace(", class_prompt: a cat", "")
    with pytest.raises(UserError, match=r"class_prompt is missing for the source 'cat'"):
        run(world, tmp_path / "run", *sources, "dreambooth.class_prompt=null")


def test_without_a_prior_no_class_is_asked_for(world, tmp_path):
    none = ["dreambooth.class_prompt=null", "dreambooth.prior=none", "train.batch_size=5"]
    config = load(DreamBoothRun, settings(world, tmp_path, *none))
    assert config.pictures_per_step == 5
    assert class_pictures.Planned(config).classes == []


def test_a_class_prompt_is_refused_by_other_methods(world, tmp_path):
    sources = several(world, tmp_path / "own")
    with pytest.raises(UserError, match=r"class_prompt='a dog' is for DreamBooth"):
        load(LoraRun, [a for a in arguments(world, tmp_path, *sources)])


def test_the_plan_counts_the_subject_s_epochs_and_trains_nothing(world, tmp_path, capsys):
    run(world, tmp_path / "run", "dry_run=true")
    said = capsys.readouterr().out
    assert "class    a circle: 7 pictures that the base makes" in said
    assert "epochs of 5 steps" in said and "nothing trained" in said
    assert not (tmp_path / "run").exists()


def test_the_rate_of_a_lora_is_noted_where_every_weight_trains(world, tmp_path, capsys):
    for changes, noted in ((FULL, True), ((*FULL, "optim.learning_rate=2e-6"), False), ((), False)):
        run(world, tmp_path / "run", "dry_run=true", "optim.final_learning_rate=0", *changes)
        assert ("note     lora=null trains every weight" in capsys.readouterr().out) == noted


def test_without_prompts_previews_show_the_subject_and_its_class():
    shipped = str(ROOT / "configs/dreambooth.yaml")
    with pytest.raises(UserError, match=r"dreambooth\.class_prompt is missing"):
        load(DreamBoothRun, ["--config", shipped, "data.path=my/dog"])
    given = ["data.path=my/dog", "data.caption=a photo of zwx dog"]
    given += ["dreambooth.class_prompt=a photo of a dog"]
    config = load(DreamBoothRun, ["--config", shipped, *given])
    assert config.preview.prompts == ["a photo of zwx dog", "a photo of a dog"]
    config = load(DreamBoothRun, ["--config", shipped, *given, "preview.prompts=[a cat]"])
    assert config.preview.prompts == ["a cat"]


def test_a_run_s_configuration_repeats_it(finished):
    values = yaml.safe_load((finished / "config.yaml").read_text())
    config = load(DreamBoothRun, ["--config", str(finished / "config.yaml")])
    assert config.model_dump(mode="json") == values

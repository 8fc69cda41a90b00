"""Every family: told from its JSON, trained as a LoRA and in full, and made of the export what the
previews show."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.ldm import to_ldm
from tests.runs import arguments, make_world
from tests.tiny import FAMILIES, tiny_pipeline
from tests.tiny_guides import tiny_estimator
from train import export, full, lora, models
from train.config import ModelConfig, UserError

PIPELINES = {
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
}
NAMES = {
    "sd21": "SD 2, v_prediction",
    "sd21-base": "SD 2, epsilon, 64 px",
    "sd2-depth": "SD 2 depth (5 channels), epsilon, 64 px",
    "sd2-inpainting": "SD 2 inpainting (9 channels), epsilon, 64 px",
    "sd15": "SD 1, epsilon, 64 px",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures with a depth map and a mask each, and a base of each family."""
    world = make_world(tmp_path_factory.mktemp("world"))
    for k, picture in enumerate(sorted((world / "pictures").glob("*.png"))):
        across, down = np.meshgrid(*map(np.arange, Image.open(picture).size))
        depth = (across * (k + 1) * 60 + down * 500).astype(np.uint16)
        Image.fromarray(depth).save(picture.with_suffix(".depth.png"))
        mask = ((across > 20) & (down < 40)).astype(np.uint8) * 255
        Image.fromarray(mask).save(picture.with_suffix(".mask.png"))
    for family in FAMILIES:
        tiny_pipeline(family=family).save_pretrained(world / family)
    return world


def shown(world):
    """The picture beside the second preview's prompt."""
    return world / "pictures" / "00000.png"


def settings(world, output, family, *overrides):
    own = [f"model.path={world / family}"]
    if family in PIPELINES:
        own.append(f"preview.images=[{shown(world)}, {shown(world)}]")
    own += ["data.depth=true"] * (family == "sd2-depth")
    return arguments(world, output, "train.steps=3", *own, *overrides)


def without_lora(folder, values):
    config = yaml.safe_load(open(values[0].removeprefix("--config="), encoding="utf-8"))
    del config["lora"]
    (folder / "full.yaml").write_text(yaml.safe_dump(config))
    return [f"--config={folder / 'full.yaml'}", *values[1:]]


def untouched(folder, family):
    """The folder in diffusers, as a user loads it."""
    kind = getattr(diffusers, PIPELINES.get(family, "StableDiffusionPipeline"))
    without = {"safety_checker": None}
    if family == "sd2-depth":
        without = {"depth_estimator": None, "feature_extractor": None}
    pipeline = kind.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline, world, family):
    """What the second preview shows."""
    more = {"width": 64, "height": 64}
    if family == "sd2-depth":
        depth = Image.open(shown(world).with_suffix(".depth.png"))
        depth = Image.fromarray(np.asarray(depth, np.float32)).resize((8, 8), Image.BICUBIC)
        depth = torch.tensor(np.asarray(depth))[None]
        more = {"image": Image.open(shown(world)), "depth_map": depth, "strength": 1.0}
    if family == "sd2-inpainting":
        more["image"] = Image.open(shown(world))
        more["mask_image"] = Image.open(shown(world).with_suffix(".mask.png"))
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 2, "guidance_scale": 2, "generator": generator}
    return np.asarray(pipeline("a small blue star", **options, **more).images[0])


def preview(run):
    return np.asarray(Image.open(run / "previews" / "step-00000003" / "01.png"))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_told_from_its_json(world, family):
    assert str(models.inspect(ModelConfig(path=str(world / family)))) == NAMES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_trains_and_its_export_gives_the_previews(world, tmp_path, family, capsys):
    lora.main(settings(world, tmp_path / "run", family))
    assert NAMES[family] in capsys.readouterr().out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["base"]["family"] == NAMES[family].split(",")[0].split(" (")[0]
    pipeline = untouched(world / family, family)
    base = picture(pipeline, world, family)
    pipeline.load_lora_weights(str(tmp_path / "run" / "adapter"), weight_name=WEIGHTS)
    tuned = picture(pipeline, world, family)
    assert np.array_equal(tuned, preview(tmp_path / "run")) and not np.array_equal(tuned, base)


WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_the_unet_trains_and_its_export_gives_the_previews(world, tmp_path, family):
    full.main(without_lora(tmp_path, settings(world, tmp_path / "run", family)))
    before, after = (
        load_file(folder / "unet/diffusion_pytorch_model.safetensors")
        for folder in (world / family, tmp_path / "run/full")
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # The channels beside the noisy latents too, each of them.
    moved = (before["conv_in.weight"] - after["conv_in.weight"]).abs().amax((0, 2, 3))
    assert (moved > 0).all()
    pipeline = untouched(tmp_path / "run/full", family)
    assert np.array_equal(picture(pipeline, world, family), preview(tmp_path / "run"))
    kind = type(untouched(world / family, family).scheduler)
    assert type(pipeline.scheduler) is kind


def test_zero_terminal_snr_reaches_the_exported_pipeline(world, tmp_path):
    values = settings(world, tmp_path / "run", "sd21", "diffusion.zero_terminal_snr=true")
    full.main(without_lora(tmp_path, values))
    pipeline = untouched(tmp_path / "run/full", "sd21")
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert np.array_equal(picture(pipeline, world, "sd21"), preview(tmp_path / "run"))


@pytest.mark.parametrize(
    ("configured", "written"),
    [("DPTImageProcessor", "DPTImageProcessor"), ("DPTFeatureExtractor", "DPTImageProcessor")],
)
def test_an_exported_depth_model_has_its_base_s_depth_estimator(
    world, tmp_path, configured, written
):
    base = with_estimator(world, tmp_path / "base", configured)
    pipeline = models.load_pipeline(str(base))
    pipeline.save_pretrained(tmp_path / "full")
    models.add_depth_estimator(pipeline, tmp_path / "full")
    index = json.loads((tmp_path / "full/model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", written]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "full")
    assert type(loaded.depth_estimator).__name__ == "DPTForDepthEstimation"
    options = {"num_inference_steps": 1, "output_type": "np"}
    made = loaded("a star", image=Image.open(shown(world)), strength=1.0, **options)
    assert made.images.shape == (1, 64, 64, 3)


def test_of_the_depth_estimator_only_what_is_safe_is_exported(world, tmp_path):
    base = with_estimator(world, tmp_path / "base", "DPTImageProcessor")
    for name in ("pytorch_model.bin", "model.fp16.safetensors"):
        (base / "depth_estimator" / name).write_bytes(b"x")
    export.save_pipeline(models.load_pipeline(str(base)), tmp_path / "full")
    found = {file.name for file in (tmp_path / "full/depth_estimator").iterdir()}
    assert found == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("part", ["depth_estimator", "feature_extractor"])
def test_a_base_without_depth_estimator_is_exported_without_it_and_that_is_said(
    world, tmp_path, part, capsys
):
    base = with_estimator(world, tmp_path / "base", "DPTImageProcessor")
    index = json.loads((base / "model_index.json").read_text()) | {part: [None, None]}
    (base / "model_index.json").write_text(json.dumps(index))
    export.save_pipeline(models.load_pipeline(str(base)), tmp_path / "full")
    said = capsys.readouterr().out
    assert f"has no {part}" in said and "depth_estimator=None, feature_extractor=None" in said
    untouched(tmp_path / "full", "sd2-depth")


def test_a_depth_estimator_of_the_hub_is_that_of_the_revision(world, tmp_path, monkeypatch):
    base, asked = with_estimator(world, tmp_path / "base", "DPTImageProcessor"), []

    def download(path, *, revision, allow_patterns):
        asked.append((path, revision, allow_patterns))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipeline = models.load_pipeline(str(base))
    pipeline.described_in = ("owner/depth", "abc")
    export.save_pipeline(pipeline, tmp_path / "full")
    ((path, revision, patterns),) = asked
    assert (path, revision) == ("owner/depth", "abc")
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in patterns)
    assert (tmp_path / "full/depth_estimator/model.safetensors").exists()


def with_estimator(world, folder, configured):
    """The depth base with a tiny depth estimator, as the real one has a large one."""
    shutil.copytree(world / "sd2-depth", folder)
    tiny_estimator(folder, configured)
    return folder


# Single files


def as_file(world, family, path):
    tensors = to_ldm(world / family)
    if family == "sd15":
        (text,) = (world / family / "text_encoder").glob("*.safetensors")
        tensors = {name: t for name, t in tensors.items() if not name.startswith("cond_stage")}
        for name, tensor in load_file(text).items():
            name = f"text_model.{name.removeprefix('text_model.')}"
            tensors[f"cond_stage_model.transformer.{name}"] = tensor
    save_file(tensors, path)
    return str(path)


def test_a_depth_model_of_a_single_file_has_the_depth_estimator_of_its_configuration(
    world, tmp_path
):
    base = with_estimator(world, tmp_path / "base", "DPTImageProcessor")
    file = as_file(world, "sd2-depth", tmp_path / "depth.safetensors")
    export.save_pipeline(models.load_pipeline(file, config=str(base)), tmp_path / "full")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "full")
    assert type(loaded.depth_estimator).__name__ == "DPTForDepthEstimation"


def test_a_single_file_described_on_the_hub_is_checked_by_its_json_alone(
    world, tmp_path, monkeypatch
):
    file, asked = as_file(world, "sd15", tmp_path / "sd15.safetensors"), []

    def download(path, *, revision, allow_patterns):
        asked.append((path, allow_patterns))
        return str(world / {"own": "sd15"}.get(path.split("/")[1], "sd21"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = models.inspect(ModelConfig(path=file, config="some/own"))
    assert (found.prediction_type, found.resolution) == ("epsilon", 64)
    assert asked[-1][0] == "some/own" and not any("safetensors" in p for p in asked[-1][1])
    with pytest.raises(UserError, match="model.config=some/other describes SD 2"):
        models.inspect(ModelConfig(path=file, config="some/other"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_of_each_is_its_folder(world, tmp_path, family):
    file = as_file(world, family, tmp_path / "model.safetensors")
    config = ModelConfig(path=file, config=str(world / family))
    assert str(models.inspect(config)) == NAMES[family]
    loaded = models.load_pipeline(file, config=str(world / family))
    wanted = models.load_pipeline(str(world / family))
    assert type(loaded) is type(wanted) and type(loaded.scheduler) is type(wanted.scheduler)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(one, part).state_dict() for one in (loaded, wanted))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["sd2-depth", "sd15"])
def test_a_single_file_with_the_configuration_of_another_family_is_refused(world, tmp_path, family):
    file = as_file(world, family, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="describes SD 2 inpainting"):
        models.inspect(ModelConfig(path=file, config=str(world / "sd2-inpainting")))


# What a family asks of a run


def refused(world, output, family, *overrides):
    with pytest.raises(UserError) as caught:
        lora.main(settings(world, output, family, *overrides))
    assert not output.exists()
    return str(caught.value)


@pytest.fixture
def unloadable(monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("sd2-depth", ["data.depth=false"], "set data.depth=true"),
        ("sd21", ["data.depth=true"], "is no depth model"),
        ("sd2-inpainting", ["data.depth=true"], "is no depth model"),
        ("sd2-inpainting", ["data.streaming=true"], "set data.streaming=false"),
        ("sd21-base", ["diffusion.zero_terminal_snr=true"], "predicts epsilon"),
        ("sd21", ["diffusion.max_timestep=1000"], "has the timesteps 0 to 999"),
        ("sd2-depth", ["preview.images=[]"], "0 pictures for 2"),
        ("sd2-depth", ["preview.images=[gone.png, gone.png]"], "cannot read gone.png"),
        ("sd15", ["preview.images=[one.png]"], "makes pictures from text alone"),
        ("sd2-depth", ["evaluation.every=2"], "are made from text alone; set evaluation.every=0"),
        ("sd2-inpainting", ["evaluation.every=2"], "evaluation.every=2: model.path="),
    ],
)
def test_what_the_base_can_not_be_trained_with_is_refused(world, tmp_path, family, overrides, says):
    assert says in refused(world, tmp_path / "run", family, *overrides)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("family", "end"), [("sd2-depth", ".depth.png"), ("sd2-inpainting", ".mask.png")]
)
def test_a_preview_s_picture_without_what_lies_beside_it_is_named(world, tmp_path, family, end):
    alone = tmp_path / "alone.png"
    Image.open(shown(world)).save(alone)
    message = refused(world, tmp_path / "run", family, f"preview.images=[{alone}, {alone}]")
    assert f"cannot read {tmp_path / 'alone'}{end}" in message
    if family == "sd2-depth":
        Image.new("I;16", (64, 64), 7).save(tmp_path / "alone.depth.png")
        message = refused(world, tmp_path / "run", family, f"preview.images=[{alone}, {alone}]")
        assert "without depth" in message


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("family", PIPELINES)
def test_a_preview_s_damaged_picture_map_or_mask_is_named(world, tmp_path, family):
    end = ".depth.png" if family == "sd2-depth" else ".mask.png"
    own = tmp_path / "own.png"
    for damaged in (own, own.with_suffix(end)):
        shutil.copy(shown(world), own)
        shutil.copy(shown(world).with_suffix(end), own.with_suffix(end))
        damaged.write_bytes(damaged.read_bytes()[:-60])
        message = refused(world, tmp_path / "run", family, f"preview.images=[{own}, {own}]")
        assert f"cannot read {damaged}" in message and "Error" not in message


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_preview_s_depth_map_may_have_any_kind_of_pixels(world, tmp_path, mode):
    own = tmp_path / "own.png"
    shutil.copy(shown(world), own)
    Image.linear_gradient("L").convert(mode).save(own.with_suffix(".depth.png"))
    pictures = f"preview.images=[{own}, {own}]"
    lora.main(settings(world, tmp_path / "run", "sd2-depth", pictures, "dry_run=true"))


@pytest.mark.usefixtures("unloadable")
def test_pictures_without_a_depth_map_are_named(world, tmp_path):
    folder = shutil.copytree(world / "pictures", tmp_path / "pictures")
    bare = folder / shown(world).name
    bare.with_suffix(".depth.png").unlink()
    message = refused(world, tmp_path / "run", "sd2-depth", f"data.path={folder}")
    assert f"{bare.name}: has no depth map" in message and "scripts/depth.py" in message


@pytest.mark.parametrize(("side", "noted"), [(64, False), (96, True)])
def test_a_resolution_far_from_the_base_s_is_noted(world, tmp_path, side, noted, capsys):
    lora.main(settings(world, tmp_path / "run", "sd15", f"data.resolution={side}", "dry_run=true"))
    assert ("the base was trained at 64 px" in capsys.readouterr().out) == noted


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["diffusion.min_snr_gamma=5"], "min_snr_gamma gives it the weight 0"),
        (["diffusion.max_timestep=998"], "max_timestep=998 is below it"),
        (["diffusion.max_timestep=999"], None),
        ([], None),
    ],
)
def test_a_first_sampling_step_that_is_never_trained_is_noted(
    world, tmp_path, overrides, reason, capsys
):
    more = ["diffusion.zero_terminal_snr=true", *overrides, "dry_run=true"]
    lora.main(settings(world, tmp_path / "run", "sd21", *more))
    said = capsys.readouterr().out
    assert ("never trained" in said) == (reason is not None) and (reason or "") in said


def test_a_distilled_base_is_noted(world, tmp_path, capsys):
    base = shutil.copytree(world / "sd21-base", tmp_path / "turbo")
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    scheduler = models.load_pipeline(str(world / "sd21-base")).scheduler.config
    turbo = diffusers.EulerDiscreteScheduler.from_config(scheduler, timestep_spacing="trailing")
    turbo.save_pretrained(base / "scheduler")
    values = settings(world, tmp_path / "run", "sd21-base", f"model.path={base}", "dry_run=true")
    lora.main(values)
    assert "looks distilled" in capsys.readouterr().out


def test_an_adapter_is_used_with_what_its_base_predicts_overridden_or_not(
    world, tmp_path, monkeypatch, capsys
):
    from scripts import generate

    def make(base, run):
        words = [f"adapters={tmp_path / run / 'adapter'}", "prompt=x", "steps=1", "width=64"]
        generate.main([f"model={world / base}", *words, "height=64", f"output={tmp_path / 'out'}"])

    lora.main(settings(world, tmp_path / "plain", "sd21"))
    override = "diffusion.prediction_type=v_prediction"
    lora.main(settings(world, tmp_path / "override", "sd21-base", override))
    capsys.readouterr()
    make("sd21-base", "override")
    assert "sampled with prediction_type=v_prediction" in capsys.readouterr().out
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="base that predicts v_prediction, and this one .*epsilon"):
        make("sd21-base", "plain")
    with pytest.raises(UserError, match="base that predicts epsilon, and this one .*v_prediction"):
        make("sd21", "override")


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_base_trains_to_predict_something_else_and_previews_it(world, tmp_path, prediction):
    override = f"diffusion.prediction_type={prediction}"
    lora.main(settings(world, tmp_path / "run", "sd21-base", override))
    file = tmp_path / "run/adapter/scheduler/scheduler_config.json"
    assert json.loads(file.read_text())["prediction_type"] == prediction


@pytest.mark.parametrize("family", PIPELINES)
def test_commands_that_draw_from_text_alone_refuse_what_needs_a_picture(world, tmp_path, family):
    from scripts import generate, prior_images

    for main in (generate.main, prior_images.main):
        with pytest.raises(UserError, match=f"{family[4:]} .* from text alone"):
            main([f"model={world / family}", "prompt=x", f"output={tmp_path / 'out'}"])

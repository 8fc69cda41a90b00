import json
import shutil

import numpy as np
import pytest
import torch

from tests.tiny import tiny_pipeline, tiny_tokenizer
from train import inspection, models
from train.config import DiffusionConfig, ModelConfig, TrainConfig, UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved, tmp_path):
    """A complete base of one's own to damage."""
    return shutil.copytree(saved, tmp_path / "tiny")


def inspect(path):
    return models.inspect(ModelConfig(path=str(path)))


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        inspect(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# What a checkpoint is


def test_a_folder_is_recognised_from_its_json(base):
    edit(base / "unet/config.json", sample_size=96)
    found = inspect(base)
    assert (found.kind, found.prediction_type, found.resolution) == (
        "diffusers folder",
        "v_prediction",
        768,
    )
    weights = [f.stat().st_size for f in base.rglob("*.safetensors")]
    assert found.weight_bytes == sum(weights)


def test_epsilon_is_what_a_scheduler_means_that_does_not_say(base):
    file = base / "scheduler/scheduler_config.json"
    settings = json.loads(file.read_text())
    del settings["prediction_type"]
    file.write_text(json.dumps(settings))
    assert inspect(base).prediction_type == "epsilon"


def test_a_hub_id_is_recognised_by_its_json_alone(base, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    shutil.rmtree(base / "vae")
    found = inspect("owner/model-2.1")
    assert (found.kind, found.prediction_type) == ("hub id", "v_prediction")
    assert asked[0][0] == "owner/model-2.1" and not any("safetensors" in p for p in asked[0][2])


def test_a_hub_id_that_cannot_be_had_is_told_before_anything_heavy():
    message = refused("owner/model-2.1")
    assert "owner/model-2.1" in message and "network" in message


@pytest.mark.parametrize(
    "path",
    ["/nowhere/model", "./model", "../model", "data/assets/toy", "model", "gone.safetensors"],
)
def test_a_path_that_is_not_there_is_told_from_a_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such" in refused(path)


@pytest.mark.parametrize("name", ["v2-1.ckpt", "model.bin", "model.pt", "model.pth", "model.onnx"])
@pytest.mark.parametrize("exists", [True, False])
def test_pickles_are_refused_whether_there_or_not(name, exists, tmp_path):
    path = tmp_path / name
    if exists:
        path.write_bytes(b"\x80\x04.")
    message = refused(path)
    assert "safetensors" in message or not exists


@pytest.mark.parametrize("part", inspection.PARTS)
def test_a_missing_part_is_named(base, part):
    shutil.rmtree(base / part)
    assert f"lacks {part};" in refused(base)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_without_weights_is_named_and_pickled_ones_are_no_weights(base, part):
    (file,) = (base / part).glob("*.safetensors")
    file.unlink()
    assert f"{part}/ has no" in refused(base) and "download" in refused(base)
    (base / part / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle pytorch_model.bin" in refused(base)


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe"])
def test_missing_and_damaged_json_is_named(base, file, content):
    (base / file).unlink() if content is None else (base / file).write_bytes(content)
    assert str(base / file) in refused(base)


def test_an_empty_folder_is_no_pipeline(tmp_path):
    assert "not a diffusers folder" in refused(tmp_path)


@pytest.mark.parametrize(
    ("family", "unet"),
    [
        ("Stable Diffusion XL", {"addition_embed_type": "text_time", "cross_attention_dim": 2048}),
        ("the Stable Diffusion upscaler", {"in_channels": 7}),
        ("InstructPix2Pix", {"in_channels": 8}),
        ("of an unknown family", {"in_channels": 12}),
        ("Stable unCLIP", {"class_embed_type": "projection"}),
        ("a latent consistency model", {"time_cond_proj_dim": 256}),
        ("the Stable Diffusion upscaler", {"in_channels": 7, "num_class_embeds": 1000}),
        ("a model of numbered classes", {"num_class_embeds": 10}),
        ("a model of numbered classes", {"class_embed_type": "timestep"}),
    ],
)
def test_another_family_is_refused_by_name(base, family, unet):
    edit(base / "unet/config.json", **unet)
    message = refused(base)
    assert f"is {family}" in message and "stable-diffusion-2-1" in message


def test_the_pipeline_that_starts_from_a_picture_has_the_same_parts(base):
    edit(base / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline")
    assert inspect(base).family.name == "SD 2"
    assert type(models.load_pipeline(str(base))).__name__ == "StableDiffusionPipeline"
    edit(base / "unet/config.json", in_channels=9)
    assert "says StableDiffusionImg2ImgPipeline" in refused(base)


def test_the_old_default_of_a_unet_s_size_is_none(base):
    edit(base / "unet/config.json", sample_size=32)
    assert inspect(base).resolution is None
    edit(base / "unet/config.json", sample_size=64)
    assert inspect(base).resolution == 512


@pytest.mark.parametrize(
    "kind", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "KarrasVeScheduler"]
)
def test_a_scheduler_without_a_schedule_of_betas_is_refused_by_name(base, kind):
    import diffusers

    getattr(diffusers, kind)().save_pretrained(base / "scheduler")
    assert f"{kind} predicts" in refused(base)


def test_what_a_flow_model_predicts_is_refused_by_name(base):
    edit(base / "scheduler/scheduler_config.json", prediction_type="flow_prediction")
    assert "predicts flow_prediction" in refused(base)


@pytest.mark.parametrize(
    ("settings", "distilled"),
    [
        ({}, False),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, False),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "prediction_type": "epsilon",
            },
            True,
        ),
        ({"_class_name": "LCMScheduler"}, True),
    ],
)
def test_a_model_of_a_few_steps_is_told_by_its_sampler(base, settings, distilled):
    edit(base / "scheduler/scheduler_config.json", **settings)
    assert inspect(base).distilled == distilled


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_variant_alone_are_named(base, part, variant):
    (file,) = (base / part).glob("*.safetensors")
    other = file.with_name(f"{file.stem}.{variant}.safetensors")
    shutil.copy(file, other)
    file.unlink()
    message = refused(base)
    assert f"only the variant {other.name}: rename it" in message
    other.rename(file)
    models.load_pipeline(str(base))


def test_weights_in_shards_are_a_part_s_weights(base):
    whole = inspect(base).weight_bytes
    pipeline = tiny_pipeline()
    shutil.rmtree(base / "unet")
    pipeline.unet.save_pretrained(base / "unet", max_shard_size="200KB")
    assert len(list((base / "unet").glob("*.safetensors"))) > 1
    assert abs(inspect(base).weight_bytes - whole) < 20_000
    loaded = models.load_pipeline(str(base)).unet.state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in pipeline.unet.state_dict().items())


def test_parts_of_different_models_are_told_by_their_widths(base):
    edit(base / "unet/config.json", cross_attention_dim=768)
    message = refused(base)
    assert "768 wide" in message and "32 (hidden_size)" in message


@pytest.mark.parametrize("channels", [5, 9])
def test_a_unet_of_another_family_than_its_pipeline_s_is_told(base, channels):
    edit(base / "unet/config.json", in_channels=channels)
    message = refused(base)
    assert "says StableDiffusionPipeline" in message and f"{channels} input channels" in message


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionXLPipeline", "is Stable Diffusion XL"),
        ("StableDiffusion3Pipeline", "is Stable Diffusion 3"),
        ("StableDiffusionInstructPix2PixPipeline", "is InstructPix2Pix"),
        ("StableDiffusionUpscalePipeline", "is the Stable Diffusion upscaler"),
        ("FluxPipeline", "is Flux"),
        ("KandinskyPipeline", "is a KandinskyPipeline"),
    ],
)
def test_another_pipeline_is_refused_by_name_even_if_its_parts_differ(base, name, family):
    edit(base / "model_index.json", _class_name=name)
    shutil.rmtree(base / "unet")
    message = refused(base)
    assert name in message and family in message


# Loading


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_folder_loads_in_the_precision_asked_for(saved, dtype):
    pipeline = models.load_pipeline(str(saved), dtype=dtype)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {dtype or torch.float32}
    assert pipeline.safety_checker is None


def test_weights_of_another_precision_than_the_file_are_the_same_weights(saved):
    wanted = tiny_pipeline().unet.state_dict()
    loaded = models.load_pipeline(str(saved)).unet.state_dict()
    assert all(torch.equal(wanted[name], loaded[name]) for name in wanted)


def damage_weights(base):
    (file,) = (base / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage",
    [
        damage_weights,
        lambda base: (base / "tokenizer/tokenizer_config.json").write_text("{"),
        lambda base: edit(base / "unet/config.json", cross_attention_dim=48),
        lambda base: edit(base / "model_index.json", unet=["diffusers", "NoSuchModel"]),
        lambda base: edit(base / "vae/config.json", down_block_types=["NoSuchBlock"]),
    ],
)
def test_what_can_not_be_loaded_is_the_users_to_mend(base, damage):
    damage(base)
    with pytest.raises(UserError, match=str(base)):
        models.load_pipeline(str(base))


def test_a_hub_that_can_not_be_reached_is_told_in_one_line(saved, monkeypatch):
    from diffusers import StableDiffusionPipeline

    def unreachable(*_, **__):
        raise OSError("We couldn't connect\nto the hub\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(saved))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", unreachable)
    with pytest.raises(
        UserError, match="owner/name.*We couldn't connect. Check.*network"
    ) as caught:
        models.load_pipeline("owner/name")
    assert "\n" not in str(caught.value)


def test_a_single_file_that_is_none_is_named(tmp_path, saved):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not a model")
    with pytest.raises(UserError, match="model.safetensors"):
        models.load_pipeline(str(file), config=str(saved))


# What the configuration overrides


def test_without_overrides_the_scheduler_is_the_checkpoint_s_own():
    scheduler = tiny_pipeline().scheduler
    assert models.reschedule(scheduler, DiffusionConfig()) is scheduler


def test_a_prediction_type_reaches_the_scheduler_and_nothing_else_changes():
    old = tiny_pipeline(family="sd21-base").scheduler
    new = models.reschedule(old, DiffusionConfig(prediction_type="v_prediction"))
    assert type(new) is type(old)
    kept = {key: value for key, value in old.config.items() if not key.startswith("_")}
    kept |= {"prediction_type": "v_prediction"}
    assert {key: new.config[key] for key in kept} == kept


def rescaled(scheduler):
    """Lin et al. 2023, algorithm 1, in float64."""
    root = scheduler.alphas_cumprod.double().sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


@pytest.mark.parametrize("family", ["sd21", "sd21-base"])
def test_zero_terminal_snr_rescales_the_schedule_and_samples_from_its_end(family):
    old = tiny_pipeline(family=family).scheduler
    config = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    new = models.reschedule(old, config)
    assert new.alphas_cumprod[-1] == 0
    torch.testing.assert_close(new.alphas_cumprod.double(), rescaled(old), rtol=0, atol=1e-6)
    new.set_timesteps(4)
    assert new.timesteps[0] == 999
    assert (new.config.prediction_type, new.config.clip_sample) == ("v_prediction", False)


SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"),
    *("UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *("DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "LCMScheduler"),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, of numpy
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_every_scheduler_steps_what_it_is_made_to_predict(kind, zero, prediction):
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(tiny_pipeline().scheduler.config)
    config = DiffusionConfig(prediction_type=prediction, zero_terminal_snr=zero)
    new = models.reschedule(scheduler, config)
    new.set_timesteps(4)
    latents = torch.ones(1, 4, 8, 8) * new.init_noise_sigma
    for timestep in new.timesteps:
        model_input = new.scale_model_input(latents, timestep)
        latents = new.step(0.1 * model_input, timestep, latents).prev_sample
    assert latents.isfinite().all() and new.config.prediction_type == prediction


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_a_scheduler_in_place_of_another_does_not_clip_latents(kind):
    import diffusers

    old = tiny_pipeline(family="sd21-base").scheduler
    assert not models.converted(old, getattr(diffusers, kind)).config.clip_sample
    clipping = diffusers.DDIMScheduler(clip_sample=True)
    assert models.converted(clipping, getattr(diffusers, kind)).config.clip_sample


def test_what_trains_is_never_cast():
    pipeline = tiny_pipeline()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    models.store_in(pipeline, TrainConfig(mixed_precision="bf16"))
    assert pipeline.unet.dtype == torch.bfloat16
    pipeline.unet.conv_in.bias.requires_grad_(True)
    with pytest.raises(AssertionError):
        models.store_in(pipeline, TrainConfig(mixed_precision="bf16"))


def test_a_model_of_epsilon_can_not_have_zero_terminal_snr():
    scheduler = tiny_pipeline(family="sd21-base").scheduler
    with pytest.raises(UserError, match="zero_terminal_snr=true: .* epsilon"):
        models.reschedule(scheduler, DiffusionConfig(zero_terminal_snr=True))


# Fingerprints and encoders


def test_a_fingerprint_changes_with_any_weight_and_with_precision():
    one, same, other = tiny_pipeline().vae, tiny_pipeline().vae, tiny_pipeline(seed=1).vae
    assert models.fingerprint(one) == models.fingerprint(same) != models.fingerprint(other)
    parameter = list(same.parameters())[7]
    parameter.data.view(-1)[0] = torch.nextafter(parameter.data.view(-1)[0], torch.tensor(9.0))
    assert models.fingerprint(one) != models.fingerprint(same)
    assert models.fingerprint(one) != models.fingerprint(tiny_pipeline().vae.to(torch.bfloat16))


def test_a_tokenizer_s_fingerprint_knows_its_padding():
    other = tiny_tokenizer()
    other.pad_token = other.eos_token
    assert models.tokenizer_fingerprint(tiny_tokenizer()) == models.tokenizer_fingerprint(
        tiny_tokenizer()
    )
    assert models.tokenizer_fingerprint(other) != models.tokenizer_fingerprint(tiny_tokenizer())


def test_captions_are_encoded_as_the_pipeline_does():
    pipeline = tiny_pipeline()
    captions = ["a red cat", "", "long " * 100]
    ours = models.caption_encoder(pipeline.tokenizer, pipeline.text_encoder)(captions)
    for caption, embedding in zip(captions, ours, strict=True):
        expected, _ = pipeline.encode_prompt(caption, "cpu", 1, False)
        np.testing.assert_allclose(embedding, expected[0].detach(), atol=1e-5)


def test_latents_are_the_posterior_in_fp32():
    vae = tiny_pipeline().vae.eval()
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    mean, log_variance = models.latent_encoder(vae)(pixels).chunk(2, 1)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close((0.5 * log_variance).exp(), posterior.std)
    assert models.latent_encoder(vae.to(torch.bfloat16))(pixels).dtype == torch.float32


def test_channels_innermost_change_nothing_but_rounding():
    torch.manual_seed(0)
    given = (torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 32))
    found = []
    for innermost in (False, True):
        unet = (pipeline := tiny_pipeline()).unet
        for part in (unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False)
        models.store_in(pipeline, TrainConfig(channels_last=innermost))
        layout = unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert layout == innermost
        found.append(unet(*given).sample)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)

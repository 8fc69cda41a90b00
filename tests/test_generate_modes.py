"""Every mode of scripts/generate.py on a tiny model of its family."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from eval.generation import read_settings
from scripts import generate
from scripts.generation import pipelines
from tests.tiny import tiny_pipeline
from tests.tiny_guides import tiny_controlnet, tiny_estimator, tiny_upscaler
from train import export
from train.config import UserError

HOW = ["prompt=a cat", "steps=2", "guidance=3", "seed=7"]
BASES = {
    "plain": lambda: tiny_pipeline(family="sd21-base"),
    "v": tiny_pipeline,
    "sd15": lambda: tiny_pipeline(family="sd15"),
    "depth": lambda: tiny_pipeline(family="sd2-depth"),
    "inpainting": lambda: tiny_pipeline(family="sd2-inpainting"),
    "upscaler": tiny_upscaler,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of tiny bases, ControlNets, an adapter of each base, and pictures."""
    folder = tmp_path_factory.mktemp("world")
    for name, make in BASES.items():
        make().save_pretrained(folder / name)
        save_adapter(make(), folder / f"{name}-adapter")
    tiny_estimator(folder / "depth")
    for seed, name in enumerate(("edges", "pose")):
        tiny_controlnet(seed).save_pretrained(folder / name)
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (4, 8, 3), dtype=np.uint8))
    for name in ("image", "map", "other"):
        smooth.resize((64, 32), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
        smooth = (
            smooth.rotate(180)
            if name == "image"
            else smooth.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        )
    smooth.resize((32, 16), Image.Resampling.BICUBIC).save(folder / "small.png")
    mask = np.zeros((32, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.arange(32 * 64, dtype=np.uint16).reshape(32, 64)).save(folder / "z.png")
    return folder


def save_adapter(pipeline, folder):
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), "default")
    torch.manual_seed(1)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    export.save_lora(pipeline, folder)


@pytest.fixture
def make(world, tmp_path):
    """The pixels of a mode's pictures; `FILE` of the world's is spelled @FILE."""
    folders = iter(range(100))

    def run(base, *arguments, output=None):
        output = tmp_path / (output or f"out-{next(folders)}")
        given = [a.replace("@", f"{world}/") for a in arguments]
        generate.main([f"model={world / base}", f"output={output}", *HOW, *given])
        return [np.asarray(Image.open(p)) for p in sorted(output.glob("0*.png"))]

    return run


IMAGE, MASK = "image=@image.png", "mask=@mask.png"
EDGES, POSE = "@edges", "@pose"
CONTROL = [f"controlnet={EDGES}", "control_image=@map.png"]
SEVERAL = [f"controlnet=[{EDGES}:0.5, {POSE}]", "control_image=[@map.png, @other.png]"]
MODES = {
    "txt2img": ("plain", ["width=64", "height=32"]),
    "txt2img of SD 1.5": ("sd15", ["width=64", "height=32"]),
    "img2img": ("v", [IMAGE, "strength=0.5"]),
    "inpaint": ("inpainting", [IMAGE, MASK]),
    "inpaint by blending": ("v", [IMAGE, MASK]),
    "outpaint": ("inpainting", [IMAGE, "outpaint=[0, 8, 16, 0]"]),
    "outpaint by blending": ("plain", [IMAGE, "outpaint=8"]),
    "depth2img": ("depth", [IMAGE, "depth=@z.png"]),
    "depth2img of its own": ("depth", [IMAGE]),
    "controlnet": ("plain", CONTROL),
    "controlnet of several": ("plain", SEVERAL),
    "controlnet img2img": ("plain", [IMAGE, "strength=0.5", *SEVERAL]),
    "controlnet inpaint": ("plain", [IMAGE, MASK, *SEVERAL]),
    "controlnet inpaint of 9 channels": ("inpainting", [IMAGE, MASK, *CONTROL]),
    "upscale": ("upscaler", ["image=@small.png"]),
}
SIZES = {"outpaint": (80, 40), "outpaint by blending": (80, 48), "upscale": (128, 64)}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_draws_with_and_without_an_adapter(make, mode):
    base, keys = MODES[mode]
    seeds = ["seed=0", "seeds=[7, 8, 7]", "batch_size=2"]
    first, other, again = make(base, *keys, *seeds)
    (alone,) = make(base, *keys)
    (adapted,) = make(base, *keys, f"adapters=@{base}-adapter")
    assert first.shape == (*SIZES.get(mode, (64, 32))[::-1], 3)
    assert np.array_equal(first, again) and np.array_equal(first, alone)
    assert not close(first, other) and not close(first, adapted)


def close(one, two):
    """Whether they differ by no more than rounding."""
    return np.abs(one.astype(int) - two).max() <= 1


def plain(world, base, kind, **how):
    """The picture of a pipeline of diffusers by itself."""
    import diffusers

    options = {} if kind == "StableDiffusionDepth2ImgPipeline" else {"safety_checker": None}
    pipeline = getattr(diffusers, kind).from_pretrained(world / base, **options)
    picture = pipeline(
        "a cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        **how,
    ).images[0]
    return np.rint(picture * 255).astype(np.uint8)


def test_pictures_are_those_of_diffusers_own_pipelines(make, world):
    image, mask = Image.open(world / "image.png"), Image.open(world / "mask.png")
    (made,) = make("plain", IMAGE, "strength=0.5")
    how = {"image": image, "strength": 0.5}
    assert close(made, plain(world, "plain", "StableDiffusionImg2ImgPipeline", **how))
    how = {"image": image, "mask_image": mask, "width": 64, "height": 32}
    for base in ("plain", "inpainting"):
        (made,) = make(base, IMAGE, MASK, "paste_back=false")
        assert close(made, plain(world, base, "StableDiffusionInpaintPipeline", **how))
    (made,) = make("depth", IMAGE, "strength=0.5")
    how = {"image": image, "strength": 0.5}
    assert close(made, plain(world, "depth", "StableDiffusionDepth2ImgPipeline", **how))
    (made,) = make("upscaler", "image=@small.png")
    image = Image.open(world / "small.png")
    assert close(made, plain(world, "upscaler", "StableDiffusionUpscalePipeline", image=image))


def test_what_a_mask_keeps_are_the_picture_s_own_pixels(make, world):
    original = np.asarray(Image.open(world / "image.png"))
    for base in ("plain", "inpainting"):
        (made,) = make(base, IMAGE, MASK)
        assert np.array_equal(made[:, :20], original[:, :20])
        assert not close(made[:, 40:], original[:, 40:])
    (made,) = make("plain", IMAGE, "outpaint=[16, 8, 0, 0]", "mask_blur=0")
    assert np.array_equal(made[8:, 16:], original)
    assert len(np.unique(made[:8].reshape(-1, 3), axis=0)) > 30


def test_strength_depth_and_controlnets_steer(make):
    weak, strong = (make("v", IMAGE, f"strength={s}")[0] for s in (0.5, 1.0))
    assert not close(weak, strong)
    given, own = (make("depth", IMAGE, *keys)[0] for keys in ([f"depth=@{'z.png'}"], []))
    assert not np.array_equal(given, own)
    (bare,) = make("plain", "width=64", "height=32")
    scales = (make("plain", f"controlnet={EDGES}:{s}", CONTROL[1])[0] for s in (0, 0.5, 1))
    off, half, full = scales
    assert close(bare, off) and not close(bare, half) and not np.array_equal(half, full)


def test_pictures_of_a_folder_meet_each_prompt_and_take_what_has_their_name(make, world, tmp_path):
    for name in ("pictures", "masks"):
        (tmp_path / name).mkdir()
    for number, name in enumerate(("a.png", "b.jpg")):
        image = Image.open(world / ("image.png", "other.png")[number])
        image.save(tmp_path / "pictures" / name)
        Image.open(world / "mask.png").save(tmp_path / "masks" / f"{name[0]}.png")
    keys = [f"image={tmp_path / 'pictures'}", f"mask={tmp_path / 'masks'}", "grid=true"]
    arguments = [a for a in HOW if not a.startswith("prompt")]
    generate.main(
        [f"model={world / 'plain'}", f"output={tmp_path / 'out'}", *keys, *arguments]
        + ["prompts=[a cat, a dog]", "count=2", "batch_size=3"]
    )
    found = [read_settings(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [(f["image"]["name"], f["prompt"], f["seed"]) for f in found] == [
        (name, prompt, 7 + 4 * count + 2 * ("ab".index(name[0])) + (prompt == "a dog"))
        for count in range(2)
        for name in ("a.png", "b.jpg")
        for prompt in ("a cat", "a dog")
    ]
    with Image.open(tmp_path / "out/grid.png") as sheet:
        assert sheet.width > 2 * 64 and sheet.height > 4 * 32
    (tmp_path / "masks/b.png").unlink()
    with pytest.raises(UserError, match="no pictures named b, to go with"):
        make("plain", *keys)


def test_a_picture_of_other_input_is_made_anew_and_the_rest_is_kept(make, world, tmp_path):
    image = tmp_path / "own.png"
    Image.open(world / "image.png").save(image)
    (first,) = make("v", f"image={image}", output="out")
    file = tmp_path / "out/00000.png"
    stamp = file.stat().st_mtime_ns
    make("v", f"image={image}", output="out")
    assert file.stat().st_mtime_ns == stamp
    Image.open(world / "other.png").save(image)
    with pytest.raises(UserError, match=r"00000.png is there .*\(image\).*overwrite=true"):
        make("v", f"image={image}", output="out")
    (second,) = make("v", f"image={image}", "overwrite=true", output="out")
    assert not np.array_equal(first, second)
    assert read_settings(file)["image"]["name"] == "own.png"


def test_the_file_says_how_it_was_made(make, world, tmp_path):
    keys = ["negative_prompt=dark, bad", f"controlnet={EDGES}:0.5", "control_image=@map.png"]
    make("plain", IMAGE, MASK, *keys, "adapters=@plain-adapter:0.5", "scheduler=euler_a")
    file = tmp_path / "out-0/00000.png"
    said = read_settings(file)
    assert said["mode"] == "inpaint" and said["strength"] == 1.0 and said["seed"] == 7
    assert said["adapters"][0].endswith("plain-adapter:0.5") and said["size"] == [64, 32]
    assert {said[key]["name"] for key in ("image", "mask")} == {"image.png", "mask.png"}
    assert len(said["weights"]["controlnets"]) == 1 and "adapters" in said["weights"]
    assert said["scheduler"]["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert str(world) not in json.dumps(said)
    text = Image.open(file).info["parameters"]
    lines = text.split("\n")
    assert lines[:2] == ["a cat", "Negative prompt: dark, bad"]
    assert lines[2].startswith(
        "Steps: 2, Sampler: Euler a, CFG scale: 3.0, Seed: 7, Size: 64x32, Model hash: "
    )
    assert 'Denoising strength: 1.0, Mask blur: 4, Lora: "' in lines[2]


def test_two_processes_make_what_one_does_at_another_batch_size(make, world, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from eval import processes

    keys = ["width=64", "height=32", "prompts=[a, b, c, d, e]"]
    rest = [a for a in HOW if not a.startswith("prompt=")]
    arguments = [f"model={world / 'v'}", *rest, *keys]
    generate.main([*arguments, f"output={tmp_path / 'one'}", "batch_size=5"])
    arguments.append("batch_size=2")
    for rank in (1, 0):
        state = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, device="cpu",
            wait_for_everyone=lambda: None, destroy_process_group=lambda: None,
        )  # fmt: skip
        monkeypatch.setattr(processes, "join", lambda state=state: state)
        generate.main([*arguments, f"output={tmp_path / 'two'}"])
        made = sorted(path.name for path in (tmp_path / "two").glob("*.png"))
        assert rank == 0 or made == ["00002.png", "00003.png"]
    for name in (f"0000{k}.png" for k in range(5)):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_savings_change_no_more_than_they_must(make):
    size = ["width=64", "height=32", "count=2"]
    usual = make("plain", *size)
    thrifty = make("plain", *size, "vae_slicing=true", "attention_slicing=true", "vae_tiling=true")
    assert all(close(*pair) for pair in zip(usual, thrifty, strict=True))
    half = make("plain", *size, "precision=bf16")
    assert not close(usual[0], half[0]) and np.abs(usual[0].astype(int) - half[0]).mean() < 12
    with pytest.raises(UserError, match="offload=model moves parts to a GPU"):
        make("plain", *size, "offload=model")


def test_a_watermark_is_put_on_what_is_made(make):
    from eval.watermark import embed

    size = ["width=64", "height=64"]
    (bare,), (marked,) = make("plain", *size), make("plain", *size, "watermark=abc")
    assert np.array_equal(marked, embed(bare, b"abc")) and not np.array_equal(marked, bare)
    with pytest.raises(UserError, match="watermark=abc needs pictures of 64 pixels a side"):
        make("plain", "width=64", "height=32", "watermark=abc")


def test_a_watermark_goes_on_what_the_upscaler_makes(make):
    assert make("upscaler", "image=@small.png", "watermark=abc")[0].shape == (64, 128, 3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_depth_reaches_diffusers_within_the_range_of_half_precision(
    world, tmp_path, monkeypatch, precision
):
    from diffusers import StableDiffusionDepth2ImgPipeline as Pipeline

    import scripts.generation.depth as depth

    levels = np.linspace(60_000, 65_535, 64).astype(np.uint16)
    Image.fromarray(np.tile(levels, (32, 1))).save(tmp_path / "depth.png")
    large = np.tile(np.linspace(80_000, 80_100, 24, dtype=np.float32), (16, 1))
    monkeypatch.setattr(depth.Estimator, "estimate", lambda *_: large)
    seen, prepare = [], Pipeline.prepare_depth_map

    def prepared(self, image, depth_map, batch_size, guided, dtype, device):
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        seen.append(prepare(self, image, depth_map.to(half).float(), 1, False, dtype, device))
        return prepare(self, image, depth_map, batch_size, guided, dtype, device)

    monkeypatch.setattr(Pipeline, "prepare_depth_map", prepared)
    arguments = [f"model={world / 'depth'}", f"image={world / 'image.png'}", *HOW]
    for output, more in (("file", [f"depth={tmp_path / 'depth.png'}"]), ("own", [])):
        generate.main([*arguments, f"output={tmp_path / output}", *more])
        (values,) = seen
        assert values.isfinite().all() and len(values[0, 0, 0].unique()) == 8
        seen.clear()
    monkeypatch.setattr(depth.Estimator, "estimate", lambda *_: np.ones((16, 24), np.float32))
    with pytest.raises(UserError, match="estimated of image=.*of one level"):
        generate.main([*arguments, f"output={tmp_path / 'flat'}"])


FAULTS = [
    ("depth", [], "from text alone; give image=FILE$"),
    ("inpainting", [IMAGE], "mask=FILE, or what to add with outpaint=PIXELS"),
    ("upscaler", [], "give image=FILE, and a prompt"),
    ("plain", [IMAGE, "depth=@z.png"], "sees no depth; take a depth base"),
    ("depth", [IMAGE, MASK], "mask= does not go with this base"),
    ("depth", [IMAGE, *CONTROL], "controlnet= does not go with this base"),
    ("upscaler", [IMAGE, "strength=0.5"], "strength= does not go with this base"),
    ("plain", [MASK], "mask= is about a picture: give image=FILE"),
    ("plain", [IMAGE, MASK, "outpaint=8"], "outpaint= says by itself"),
    ("plain", [IMAGE, "outpaint=[1, 2]"], "left, top, right and bottom"),
    ("plain", [IMAGE, "strength=0.2"], "less than one step"),
    ("plain", ["controlnet=@edges"], "control_image= 0: give each"),
    ("sd15", ["controlnet=@wide", "control_image=@map.png"], "Stable Diffusion 2 .*width 1024"),
    ("plain", ["controlnet=@plain/unet", "control_image=@map.png"], "and no ControlNetModel"),
    ("plain", ["controlnet=@pickled", "control_image=@map.png"], "pickles can run code"),
    ("plain", ["controlnet=@edges:x", "control_image=@map.png"], "number from 0 to 10"),
    ("plain", [IMAGE, "mask=@square.png"], "in the same aspect"),
    ("plain", [IMAGE, "mask=@black.png"], "white is what is repainted"),
    ("depth", [IMAGE, "depth=@black.png"], "of one level all over"),
    ("plain", ["watermark=letters"], "holds 1 to 4 bytes"),
    ("plain", [IMAGE, "watermark=abc"], "needs pictures of 64 pixels"),
    ("plain", ["image=@torn.png"], "cannot be read as a picture"),
    ("plain", ["image=@gone.png"], "cannot be read as a picture .No such file"),
    ("depth-of-none", [IMAGE], "cannot estimate depth .*give depth=FILE"),
    ("upscaler", ["image=@small.png", "noise_level=50"], "noise_level=50 .* give at most 49"),
    ("plain", ["noise_level=20"], "noise_level=20 is for the x4 upscaler"),
    ("plain", ["steps=1001"], "steps=1001 is more than the 1000 timesteps"),
    ("upscaler", ["image=@small.png", "steps=1001"], "steps=1001 is more than the 1000 timesteps"),
    ("plain", ["adapters=@inpainting-adapter", "prompt=x", "seeds=[1]"], "leave out seed="),
]


@pytest.fixture(scope="module")
def broken(world):
    import shutil

    Image.new("L", (32, 32), 255).save(world / "square.png")
    Image.new("L", (64, 32), 0).save(world / "black.png")
    (world / "torn.png").write_bytes((world / "image.png").read_bytes()[:200])
    for name in ("wide", "pickled"):
        shutil.copytree(world / "edges", world / name)
    settings = json.loads((world / "wide/config.json").read_text())
    (world / "wide/config.json").write_text(json.dumps(settings | {"cross_attention_dim": 1024}))
    weights = world / "pickled/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    shutil.copytree(world / "depth", world / "depth-of-none")
    shutil.rmtree(world / "depth-of-none/depth_estimator")


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_what_does_not_go_together_is_told_before_weights_are_loaded(
    make, broken, monkeypatch, tmp_path, number
):
    base, keys, words = FAULTS[number]
    monkeypatch.setattr(generate, "prepare", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=words):
        make(base, *keys)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_family_is_refused_for_every_base(world):
    from scripts.generation.config import GenerateConfig
    from train import adapter_file

    config = GenerateConfig(output="x", prompt="x", image="x", model={"path": str(world / "sd15")})
    foreign = world / "foreign.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(world / "upscaler-adapter/pytorch_lora_weights.safetensors")
    save_file({key: torch.zeros(*t.shape[:-1], 768) if "attn2.to_k.lora_A" in key or
               "attn2.to_v.lora_A" in key else t for key, t in state.items()}, foreign)  # fmt: skip
    base = pipelines.recognise(config)
    with pytest.raises(UserError, match="foreign.safetensors"):
        pipelines.check(config, "img2img", base, [adapter_file.find(str(foreign))], [])

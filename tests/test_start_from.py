"""lora.start_from: what fits is taken over to the bit, what does not is named before loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline
from train import adapters, export, kohya
from train.config import LoraConfig, ModelConfig, TextLoraConfig, UserError

FILE = "pytorch_lora_weights.safetensors"
ALL = ["attention", "proj", "feed_forward", "convolution"]
TEXT = TextLoraConfig(rank=3, alpha=5.0, targets=["attention", "feed_forward"])


def settings(**changes) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 6.0, "targets": ALL, "text_encoder": TEXT} | changes)


def exported(folder, config: LoraConfig) -> dict[str, torch.Tensor]:
    """Writes an adapter without zeros; returns its values."""
    pipeline = tiny_pipeline()
    adapters.attach(pipeline, config, seed=0)
    torch.manual_seed(1)
    for part in adapters.named_parameters(pipeline).values():
        for _, parameter in part:
            torch.nn.init.uniform_(parameter)
    folder.mkdir(exist_ok=True)
    export.save_lora(pipeline, folder)
    return values(pipeline)


def values(pipeline) -> dict[str, torch.Tensor]:
    parts = adapters.named_parameters(pipeline)
    return {f"{part}.{n}": p.detach().clone() for part, some in parts.items() for n, p in some}


def continued(config: LoraConfig, file, *, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The first values of a run that goes on from a file."""
    pipeline = tiny_pipeline().to(dtype)
    adapters.attach(pipeline, config.model_copy(update={"start_from": str(file)}), seed=7)
    assert {v.dtype for v in values(pipeline).values()} == {torch.float32}
    return values(pipeline)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base's configuration without any weights."""
    folder = tmp_path_factory.mktemp("base")
    pipeline = tiny_pipeline()
    pipeline.unet.save_config(folder / "unet")
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    "config",
    [
        settings(),
        settings(blocks={"*": 2, "mid_block": 0, "up_blocks.1": 3}),
        settings(dora=True),
        settings(rank_stabilised=True, blocks={"mid_block": 2}),
    ],
    ids=["plain", "blocks", "dora", "rank-stabilised"],
)
def test_the_values_are_taken_over_to_the_bit(tmp_path, base, config):
    before = exported(tmp_path / "adapter", config)
    adapters.check(config.model_copy(update={"start_from": str(tmp_path / "adapter")}), base)
    assert same(continued(config, tmp_path / "adapter"), before)


def test_under_bf16_they_stay_in_fp32(tmp_path):
    before = exported(tmp_path / "adapter", settings(dora=True))
    after = continued(settings(dora=True), tmp_path / "adapter", dtype=torch.bfloat16)
    assert same(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohya_s_files_do_as_well(tmp_path, base, dtype):
    before = exported(tmp_path / "adapter", settings())
    kohya = as_kohya(load_file(tmp_path / "adapter" / FILE), {"unet": 6.0, "te": 5.0}, dtype)
    save_file(kohya, tmp_path / "kohya.safetensors")
    config = settings(start_from=str(tmp_path / "kohya.safetensors"))
    adapters.check(config, base)
    after = continued(settings(), tmp_path / "kohya.safetensors")
    assert same(after, {name: value.to(dtype).float() for name, value in before.items()})
    with pytest.raises(UserError, match=r"scale 1.5, and lora.alpha makes it 1 "):
        adapters.check(config.model_copy(update={"alpha": 4.0}), base)


def as_kohya(state, alphas, dtype) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
        part, _, module = layer.partition(".")
        short = "unet" if part == "unet" else "te"
        layer = f"lora_{short}_{module.replace('.', '_')}"
        found[f"{layer}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor.to(dtype)
        found[f"{layer}.alpha"] = torch.tensor(alphas[short], dtype=dtype)
    return found


def test_a_file_that_says_nothing_of_alpha_was_trained_at_scale_1(tmp_path, base):
    exported(tmp_path / "adapter", settings(text_encoder=None))
    save_file(load_file(tmp_path / "adapter" / FILE), tmp_path / "bare.safetensors")
    start = str(tmp_path / "bare.safetensors")
    adapters.check(settings(alpha=4.0, text_encoder=None, start_from=start), base)
    with pytest.raises(UserError, match=r"scale 1, and lora.alpha makes it 1.5.*to 1 times"):
        adapters.check(settings(text_encoder=None, start_from=start), base)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 8}, r"has rank 4, and lora.rank or lora.blocks makes it 8 .*set it to 4"),
        ({"blocks": {"mid_block": 2}}, r"has rank 4, .* makes it 2 \(in unet_mid_block"),
        ({"alpha": 4.0}, r"scale 1.5, and lora.alpha makes it 1 .*lora.alpha to 1.5 times"),
        ({"rank_stabilised": True}, r"scale 1.5.* makes it 3 .*lora.rank_stabilised=false"),
        ({"dora": True}, r"trained with lora.dora=false"),
        ({"targets": ["proj"]}, r"changes layers that this run leaves alone \(\d+, like unet"),
        ({"text_encoder": None}, r"changes layers that this run leaves alone \(12, like text"),
        ({"blocks": {"mid_block": 0}}, r"changes layers that this run leaves alone"),
        (
            {"text_encoder": TextLoraConfig(rank=2, alpha=5.0, targets=TEXT.targets)},
            r"has rank 3, and lora.text_encoder.rank makes it 2",
        ),
    ],
)
def test_other_settings_are_named_with_the_remedy(tmp_path, base, changes, message):
    exported(tmp_path / "adapter", settings())
    start = str(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"^lora.start_from=\S* .*{message}"):
        adapters.check(settings(**changes, start_from=start), base)
    with pytest.raises(UserError, match=message):
        adapters.attach(tiny_pipeline(), settings(**changes, start_from=start), seed=0)


def test_one_of_fewer_layers_is_refused(tmp_path, base):
    exported(tmp_path / "adapter", settings(targets=["attention"]))
    with pytest.raises(UserError, match="lacks layers that this run changes"):
        adapters.check(settings(start_from=str(tmp_path / "adapter")), base)


def test_one_of_another_family_is_refused_by_name(tmp_path):
    exported(tmp_path / "adapter", LoraConfig())
    other = tiny_pipeline(width=64)
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
    other.unet.save_config(tmp_path / "unet")
    other.text_encoder.config.save_pretrained(tmp_path / "text_encoder")
    model = ModelConfig(path=str(tmp_path))
    with pytest.raises(UserError, match="lora.start_from.*is an adapter of .*the base is"):
        adapters.check(LoraConfig(start_from=str(tmp_path / "adapter")), model)


def test_what_is_no_such_file_is_named(tmp_path, base):
    with pytest.raises(UserError, match=r"^lora.start_from=nowhere: no such file"):
        adapters.check(LoraConfig(start_from="nowhere"), base)
    exported(tmp_path / "adapter", LoraConfig())
    with pytest.raises(UserError, match="leave out the scale"):
        adapters.check(LoraConfig(start_from=f"{tmp_path / 'adapter'}:0.5"), base)
    save_file({"<owl>": torch.zeros(1, 32)}, tmp_path / "adapter" / "learned_embeds.safetensors")
    with pytest.raises(UserError, match="has embeddings of new words"):
        adapters.check(LoraConfig(start_from=str(tmp_path / "adapter")), base)
    adapters.check(LoraConfig(start_from=str(tmp_path / "adapter" / FILE)), base)


def test_kohya_s_dora_is_taken_over_too(tmp_path, base):
    before = exported(tmp_path / "adapter", settings(dora=True))
    file = tmp_path / "kohya.safetensors"
    kohya.write(tmp_path / "adapter" / FILE, file, metadata={}, dtype=torch.float32)
    adapters.check(settings(dora=True, start_from=str(file)), base)
    assert same(continued(settings(dora=True), file), before)


@pytest.mark.parametrize("extra", ["hada_w1_a", "lokr_w1", "lora_mid.weight", "diff_b", "scalar"])
def test_variants_that_are_not_understood_are_not_taken_for_a_plain_one(tmp_path, base, extra):
    exported(tmp_path / "adapter", LoraConfig())
    state = as_kohya(load_file(tmp_path / "adapter" / FILE), {"unet": 8.0}, torch.float32)
    layer = next(iter(state)).partition(".")[0]
    save_file(state | {f"{layer}.{extra}": torch.zeros(3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"holds {layer}.{extra}"):
        adapters.check(LoraConfig(start_from=str(tmp_path / "a.safetensors")), base)


def test_a_base_whose_layers_only_loading_tells_is_checked_then(tmp_path, base):
    """Of a UNet with unusual blocks."""
    exported(tmp_path / "adapter", LoraConfig())
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        config = json.loads((Path(base.path) / part / "config.json").read_text())
        if part == "unet":
            config["down_block_types"][0] = "AttnDownBlock2D"
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    start = str(tmp_path / "adapter")
    adapters.check(LoraConfig(rank=2, start_from=start), ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="has rank 8, and lora.rank or lora.blocks makes it 2"):
        adapters.attach(tiny_pipeline(), LoraConfig(rank=2, start_from=start), seed=0)


def test_one_that_is_not_finite_is_refused_with_nothing_copied(tmp_path):
    exported(tmp_path / "adapter", LoraConfig())
    state = load_file(tmp_path / "adapter" / FILE)
    state[max(state)][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    pipeline = tiny_pipeline()
    with pytest.raises(UserError, match="nan.safetensors is not finite in unet_"):
        adapters.attach(
            pipeline, LoraConfig(alpha=8.0, start_from=str(tmp_path / "nan.safetensors")), seed=0
        )
    after = values(pipeline)
    assert all((v == 0).all() for name, v in after.items() if "lora_B" in name)


@pytest.mark.parametrize("change", ["spelling", "factors", "scalar"])
def test_a_file_whose_tensors_do_not_make_layers_is_refused(tmp_path, base, change):
    exported(tmp_path / "adapter", LoraConfig())
    state = load_file(tmp_path / "adapter" / FILE)
    name = next(name for name in state if name.endswith("lora_A.weight"))
    if change == "spelling":
        state[name.replace("lora_A", "lora.down")] = state[name].clone()
    elif change == "factors":
        state[name] = torch.zeros(0, state[name].shape[1])
    else:
        state[name.replace("lora_A.weight", "alpha")] = torch.zeros(2)
    save_file(state, tmp_path / "a.safetensors")
    said = {
        "spelling": "in two spellings",
        "factors": "do not make one",
        "scalar": "not one number",
    }
    with pytest.raises(UserError, match=f"a.safetensors.*{said[change]}"):
        adapters.check(LoraConfig(start_from=str(tmp_path / "a.safetensors")), base)

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from scripts.toy.random_base import TEXT_ENCODER, UNET
from tests.tiny import FAMILIES, tiny_pipeline
from train import adapters
from train.config import LoraConfig, LoraRun, ModelConfig, OptimConfig, TextLoraConfig, UserError
from train.config import load as load_config


@pytest.fixture(scope="module")
def base():
    return tiny_pipeline()


@pytest.fixture
def pipeline(base):
    return SimpleNamespace(
        unet=copy.deepcopy(base.unet), text_encoder=copy.deepcopy(base.text_encoder)
    )


@pytest.fixture
def unet(pipeline):
    return pipeline.unet


def _adapted(model) -> dict[str, int]:
    """Rank by layer."""
    return {name: m.r["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")}


def _scales(model) -> dict[str, float]:
    return {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}


# The tiny UNet: 1 + 2 transformers around one in the middle, each of one block with self- and
# cross-attention; 1 + 1 resnets down, 2 in the middle, 2 + 2 up.
COUNTS = {"attention": 4 * 8, "proj": 4 * 2, "feed_forward": 4 * 2, "convolution": 8 * 2 + 5}
ALL = list(COUNTS)
ENDS = {
    "attention": (".to_q", ".to_k", ".to_v", ".to_out.0"),
    "proj": ("attentions.0.proj_in", "attentions.0.proj_out", "1.proj_in", "1.proj_out"),
    "feed_forward": (".ff.net.0.proj", ".ff.net.2"),
    "convolution": (".conv1", ".conv2", ".conv_shortcut"),
}
TEXT = TextLoraConfig(rank=2, alpha=1.0, targets=["attention", "feed_forward"])


# Which layers


@pytest.mark.parametrize("target", COUNTS)
def test_a_target_means_its_layers_and_all_of_them(unet, target):
    known = {name for name, _ in unet.named_modules()}
    adapters.add(unet, LoraConfig(targets=[target]), seed=0)
    found = _adapted(unet)
    assert found.keys() == {name for name in known if name.endswith(ENDS[target])}
    assert len(found) == COUNTS[target]


def test_targets_add_up(unet):
    adapters.add(unet, LoraConfig(targets=ALL), seed=0)
    assert len(_adapted(unet)) == sum(COUNTS.values())


def test_the_text_encoder_s_targets_are_its_own(pipeline):
    adapters.attach(pipeline, LoraConfig(text_encoder=TextLoraConfig(rank=3)), seed=0)
    names = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    wanted = {f"encoder.layers.{i}.{name}" for i in (0, 1) for name in names}
    assert _adapted(pipeline.text_encoder) == dict.fromkeys(wanted, 3)
    assert set(_adapted(pipeline.unet).values()) == {8}


def test_without_text_encoder_it_has_none_and_is_frozen(pipeline):
    adapters.attach(pipeline, LoraConfig(), seed=0)
    assert not _adapted(pipeline.text_encoder)
    assert not any(p.requires_grad for p in pipeline.text_encoder.parameters())


@pytest.mark.parametrize(
    "blocks, wanted",
    [
        ({"mid_block": 2}, {"down": 8, "mid": 2, "up.0": 8, "up.1": 8}),
        ({"*": 2, "up_blocks.*": 3}, {"down": 2, "mid": 2, "up.0": 3, "up.1": 3}),
        ({"up_blocks.*": 3, "*": 2}, {"down": 2, "mid": 2, "up.0": 2, "up.1": 2}),
        ({"*": 0, "up_blocks.1.attentions.0": 4}, {"up.0": 4}),
        ({"*_blocks.*.attentions": 0}, {"mid": 8}),
        ({"down_blocks.0.attentions.*.attn2": 5}, {"down": 8, "mid": 8, "up.0": 8, "up.1": 8}),
    ],
)
def test_of_the_patterns_that_fit_the_last_counts_and_0_leaves_out(unet, blocks, wanted):
    adapters.add(unet, LoraConfig(blocks=blocks), seed=0)
    starts = {
        "down": "down_blocks.0",
        "mid": "mid_block",
        "up.0": "up_blocks.1.attentions.0",
        "up.1": "up_blocks.1.attentions.1",
    }
    found = _adapted(unet)
    for part, start in starts.items():
        here = {n: r for n, r in found.items() if n.startswith(start) and "attn1" in n}
        assert set(here.values()) == ({wanted[part]} if part in wanted else set()), part
    cross = {r for n, r in found.items() if "down_blocks.0" in n and "attn2" in n}
    assert (cross == {5}) == any("attn2" in pattern for pattern in blocks)


def test_a_pattern_is_no_prefix():
    assert adapters.fits("down_blocks.1", "down_blocks.1.attentions.0.proj_in")
    assert not adapters.fits("down_blocks.1", "down_blocks.11.attentions.0.proj_in")
    assert not adapters.fits("blocks.1", "down_blocks.1.attentions.0.proj_in")


# What they do


@pytest.mark.parametrize("stabilised", [False, True])
def test_the_scale_is_that_of_the_main_keys_or_stabilised_by_each_rank(unet, stabilised):
    config = LoraConfig(rank=4, alpha=6.0, blocks={"mid_block": 16}, rank_stabilised=stabilised)
    adapters.add(unet, config, seed=0)
    ranks, scales = _adapted(unet), _scales(unet)
    for name, scale in scales.items():
        assert scale == pytest.approx(6 / math.sqrt(ranks[name]) if stabilised else 6 / 4), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapters_train_and_in_fp32_whatever_the_base(pipeline, dtype, dora):
    pipeline.unet.to(dtype)
    pipeline.text_encoder.to(dtype)
    adapters.attach(pipeline, LoraConfig(targets=ALL, dora=dora, text_encoder=TEXT), seed=0)
    for model in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in name), name
            assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name
        assert any("magnitude" in name for name, _ in model.named_parameters()) == dora


def test_dora_s_magnitudes_are_the_norms_of_the_base_unrounded(unet):
    unet.to(torch.bfloat16)
    adapters.add(unet, LoraConfig(dora=True, targets=ALL), seed=0)
    for module in (unet.mid_block.attentions[0].proj_in, unet.mid_block.resnets[0].conv1):
        weight = module.base_layer.weight.float().flatten(1)
        magnitude = module.lora_magnitude_vector["default"].weight.flatten()
        torch.testing.assert_close(magnitude.data, weight.square().sum(1).sqrt())


@pytest.mark.parametrize("dora", [False, True])
def test_untrained_adapters_change_nothing(pipeline, dora):
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    ids = torch.arange(77)[None]
    before = pipeline.unet(*inputs).sample, pipeline.text_encoder(ids)[0]
    adapters.attach(pipeline, LoraConfig(targets=ALL, dora=dora, text_encoder=TEXT), seed=0)
    after = pipeline.unet(*inputs).sample, pipeline.text_encoder(ids)[0]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-6 if dora else 0)


def test_alpha_over_rank_is_their_strength(unet):
    adapters.add(unet, LoraConfig(rank=4, alpha=6.0), seed=0)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape[0] == b.shape[1] == 4
    torch.nn.init.normal_(b)
    x = torch.randn(3, a.shape[1])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6 / 4 * x @ a.T @ b.T)


def test_dora_scales_the_rows_of_the_sum(unet):
    """Liu et al. 2024, eq. 5."""
    adapters.add(unet, LoraConfig(rank=4, alpha=6.0, dora=True), seed=0)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.nn.init.normal_(b)
    torch.nn.init.uniform_(magnitude)
    x = torch.randn(3, a.shape[1])
    weight = layer.base_layer.weight + 6 / 4 * b @ a
    rows = weight * (magnitude / weight.norm(dim=1))[:, None]
    torch.testing.assert_close(layer(x), x @ rows.T, rtol=1e-4, atol=1e-5)


def _first_values(pipeline) -> dict[str, torch.Tensor]:
    found = adapters.named_parameters(pipeline)
    return {f"{part}.{n}": p.detach().clone() for part, some in found.items() for n, p in some}


def test_the_first_values_are_a_function_of_seed_and_layer(base):
    states = []
    for seed, targets in ((0, ["attention"]), (0, ["proj", "attention"]), (1, ["attention"])):
        pipeline = copy.deepcopy(SimpleNamespace(unet=base.unet, text_encoder=base.text_encoder))
        adapters.attach(pipeline, LoraConfig(targets=targets, text_encoder=TEXT), seed=seed)
        states.append(_first_values(pipeline))
    first, more, other = states
    assert all(torch.equal(first[name], more[name]) for name in first)
    for name in first:
        assert torch.equal(first[name], other[name]) == ("lora_B" in name), name
    a = torch.cat([v.flatten() * v.shape[0] for n, v in first.items() if "lora_A" in n])
    assert abs(a.mean()) < 0.02 and a.std() == pytest.approx(1, abs=0.02)


# What others do with them


def test_the_parts_have_their_own_rates_and_dora_s_magnitudes_do_not_decay(pipeline):
    from train import optim

    adapters.attach(pipeline, LoraConfig(dora=True, text_encoder=TEXT), seed=0)
    config = OptimConfig(learning_rate=1e-3, text_encoder={"learning_rate": 1e-5})
    parts = adapters.named_parameters(pipeline)
    groups = optim.groups(parts, config)
    assert {(g["part"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("unet", 1e-3, 0.01),
        ("unet", 1e-3, 0.0),
        ("text_encoder", 1e-5, 0.01),
        ("text_encoder", 1e-5, 0.0),
    }
    trained = {id(p) for group in groups for p in group["params"]}
    models = (pipeline.unet, pipeline.text_encoder)
    assert trained == {id(p) for m in models for p in m.parameters() if p.requires_grad}


@pytest.mark.parametrize("dora", [False, True])
def test_switched_off_is_the_base_to_the_bit_and_switched_on_as_before(pipeline, dora):
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    ids = torch.arange(77)[None]

    def outputs():
        return pipeline.unet(*inputs).sample, pipeline.text_encoder(ids)[0]

    base = outputs()
    adapters.attach(pipeline, LoraConfig(targets=ALL, dora=dora, text_encoder=TEXT), seed=0)
    parameters = [p for some in adapters.named_parameters(pipeline).values() for _, p in some]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.3)
    parameters[0].requires_grad_(False)
    before, required = outputs(), [p.requires_grad for p in parameters]
    with pytest.raises(KeyboardInterrupt), adapters.switched_off(pipeline):
        off = outputs()
        raise KeyboardInterrupt
    after = outputs()
    for i in (0, 1):
        assert torch.equal(off[i], base[i])
        assert torch.equal(after[i], before[i]) and not torch.equal(before[i], base[i])
    assert required == [p.requires_grad for p in parameters]


# Mistakes


def test_a_network_without_such_layers_is_the_users_mistake():
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(UserError, match="lora.targets"):
        adapters.add(unet, LoraConfig(), seed=0)


@pytest.mark.parametrize(
    "blocks, message",
    [
        ({"up_block.1": 2}, r"lora.blocks: 'up_block.1' fits no layer.*0, mid_block, up_blocks.1"),
        ({"down_blocks.1": 2}, r"lora.blocks: 'down_blocks.1' fits no layer.*down_blocks.0"),
        ({"": 2}, "lora.blocks: '' fits no layer"),
        ({"*": 0}, "lora.blocks leaves out every layer"),
    ],
)
def test_blocks_that_are_not_there_are_named_from_the_configuration_alone(
    base, unet, tmp_path, blocks, message
):
    with pytest.raises(UserError, match=message):
        adapters.add(unet, LoraConfig(blocks=blocks), seed=0)
    base.unet.save_config(tmp_path / "unet")
    base.text_encoder.config.save_pretrained(tmp_path / "text_encoder")
    model = ModelConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=message):
        adapters.check(LoraConfig(blocks=blocks), model)
    adapters.check(LoraConfig(blocks={"up_blocks.1": 2}, text_encoder=TEXT), model)


@pytest.mark.parametrize(
    "override, key",
    [
        ("lora.rank=0", "lora.rank"),
        ("lora.targets=[atention]", "lora.targets"),
        ("lora.targets=[]", "lora.targets"),
        ("lora.blocks={mid_block: -1}", "lora.blocks"),
        ("lora.text_encoder.rank=0", "lora.text_encoder.rank"),
        ("lora.text_encoder.targets=[proj]", "lora.text_encoder.targets"),
        ("lora.alpha=0", "lora.alpha"),
    ],
)
def test_what_cannot_be_is_refused_by_key_before_anything_is_read(override, key):
    with pytest.raises(UserError, match=key):
        load_config(LoraRun, ["output=x", "data.path=y", override])


# Sizes


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ALL, "dora": True, "text_encoder": TEXT},
        {"blocks": {"*": 0, "mid_block": 64, "up_blocks.3.attentions.2": 4}},
    ],
    ids=str,
)
def test_the_estimate_for_the_disk_is_exact_for_sd_21(settings):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = LoraConfig(**settings)
    with torch.device("meta"):
        pipeline = SimpleNamespace(
            unet=UNet2DConditionModel(**UNET),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        )
        adapters.attach(pipeline, config, seed=0)
    parts = adapters.named_parameters(pipeline).values()
    size = 4 * sum(p.numel() for part in parts for _, p in part)
    assert adapters.estimated_bytes(config) == size + 2**20


def test_rank_8_on_the_attention_of_sd_21_trains_the_parameters_counted_by_hand():
    """Counted by hand from the published sizes: blocks of 320, 640, 1280 and 1280 channels, text
    1024 wide; two transformers in each of three blocks down, one in the middle, three in each of
    three blocks up. Each has q, k, v and out of self-attention, c -> c, and of cross-attention,
    where k and v are 1024 -> c; a layer of `inputs -> outputs` gets rank * (inputs + outputs)."""
    rank, text = 8, 1024
    transformers = {320: 2 + 3, 640: 2 + 3, 1280: 2 + 1 + 3}
    total = 0
    for channels, count in transformers.items():
        itself = 4 * rank * (channels + channels)
        cross = 2 * rank * (channels + channels) + 2 * rank * (text + channels)
        total += count * (itself + cross)
    assert total == 1_659_904
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        adapters.add(unet, LoraConfig(rank=8), seed=0)
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == total


# base_layers


def _layers(model, ends) -> dict[str, tuple[int, ...]]:
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(ends)}


UNET_ENDS = tuple(end if end[0] == "." else f".{end}" for ends in ENDS.values() for end in ends)
TEXT_ENDS = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


@pytest.mark.parametrize("family", [*FAMILIES, "SD 2.1 in full", "SD 1.5 in full"])
def test_the_layers_told_from_the_configuration_are_those_of_the_model(family):
    from train.base_layers import text_layers, unet_layers

    if family in FAMILIES:
        pipeline = tiny_pipeline(family=family)
        unet = pipeline.unet
        text = pipeline.text_encoder
        assert text_layers(text.config.to_dict()) == _layers(text, TEXT_ENDS)
    else:
        old = {"cross_attention_dim": 768, "use_linear_projection": False, "attention_head_dim": 8}
        with torch.device("meta"):
            unet = UNet2DConditionModel(**UNET | (old if "1.5" in family else {}))
    ends = UNET_ENDS + (".proj_in", ".proj_out")
    assert unet_layers(dict(unet.config)) == _layers(unet, ends)


def test_the_settings_of_sd_21_are_the_published_ones():
    from train import base_layers

    for ours, published in (
        (base_layers.SD21_UNET, UNET),
        (base_layers.SD21_TEXT_ENCODER, TEXT_ENCODER),
    ):
        for key, value in ours.items():
            assert value == (list(published[key]) if isinstance(value, list) else published[key])

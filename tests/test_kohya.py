"""kohya's format: the same change of every layer, by every reader and back."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import kohya_by_hand
from tests.test_export import ALL, TEXT, picture
from tests.tiny import tiny_pipeline
from train import adapter_file, adapters, export, kohya
from train.adapter_file import Adapter, pipeline_shapes
from train.config import LoraConfig, UserError

FILE = "pytorch_lora_weights.safetensors"
BLOCKS = {"*": 2, "mid_block": 0, "up_blocks.1": 3}
CONFIGS = {
    "plain": LoraConfig(rank=4, alpha=10.0, targets=ALL, text_encoder=TEXT),
    "unequal alphas": LoraConfig(rank=4, alpha=6, targets=ALL, blocks=BLOCKS, text_encoder=TEXT),
    "rank-stabilised": LoraConfig(
        rank=4, alpha=3.0, targets=ALL, rank_stabilised=True, blocks={"up_blocks": 2}
    ),
    "dora": LoraConfig(rank=4, targets=ALL, dora=True, text_encoder=TEXT),
    "sd15": LoraConfig(rank=4, alpha=10.0, targets=ALL, text_encoder=TEXT),
}


class Trained:
    """An adapter in diffusers' format and in kohya's, and the pipeline that it is from."""

    def __init__(self, name, folder):
        self.family = "sd15" if name == "sd15" else "sd21"
        self.pipeline = tiny_pipeline(family=self.family)
        adapters.attach(self.pipeline, CONFIGS[name], seed=0)
        torch.manual_seed(1)
        for part in adapters.named_parameters(self.pipeline).values():
            for parameter_name, parameter in part:
                if "magnitude" in parameter_name:
                    parameter.data *= 1 + 0.5 * torch.rand_like(parameter)
                else:
                    torch.nn.init.normal_(parameter, std=0.1)
        export.save_lora(self.pipeline, folder)
        self.file, self.kohya = folder / FILE, folder / "kohya.safetensors"
        self.warnings = kohya.write(self.file, self.kohya, metadata={}, dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}

    def make(name) -> Trained:
        if name not in made:
            made[name] = Trained(name, tmp_path_factory.mktemp("trained"))
        return made[name]

    return make


def deltas(pipeline) -> dict[str, torch.Tensor]:
    """What PEFT adds to every layer, by part and module."""
    return {
        f"{part}.{name}": module.get_delta_weight(module.active_adapters[0]).detach()
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipeline, part).named_modules()
        if hasattr(module, "get_delta_weight")
    }


def magnitudes(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name.replace('default', 'adapter_0')}": value.detach()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipeline, part).named_parameters()
        if "magnitude" in name
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        largest = float(abs(value).max())
        assert tuple(found[name].shape) == tuple(value.shape)
        assert largest > 0 and float(abs(found[name] - value).max()) <= 1e-6 * largest, name


def called(name) -> str:
    part, _, module = name.partition(".")
    prefix = "lora_unet" if part == "unet" else "lora_te_text_model"
    return f"{prefix}_{module.replace('.', '_')}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loader_by_hand_finds_the_change_of_every_layer(trained, name):
    expected = {called(n): v.double().numpy() for n, v in deltas(trained(name).pipeline).items()}
    if CONFIGS[name].dora:
        tensors = load_file(trained(name).kohya)
        without = {n: t for n, t in tensors.items() if not n.endswith("dora_scale")}
        file = trained(name).kohya.with_name("plain.safetensors")
        save_file(without, file)
        scales = {n: t for n, t in tensors.items() if n not in without}
        assert len(scales) == len(expected)
        assert all(t.shape == (len(t), *(1,) * (t.ndim - 1)) for t in scales.values())
    else:
        file = trained(name).kohya
    assert_equal(kohya_by_hand.deltas(file), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_every_tensor_and_every_change_is_the_same(trained, name, tmp_path):
    back = tmp_path / "back.safetensors"
    kohya.write_diffusers(trained(name).kohya, back, metadata={}, dtype=torch.float32)
    before, after = load_file(trained(name).file), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    pipeline = tiny_pipeline(family=trained(name).family)
    pipeline.load_lora_weights(str(back))
    assert_equal(deltas(pipeline), deltas(trained(name).pipeline))


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_and_evaluate_apply_it_as_it_was_trained(trained, name):
    one = trained(name)
    pipeline = tiny_pipeline(family=one.family)
    adapter_file.check([Adapter(one.kohya, 1.0)], pipeline_shapes(pipeline))
    adapter_file.apply(pipeline, [Adapter(one.kohya, 1.0)])
    assert_equal(deltas(pipeline), deltas(one.pipeline))
    if CONFIGS[name].dora:
        assert_equal(magnitudes(pipeline), magnitudes(one.pipeline))
    other = tiny_pipeline(family=one.family)
    other.load_lora_weights(str(one.file))
    assert abs(picture(pipeline) - picture(other)).max() < 1e-5


@pytest.mark.parametrize("name", ["plain", "sd15"])
def test_diffusers_itself_draws_the_same_picture(trained, name):
    ours, theirs = (tiny_pipeline(family=trained(name).family) for _ in range(2))
    before = picture(ours)
    ours.load_lora_weights(str(trained(name).file))
    theirs.load_lora_weights(str(trained(name).kohya))
    assert abs(picture(ours) - picture(theirs)).max() < 1 / 255
    assert abs(picture(ours) - before).max() > 10 / 255
    assert not trained(name).warnings


def test_what_other_readers_get_wrong_is_said(trained):
    assert "alphas differ" in " ".join(trained("unequal alphas").warnings)
    assert "magnitudes (dora_scale)" in " ".join(trained("dora").warnings)


def test_two_adapters_of_both_formats_act_together(trained):
    one, both = trained("unequal alphas"), tiny_pipeline()
    adapter_file.apply(both, [Adapter(one.kohya, 0.5), Adapter(one.file, -0.5)])
    assert np.allclose(picture(both), picture(tiny_pipeline()), atol=1e-4)


# Names


def test_the_names_of_the_full_size_are_those_of_the_format():
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from scripts.toy import random_base

    with torch.device("meta"):
        unet = UNet2DConditionModel(**random_base.UNET)
        text = CLIPTextModel(CLIPTextConfig(**random_base.TEXT_ENCODER))
    paths = [
        f"{part}.{name}"
        for part, model in (("unet", unet), ("text_encoder.text_model", text))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert [kohya.path_of(kohya.name_of(path)) for path in paths] == paths
    names = {kohya.name_of(path) for path in paths}
    assert len(names) == len(paths)
    transformers = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    transformers += ["mid_block_attentions_0"]
    transformers += [f"up_blocks_{i}_attentions_{j}" for i in (1, 2, 3) for j in range(3)]
    within = ["proj_in", "proj_out"]
    within += [f"transformer_blocks_0_ff_net_{end}" for end in ("0_proj", "2")]
    within += [
        f"transformer_blocks_0_attn{k}_to_{q}" for k in (1, 2) for q in ("q", "k", "v", "out_0")
    ]
    full = {f"lora_unet_{one}_{end}" for one in transformers for end in within}
    ends = [f"self_attn_{q}_proj" for q in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    of_text = {f"lora_te_text_model_encoder_layers_{n}_{e}" for n in range(23) for e in ends}
    assert len(full) == 192 and full <= names
    assert len(of_text) == 138 and {name for name in names if "_te_" in name} == of_text


@pytest.mark.parametrize("family", ["sd21", "sd15"])
def test_projections_are_of_the_base_s_kind(trained, tmp_path, family):
    """Linear in an SD 2 folder, 1x1 convolutions in SD 1's; files have either."""
    shapes = pipeline_shapes(tiny_pipeline(family=family))
    name = next(name for name in load_file(trained("plain").kohya) if "proj_in.lora_down" in name)
    for other in ("plain", "sd15"):
        file = tmp_path / f"{other}.safetensors"
        kohya.write(trained(other).file, file, metadata={}, dtype=torch.float32, base_shapes=shapes)
        assert load_file(file)[name].ndim == (4 if family == "sd15" else 2)
    pipeline = tiny_pipeline(family=family)
    adapter_file.apply(pipeline, [Adapter(trained("plain").kohya, 1.0)])
    expected = {n: v.flatten(1) for n, v in deltas(trained("plain").pipeline).items()}
    assert_equal({n: v.flatten(1) for n, v in deltas(pipeline).items()}, expected)


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_is_chosen_and_alpha_stays_exact(trained, tmp_path, dtype):
    one = trained("rank-stabilised")
    assert not kohya.write(one.file, tmp_path / "a.safetensors", metadata={}, dtype=dtype)[1:]
    tensors = load_file(tmp_path / "a.safetensors")
    alphas = {n: t for n, t in tensors.items() if n.endswith(".alpha")}
    assert {t.dtype for t in alphas.values()} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if n not in alphas} == {dtype}
    before = load_file(one.kohya)
    assert all(torch.equal(t, before[n].to(t.dtype)) for n, t in tensors.items())


def changed(trained, tmp_path, change):
    """An adapter's file after a change of its tensors; returns it."""
    state = load_file(trained("plain").kohya)
    state = {name: new for name, value in state.items() if (new := change(name, value)) is not None}
    save_file(state, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_what_a_precision_cannot_hold_is_named(trained, tmp_path):
    wanted = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    for factor, message in ((1e6, "goes up to .*float16 only to 6.55e\\+04"), (np.inf, "finite")):
        file = changed(trained, tmp_path, lambda n, t, f=factor: t * f if n == wanted else t)
        with pytest.raises(UserError, match=f"{wanted}.*{message}|{message} in {wanted}"):
            kohya.write(file, tmp_path / "o.safetensors", metadata={}, dtype=torch.float16)
        assert not (tmp_path / "o.safetensors").exists()
    file = changed(trained, tmp_path, lambda n, t: t * 1e-7 if n == wanted else t)
    (said,) = kohya.write(file, tmp_path / "o.safetensors", metadata={}, dtype=torch.float16)
    assert re.search(rf"float16 changes 1 of \d+ tensors by more than 1 %, {wanted}", said)


# What is told


def test_a_partial_text_encoder_is_named_layer_by_layer(trained, tmp_path):
    gone = re.compile("layers_0_self_attn_(k|out)_proj|layers_1_self_attn_q")
    file = changed(trained, tmp_path, lambda n, t: None if gone.search(n) else t)
    (said,) = kohya.write(file, tmp_path / "o.safetensors", metadata={}, dtype=torch.float32)
    assert "q, v without k, out in layers 0; k, v, out without q in layers 1" in said
    assert "AUTOMATIC1111" in said


VARIANTS = {
    "hada_w1_a": "a LoHa",
    "lokr_w1": "a LoKr",
    "oft_blocks": "an OFT",
    "lora_mid.weight": "Tucker",
    "diff": "whole weights",
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_relatives_of_lora_are_refused_by_name(tmp_path, kind):
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{layer}.{kind}": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    said = f"a.safetensors holds {layer}.{kind}, as .*{VARIANTS[kind]}"
    with pytest.raises(UserError, match=said):
        adapter_file.check([adapter_file.find(str(tmp_path / "a.safetensors"))], {})
    with pytest.raises(UserError, match=said):
        kohya.from_diffusers(tmp_path / "a.safetensors")


def test_dora_that_cannot_be_had_is_refused(trained, tmp_path):
    state = load_file(trained("dora").kohya)
    name = next(n for n in state if n.endswith("to_q.dora_scale"))
    assert state[name].shape[1:] == (1,)
    save_file(state | {name: state[name].T.contiguous()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"{name} are .*not one for each of .* outputs"):
        kohya.to_diffusers(tmp_path / "a.safetensors")
    del state[name]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="magnitudes on some of its layers only"):
        kohya.to_diffusers(tmp_path / "a.safetensors")


def test_another_base_is_refused(trained, tmp_path):
    wide = pipeline_shapes(tiny_pipeline(width=64))
    with pytest.raises(UserError, match="adapter of .*the base is"):
        adapter_file.check([Adapter(trained("plain").kohya, 1.0)], wide)
    with pytest.raises(UserError, match="does not fit the base: it changes .* by .*, and the base"):
        kohya.to_diffusers(trained("plain").kohya, base_shapes=wide)
    for version in ("SD 1", "SD XL"):
        width = {"SD 1": 768, "SD XL": 2048}[version]
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
        save_file({name: torch.zeros(2, width)}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=r"adapter of Stable Diffusion (1|XL) .*the base is"):
            adapter_file.check([Adapter(tmp_path / "a.safetensors", 1.0)], wide)


NOT_OURS = {
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": "a second text encoder",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "a second text encoder",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": "names of single files",
    "lora_unet_add_embedding_linear_1": "no layer of the UNet",
    "transformer.blocks.0.attn.to_q": "no layer of the UNet",
    "lora_te1_text_model_other_fc1": "no layer of the UNet or the text encoder",
}


@pytest.mark.parametrize("layer", NOT_OURS)
def test_layers_of_other_families_are_refused(tmp_path, layer):
    file = tmp_path / "xl.safetensors"
    factors = {"down": torch.ones(2, 8), "up": torch.ones(8, 2)}
    save_file({f"{layer}.lora_{k}.weight": t for k, t in factors.items()}, file)
    for convert in (kohya.to_diffusers, kohya.from_diffusers):
        with pytest.raises(UserError, match=f"xl.safetensors: {layer} .*{NOT_OURS[layer]}"):
            convert(file)
    with pytest.raises(UserError, match=NOT_OURS[layer]):
        kohya.path_of(layer)


@pytest.mark.parametrize("which", ["k", "v"])
def test_text_as_wide_as_that_of_another_family_is_refused(tmp_path, which):
    layer = f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{which}"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 2048)}
    state[f"{layer}.lora_B.weight"] = torch.ones(8, 2)
    save_file(state, tmp_path / "xl.safetensors")
    for convert in (kohya.to_diffusers, kohya.from_diffusers):
        with pytest.raises(UserError, match="xl.safetensors: .* takes text 2048 wide"):
            convert(tmp_path / "xl.safetensors")


# Embeddings


@pytest.mark.parametrize("shape", [(2, 32), (32,)])
def test_the_embeddings_of_a_word_get_the_name_that_web_uis_read(tmp_path, shape):
    rows = torch.randn(shape)
    save_file({"<owl>": rows}, tmp_path / "learned_embeds.safetensors")
    output = tmp_path / "owl.safetensors"
    (said,) = kohya.write_embedding(
        tmp_path / "learned_embeds.safetensors", output, metadata={"a": "b"}, dtype=torch.float32
    )
    tensors, metadata = kohya_by_hand.read(output)
    assert tensors.keys() == {"emb_params"} and metadata["a"] == "b"
    assert np.array_equal(tensors["emb_params"], rows.reshape(-1, 32).double().numpy())
    assert "write owl in prompts in place of <owl>" in said
    pipeline = tiny_pipeline()
    adapter_file.apply(pipeline, [adapter_file.find(str(output))])
    id = pipeline.tokenizer.convert_tokens_to_ids("owl")
    assert torch.equal(
        pipeline.text_encoder.get_input_embeddings().weight[id], rows.reshape(-1, 32)[0]
    )
    with pytest.raises(UserError, match="not the embeddings of one word"):
        save_file({"a": rows, "b": rows + 1}, output)
        kohya.write_embedding(output, tmp_path / "x", metadata={}, dtype=torch.float32)


def test_the_same_adapter_is_the_same_file(trained, tmp_path):
    about = {"ss_b": "1", "ss_a": "ä", "modelspec.title": "x"}
    for metadata in (about, dict(reversed(about.items()))):
        kohya.write(
            trained("plain").file,
            tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors",
            metadata=metadata,
            dtype=torch.float16,
        )
    one, two = (path.read_bytes() for path in tmp_path.iterdir())
    assert one == two
    _, metadata = kohya_by_hand.read(tmp_path / "0.safetensors")
    assert list(metadata) == sorted(metadata) and metadata["ss_a"] == "ä"
    assert metadata["sshs_model_hash"] == kohya_by_hand.model_hash(tmp_path / "0.safetensors")
    assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
    assert re.fullmatch("[0-9a-f]{8}", metadata["sshs_legacy_hash"])

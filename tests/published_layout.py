"""Names and shapes of the tensors in the published files of Stable Diffusion 1.5 and 2.1, derived
from the rules of the authors' code and independent of train/ldm.py: each function puts a network
together as that code does."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def parameters(name: str, *shape: int) -> Shapes:
    """A layer's weight and bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet(name: str, inputs: int, outputs: int, time: int) -> Shapes:
    found = norm(f"{name}.in_layers.0", inputs)
    found |= parameters(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    found |= parameters(f"{name}.emb_layers.1", outputs, time)
    found |= norm(f"{name}.out_layers.0", outputs)
    found |= parameters(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        found |= parameters(f"{name}.skip_connection", outputs, inputs, 1, 1)
    return found


def transformer(name: str, width: int, context: int, kernel: tuple[int, ...]) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    found = norm(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        found |= parameters(f"{name}.{end}", width, width, *kernel)
    for number, seen in ((1, width), (2, context)):
        found[f"{block}.attn{number}.to_q.weight"] = (width, width)
        found[f"{block}.attn{number}.to_k.weight"] = (width, seen)
        found[f"{block}.attn{number}.to_v.weight"] = (width, seen)
        found |= parameters(f"{block}.attn{number}.to_out.0", width, width)
    for number in (1, 2, 3):
        found |= norm(f"{block}.norm{number}", width)
    found |= parameters(f"{block}.ff.net.0.proj", 8 * width, width)
    return found | parameters(f"{block}.ff.net.2", width, 4 * width)


def unet_layout(context: int, kernel: tuple[int, ...], channels: int = 4) -> Shapes:
    """As UNetModel of ldm/modules/diffusionmodules/openaimodel.py is put together: 320 channels
    times 1, 2, 4, 4, two resnets each, attention at all but the last resolution."""
    found = parameters("time_embed.0", 1280, 320) | parameters("time_embed.2", 1280, 1280)
    found |= parameters("input_blocks.0.0", 320, channels, 3, 3)
    widths, number, width, seen = [320, 640, 1280, 1280], 1, 320, [320]
    for level, after in enumerate(widths):
        for _ in range(2):
            found |= resnet(f"input_blocks.{number}.0", width, after, 1280)
            width = after
            if level < 3:
                found |= transformer(f"input_blocks.{number}.1", width, context, kernel)
            seen.append(width)
            number += 1
        if level < 3:
            found |= parameters(f"input_blocks.{number}.0.op", width, width, 3, 3)
            seen.append(width)
            number += 1
    for index in (0, 2):
        found |= resnet(f"middle_block.{index}", 1280, 1280, 1280)
    found |= transformer("middle_block.1", 1280, context, kernel)
    number = 0
    for level, after in reversed(list(enumerate(widths))):
        for index in range(3):
            found |= resnet(f"output_blocks.{number}.0", width + seen.pop(), after, 1280)
            width = after
            if level < 3:
                found |= transformer(f"output_blocks.{number}.1", width, context, kernel)
            if level and index == 2:
                place = 2 if level < 3 else 1
                found |= parameters(f"output_blocks.{number}.{place}.conv", width, width, 3, 3)
            number += 1
    assert not seen and number == 12
    return found | norm("out.0", 320) | parameters("out.2", 4, 320, 3, 3)


def vae_block(name: str, inputs: int, outputs: int) -> Shapes:
    found = norm(f"{name}.norm1", inputs) | norm(f"{name}.norm2", outputs)
    found |= parameters(f"{name}.conv1", outputs, inputs, 3, 3)
    found |= parameters(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        found |= parameters(f"{name}.nin_shortcut", outputs, inputs, 1, 1)
    return found


def vae_middle(side: str) -> Shapes:
    found = norm(f"{side}.mid.attn_1.norm", 512)
    for name in ("q", "k", "v", "proj_out"):
        found |= parameters(f"{side}.mid.attn_1.{name}", 512, 512, 1, 1)
    for number in (1, 2):
        found |= vae_block(f"{side}.mid.block_{number}", 512, 512)
    return found


def vae_layout() -> Shapes:
    """As Encoder and Decoder of ldm/modules/diffusionmodules/model.py are: 128 times 1, 2, 4, 4."""
    widths, width = [128, 256, 512, 512], 128
    found = parameters("encoder.conv_in", 128, 3, 3, 3) | vae_middle("encoder")
    for level, after in enumerate(widths):
        for index in range(2):
            found |= vae_block(f"encoder.down.{level}.block.{index}", width, after)
            width = after
        if level < 3:
            found |= parameters(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    found |= norm("encoder.norm_out", 512) | parameters("encoder.conv_out", 8, 512, 3, 3)
    found |= parameters("quant_conv", 8, 8, 1, 1) | parameters("post_quant_conv", 4, 4, 1, 1)
    found |= parameters("decoder.conv_in", 512, 4, 3, 3) | vae_middle("decoder")
    for level, after in reversed(list(enumerate(widths))):
        for index in range(3):
            found |= vae_block(f"decoder.up.{level}.block.{index}", width, after)
            width = after
        if level:
            found |= parameters(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    return found | norm("decoder.norm_out", 128) | parameters("decoder.conv_out", 3, 128, 3, 3)


def open_clip_layout() -> Shapes:
    """ViT-H's text half: 24 layers of width 1024."""
    found: Shapes = {"positional_embedding": (77, 1024), "token_embedding.weight": (49408, 1024)}
    found |= {"text_projection": (1024, 1024), "logit_scale": ()} | norm("ln_final", 1024)
    for number in range(24):
        path = f"transformer.resblocks.{number}"
        found |= norm(f"{path}.ln_1", 1024) | norm(f"{path}.ln_2", 1024)
        found |= {f"{path}.attn.in_proj_weight": (3072, 1024), f"{path}.attn.in_proj_bias": (3072,)}
        found |= parameters(f"{path}.attn.out_proj", 1024, 1024)
        found |= parameters(f"{path}.mlp.c_fc", 4096, 1024)
        found |= parameters(f"{path}.mlp.c_proj", 1024, 4096)
    return found


def clip_layout() -> Shapes:
    """ViT-L's text half, as transformers 4.30 has it: 12 layers of width 768."""
    found: Shapes = {
        "embeddings.position_ids": (1, 77),
        "embeddings.position_embedding.weight": (77, 768),
    }
    found |= {"embeddings.token_embedding.weight": (49408, 768)} | norm("final_layer_norm", 768)
    for number in range(12):
        path = f"encoder.layers.{number}"
        found |= norm(f"{path}.layer_norm1", 768) | norm(f"{path}.layer_norm2", 768)
        for name in ("q", "k", "v", "out"):
            found |= parameters(f"{path}.self_attn.{name}_proj", 768, 768)
        found |= parameters(f"{path}.mlp.fc1", 3072, 768) | parameters(f"{path}.mlp.fc2", 768, 3072)
    return found

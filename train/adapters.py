"""LoRA layers in a UNet, by PEFT."""

from __future__ import annotations

from typing import Any

from train.config import LoraConfig, UserError

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "proj": ("proj_in", "proj_out"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("conv1", "conv2", "conv_shortcut"),
}

_BYTES_PER_RANK = {  # on SD 2.1, fp32
    "attention": 830_000,
    "proj": 200_000,
    "feed_forward": 700_000,
    "convolution": 2_100_000,
}


def add(unet: Any, config: LoraConfig, *, seed: int) -> None:
    """Freezes the UNet and adds fp32 adapters to the layers that `config.targets` names.

    Their first values depend on `seed` alone, not on what drew random numbers before.
    """
    import torch
    from peft import LoraConfig as PeftConfig

    torch.manual_seed(seed)
    unet.requires_grad_(False)
    suffixes = [suffix for target in config.targets for suffix in TARGETS[target]]
    if not any(name.endswith(tuple(f".{s}" for s in suffixes)) for name, _ in unet.named_modules()):
        raise UserError(f"lora.targets={config.targets} match no layer of this UNet")
    unet.add_adapter(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides, so floats work
            lora_dropout=config.dropout,
            target_modules=suffixes,
            init_lora_weights="gaussian",
        )
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            # PEFT gives adapters the base's dtype, in which small updates vanish.
            parameter.data = parameter.data.to(torch.float32)


def estimated_bytes(config: LoraConfig) -> int:
    """Upper estimate of the adapter's fp32 size on SD 2.1, for the disk preflight."""
    return config.rank * sum(_BYTES_PER_RANK[target] for target in config.targets) + 2**20

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


def add(unet: Any, config: LoraConfig, *, seed: int) -> None:
    """Freezes the UNet and adds fp32 adapters to the layers that `config.targets` names.

    Their first values depend on `seed` alone, not on what drew random numbers before.
    """
    import torch
    from peft import LoraConfig as PeftConfig

    torch.manual_seed(seed)
    unet.requires_grad_(False)
    suffixes = [suffix for target in config.targets for suffix in TARGETS[target]]
    unet.add_adapter(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides, so floats work
            lora_dropout=config.dropout,
            target_modules=suffixes,
            init_lora_weights="gaussian",
        )
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f"lora.targets={config.targets} match no layer of this UNet")
    for parameter in trained:
        # PEFT gives adapters the base's dtype, in which small updates vanish.
        parameter.data = parameter.data.to(torch.float32)


def estimated_bytes(config: LoraConfig) -> int:
    """Upper estimate of the adapter's fp32 size on SD 2.1, for the disk preflight: 7 MB per rank
    and target."""
    return 7_000_000 * config.rank * len(config.targets) // 8 + 2**20

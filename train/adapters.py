"""LoRA layers in a UNet and a text encoder, by PEFT: where they go, how they start, what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from train.config import LoraConfig, TextLoraConfig, UserError

if TYPE_CHECKING:
    from torch import nn

    from train.method import Pipeline

TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "proj": ("proj_in", "proj_out"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("conv1", "conv2", "conv_shortcut"),
}
TEXT_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "feed_forward": ("fc1", "fc2"),
}
PARTS = ("unet", "text_encoder")
NAME = "default"
"""What PEFT calls the adapter."""


def attach(pipeline: Pipeline, config: LoraConfig, *, seed: int) -> None:
    """Freezes the UNet and the text encoder and adds the adapters that `config` asks for, in fp32.

    To be called once the frozen weights have the precision they stay in. Their first values are a
    function of `seed` and the layer's name, and change nothing. Raises UserError for targets or
    blocks that the UNet does not have.
    """
    pipeline.text_encoder.requires_grad_(False)
    add(pipeline.unet, config, seed=seed)
    if config.text_encoder is not None:
        add_text(pipeline.text_encoder, config.text_encoder, config, seed=seed)


def add(unet: Any, config: LoraConfig, *, seed: int) -> None:
    """The UNet's part of `attach`."""
    _add(unet, "unet", ranks([name for name, _ in unet.named_modules()], config), config, seed=seed)


def add_text(text_encoder: Any, config: TextLoraConfig, common: LoraConfig, *, seed: int) -> None:
    """The text encoder's part of `attach`: rank, alpha and targets are its own; dropout, DoRA and
    rank-stabilising are `common`."""
    own = common.model_copy(update={"rank": config.rank, "alpha": config.alpha, "blocks": {}})
    names = [name for name, _ in text_encoder.named_modules()]
    _add(text_encoder, "text_encoder", text_ranks(names, config), own, seed=seed)


def named_parameters(pipeline: Pipeline) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The adapters' parameters by part ("unet", "text_encoder"), for `optim.groups`."""
    return {
        part: [(n, p) for n, p in getattr(pipeline, part).named_parameters() if ".lora_" in n]
        for part in PARTS
    }


@contextmanager
def switched_off(pipeline: Pipeline) -> Iterator[None]:
    """Within it the UNet and the text encoder are the base, to the bit; afterwards as before."""
    layers = [layer for part in PARTS for layer in _layers(getattr(pipeline, part)).values()]
    before = [layer.disable_adapters for layer in layers]
    # PEFT's own switch also freezes the adapters' parameters, and its opposite would unfreeze them
    # where they had been frozen.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def ranks(modules: list[str], config: LoraConfig) -> dict[str, int]:
    """The rank of every layer of a UNet that gets an adapter, of all its modules by name.

    Raises UserError where no layer is targeted, a pattern fits none, or all ranks are 0.
    """
    found = dict.fromkeys(_targeted(modules, TARGETS, config.targets), config.rank)
    if not found:
        raise UserError(f"lora.targets={config.targets} match no layer of this UNet")
    for pattern, rank in config.blocks.items():
        fitting = [name for name in found if fits(pattern, name)]
        if not fitting:
            raise UserError(
                f"lora.blocks: {pattern!r} fits no layer of lora.targets={config.targets}; this "
                f"UNet has them in {', '.join(blocks_of(found))}"
            )
        found.update(dict.fromkeys(fitting, rank))
    if not any(found.values()):
        raise UserError("lora.blocks: every layer has rank 0, so nothing would train")
    return {name: rank for name, rank in found.items() if rank}


def text_ranks(modules: list[str], config: TextLoraConfig) -> dict[str, int]:
    """The same for a text encoder."""
    found = _targeted(modules, TEXT_TARGETS, config.targets)
    if not found:
        raise UserError(
            f"lora.text_encoder.targets={config.targets} match no layer of this text encoder"
        )
    return dict.fromkeys(found, config.rank)


def _targeted(
    modules: list[str], table: Mapping[str, tuple[str, ...]], targets: list[Any]
) -> list[str]:
    ends = tuple(f".{suffix}" for target in targets for suffix in table[target])
    return [name for name in modules if name.endswith(ends)]


def fits(pattern: str, module: str) -> bool:
    """Whether a pattern like `up_blocks.*.attentions` fits a module, or what it lies in."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")


def blocks_of(modules: Mapping[str, int]) -> list[str]:
    """The UNet's blocks that modules lie in, like `down_blocks.0`."""
    return list(
        dict.fromkeys(".".join(m.split(".")[: 1 if m.startswith("mid") else 2]) for m in modules)
    )


def alpha_of(rank: int, config: LoraConfig) -> float:
    """The alpha of a layer of some rank.

    Its scale, alpha / rank, is the same everywhere. Rank-stabilised it is alpha / sqrt(rank) with
    the layer's own rank, which is what makes layers of different ranks learn alike.
    """
    return config.alpha if config.rank_stabilised else config.alpha * rank / config.rank


def _add(
    model: Any, part: str, by_layer: Mapping[str, int], config: LoraConfig, *, seed: int
) -> None:
    from peft import LoraConfig as PeftConfig

    model.requires_grad_(False)
    others = {name: rank for name, rank in by_layer.items() if rank != config.rank}
    model.add_adapter(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides, so floats work
            lora_dropout=config.dropout,
            target_modules=list(by_layer),
            rank_pattern=others,
            alpha_pattern={name: alpha_of(rank, config) for name, rank in others.items()},
            use_dora=config.dora,
            use_rslora=config.rank_stabilised,
        ),
        adapter_name=NAME,
    )
    adapted = _layers(model)
    assert adapted.keys() == by_layer.keys()
    for name, layer in adapted.items():
        _start(layer, seed, part, name)


def _layers(model: Any) -> dict[str, Any]:
    """The modules of a model that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _start(layer: Any, seed: int, part: str, name: str) -> None:
    """The first factor normal with deviation 1 / rank, the second 0, DoRA's magnitudes the norms of
    the base's weights; all in fp32."""
    import torch

    from data import counter

    for parameter_name, parameter in layer.named_parameters():
        if "lora_" in parameter_name:
            # PEFT gives adapters the base's dtype, in which small updates vanish.
            parameter.data = parameter.data.to(torch.float32)
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    values = torch.from_numpy(counter.normal(a.shape, seed, "adapter", part, name))
    with torch.no_grad():
        a.copy_(values / a.shape[0])
        b.zero_()
    for magnitude in layer.lora_magnitude_vector.values():  # which PEFT rounded like the base
        magnitude.update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=a,
            lora_B=b,
            scaling=layer.scaling[NAME],
        )


_BYTES_PER_RANK = {  # on SD 2.1, fp32
    "attention": 830_000,
    "proj": 200_000,
    "feed_forward": 700_000,
    "convolution": 2_100_000,
}


def estimated_bytes(config: LoraConfig) -> int:
    """Upper estimate of the adapter's fp32 size on SD 2.1, for the disk preflight."""
    return config.rank * sum(_BYTES_PER_RANK[target] for target in config.targets) + 2**20

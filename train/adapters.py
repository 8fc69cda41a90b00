"""LoRA layers in a UNet and a text encoder, by PEFT: where they go, how they start, what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, TypeVar

from train import base_layers, start_from
from train.adapter_file import Shapes, pipeline_shapes
from train.config import LoraConfig, ModelConfig, TextLoraConfig, UserError

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
T = TypeVar("T")
NAME = "default"
"""What PEFT calls the adapter."""


def attach(pipeline: Pipeline, config: LoraConfig, *, seed: int) -> None:
    """Freezes the UNet and the text encoder and adds the adapters that `config` asks for, in fp32.

    To be called once the frozen weights have the precision they stay in. Their first values are a
    function of `seed` and the layer's name, and change nothing; or those of `start_from`. Raises
    UserError for targets or blocks that the UNet does not have, and a `start_from` that does not
    fit.
    """
    base = pipeline_shapes(pipeline)
    pipeline.text_encoder.requires_grad_(False)
    add(pipeline.unet, config, seed=seed)
    if config.text_encoder is not None:
        add_text(pipeline.text_encoder, config.text_encoder, config, seed=seed)
    if config.start_from is not None:
        _go_on_from(pipeline, config, base)


def add(unet: Any, config: LoraConfig, *, seed: int) -> None:
    """The UNet's part of `attach`."""
    _add(unet, "unet", ranks([name for name, _ in unet.named_modules()], config), config, seed=seed)


def add_text(text_encoder: Any, config: TextLoraConfig, common: LoraConfig, *, seed: int) -> None:
    """The text encoder's part of `attach`: rank, alpha and targets are its own; dropout, DoRA and
    rank-stabilising are `common`."""
    names = [name for name, _ in text_encoder.named_modules()]
    own = _of_text(config, common)
    _add(text_encoder, "text_encoder", text_ranks(names, config), own, seed=seed)


def _of_text(config: TextLoraConfig, common: LoraConfig) -> LoraConfig:
    own = {"rank": config.rank, "alpha": config.alpha, "blocks": {}}
    return common.model_copy(update=own)


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
    targeted = _targeted(modules, TARGETS, config.targets)
    if not targeted:
        raise UserError(f"lora.targets={config.targets} match no layer of this UNet")
    for pattern in config.blocks:
        if not any(fits(pattern, name) for name in targeted):
            raise UserError(
                f"lora.blocks: {pattern!r} fits no layer of lora.targets={config.targets}; this "
                f"UNet has them in {', '.join(_blocks_of(targeted))}"
            )
    found = _ranks(modules, config)
    if not found:
        raise UserError("lora.blocks leaves out every layer, so nothing would train")
    return found


def _ranks(modules: list[str], config: LoraConfig) -> dict[str, int]:
    found = dict.fromkeys(_targeted(modules, TARGETS, config.targets), config.rank)
    for pattern, rank in config.blocks.items():
        found.update({name: rank for name in found if fits(pattern, name)})
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


def _blocks_of(modules: list[str]) -> list[str]:
    """The UNet's blocks that modules lie in, like `down_blocks.0`."""
    parts = (name.split(".") for name in modules)
    return sorted({".".join(p[: 1 if p[0] == "mid_block" else 2]) for p in parts})


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

    from train import fused_lora

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
    fused_lora.fuse(model, NAME)


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


def check(config: LoraConfig, model: ModelConfig) -> None:
    """Raises UserError for blocks or targets that the base does not have, and for a `start_from`
    that does not fit: before any weights are loaded, as far as the base's configuration tells."""
    file = start_from.find(config.start_from) if config.start_from else None
    base = base_layers.of_base(model)
    if base is None:
        return
    wanted = _spelled({"unet": _wanted(ranks(list(base["unet"]), config), config)})
    if (text := config.text_encoder) is not None:
        by_layer = text_ranks(list(base["text_encoder"]), text)
        wanted |= _spelled({"text_encoder": _wanted(by_layer, _of_text(text, config))})
    if file is not None:
        start_from.check(file, wanted, _spelled(base))


def _spelled(by_part: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Both parts' layers in one, named as adapter files have it."""
    return {
        start_from.spelled(f"{part}.{name}"): value
        for part, layers in by_part.items()
        for name, value in layers.items()
    }


def _wanted(by_layer: Mapping[str, int], config: LoraConfig) -> dict[str, start_from.Layer]:
    return {
        name: start_from.Layer(
            rank,
            alpha_of(rank, config) / (sqrt(rank) if config.rank_stabilised else rank),
            config.dora,
        )
        for name, rank in by_layer.items()
    }


def _go_on_from(pipeline: Pipeline, config: LoraConfig, base: Shapes) -> None:
    """The values of `start_from` in place of the first ones."""
    assert config.start_from is not None
    file = start_from.find(config.start_from)
    adapted = _spelled({part: _layers(getattr(pipeline, part)) for part in PARTS})
    wanted = {
        name: start_from.Layer(layer.r[NAME], layer.scaling[NAME], config.dora)
        for name, layer in adapted.items()
    }
    start_from.check(file, wanted, base)
    tensors = {f"{name}/{k}": t for name, m in adapted.items() for k, t in _tensors(m).items()}
    start_from.load(file, tensors)


def _tensors(layer: Any) -> dict[str, nn.Parameter]:
    """An adapted layer's parameters, as `start_from.load` calls them."""
    kinds = {
        "A": layer.lora_A,
        "B": layer.lora_B,
        "magnitude_vector": layer.lora_magnitude_vector,
    }
    return {kind: module[NAME].weight for kind, module in kinds.items() if NAME in module}


def estimated_bytes(config: LoraConfig) -> int:
    """Upper estimate of the adapters' fp32 size, which is exact for SD 2.1, for the disk
    preflight."""
    sd21 = {
        "unet": base_layers.unet_layers(base_layers.SD21_UNET),
        "text_encoder": base_layers.text_layers(base_layers.SD21_TEXT_ENCODER),
    }
    return 4 * numbers(config, sd21) + 2**20


def numbers(config: LoraConfig, base: Mapping[str, base_layers.Layers]) -> int:
    """How many parameters the adapters have on a base of these layers (`base_layers.of_base`)."""
    layers = base["unet"]
    count = _numbers(layers, _ranks(list(layers), config), config.dora)
    if config.text_encoder is not None:
        layers = base["text_encoder"]
        count += _numbers(layers, text_ranks(list(layers), config.text_encoder), config.dora)
    return count


def _numbers(layers: base_layers.Layers, by_layer: Mapping[str, int], dora: bool) -> int:
    """How many numbers adapters hold on layers (outputs, inputs, ...)."""
    return sum(
        rank * (layers[name][0] + prod(layers[name][1:])) + dora * layers[name][0]
        for name, rank in by_layer.items()
    )

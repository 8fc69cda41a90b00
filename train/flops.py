"""How much arithmetic a run takes, counted from a base's configuration, and what cards can do.

A multiplication and the addition after it are two operations (FLOPs).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from train.config import CaptionConfig, FullRun, LoraConfig, RunConfig, TextualInversionRun

WINDOW = 77  # tokens that the text encoder reads at once
PIXELS = 8  # that a latent is wide


class Work(NamedTuple):
    """FLOPs of one forward pass of each part, for one picture."""

    unet: float
    text_encoder: float
    vae_encode: float
    vae_decode: float


class StepWork(NamedTuple):
    """FLOPs of an optimizer step for one picture."""

    model: float
    """What the mathematics takes: forward, and the gradients that are needed."""
    again: float
    """What gradient checkpointing computes a second time."""


def count(base: Any, size: tuple[int, int], *, windows: int = 1) -> Work:
    """The work of an `Architecture`, counted on the meta device: nothing is computed.

    size: (width, height) of the picture in pixels. windows: of 77 tokens, of its caption.
    """
    import torch

    latent = size[1] // PIXELS, size[0] // PIXELS
    with torch.device("meta"), torch.no_grad():
        unet, vae, text = (base.build(part) for part in ("unet", "vae", "text_encoder"))
        inputs = torch.empty(1, base.channels, *latent)
        embeddings = torch.empty(1, WINDOW * windows, base.text_width)
        ids = torch.zeros(windows, WINDOW, dtype=torch.long)
        return Work(
            _counted(lambda: unet(inputs, torch.empty(1), encoder_hidden_states=embeddings)),
            _counted(lambda: text(ids)),
            _counted(lambda: vae.encode(torch.empty(1, 3, size[1], size[0]))),
            _counted(lambda: vae.decode(torch.empty(1, base.latent_channels, *latent))),
        )


def _counted(work: Callable[[], Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def per_picture(config: RunConfig, work: Work) -> StepWork:
    """Of a frozen part that something before or within it trains in, two forward passes' worth:
    itself and the gradient of its activations; three where its weights train too; one where only
    its output counts. Adapters are too small to count."""
    text = work.text_encoder * _passes(trains_text(config))
    unet = work.unet * (3 if trains_weights(config) else 2)
    dreambooth = getattr(config, "dreambooth", None)
    if dreambooth is not None and dreambooth.prior == "prediction":
        unet += work.unet / 2  # the base's prediction for the class, half of the batch
    share = checkpointed_share(config)
    return StepWork(unet + text, share * work.unet)


def _passes(trains: str | None) -> int:
    return {None: 0, "frozen": 1, "adapters": 2, "weights": 3}[trains]


def trains_weights(config: RunConfig) -> bool:
    """Whether all of the UNet trains."""
    return isinstance(config, FullRun) or (
        hasattr(config, "dreambooth") and getattr(config, "lora", None) is None
    )


def trains_text(config: RunConfig) -> str | None:
    """What trains in the text encoder: "weights", or "adapters" (or new words); "frozen" where
    captions have too many forms to be cached; None where embeddings come from the cache."""
    lora: LoraConfig | None = getattr(config, "lora", None)
    own = getattr(config, "full", None) or getattr(config, "dreambooth", None)
    if isinstance(config, TextualInversionRun) or (lora and lora.text_encoder):
        return "adapters"
    if trains_weights(config) and own and own.text_encoder:
        return "weights"
    return "frozen" if _many_forms(config) else None


def _many_forms(config: RunConfig) -> bool:
    """Whether the settings ask for more forms of a caption with many tags and wildcards than are
    cached; what captions there are is not looked at."""
    from data.wording import Wording
    from train.pictures import CACHED_VARIANTS

    enough = range(CACHED_VARIANTS + 1)
    for source in config.data.named_sources():
        wording = Wording.of(source.captions or CaptionConfig())
        tags = [str(tag) for tag in range(wording.keep_tags + len(enough))]
        caption = wording.separator.join([*tags, "{" + "|".join(map(str, enough)) + "}"])
        if wording.variants([caption], CACHED_VARIANTS) is None:
            return True
    return False


def windows(config: RunConfig) -> int:
    """Of 77 tokens, that are read of each caption."""
    return max(source.tokens for source in config.data.named_sources()) // 75


def checkpointed_share(config: RunConfig) -> float:
    """How much of the UNet's forward pass is done again: of chosen blocks we say all of it."""
    return 1.0 if config.train.gradient_checkpointing else 0.0


class Peak(NamedTuple):
    """Dense peak rates in TFLOP/s, without sparsity, sums in fp32; None where there is no such."""

    half: float
    """fp16; bf16 too where the card has it."""
    tf32: float | None
    fp32: float
    bf16: bool = True


# From the vendors' data sheets; where those give rates with sparsity, half of them. By the words of
# the name that CUDA gives a card: the first line whose words are all in it counts.
_PEAKS: list[tuple[set[str], Peak]] = [
    ({"b200"}, Peak(2250, 1125, 75)),
    ({"h200", "nvl"}, Peak(835.5, 417.5, 60)),
    ({"h200"}, Peak(989.4, 494.7, 66.9)),
    ({"h100", "nvl"}, Peak(835.5, 417.5, 60)),
    ({"h100", "pcie"}, Peak(756, 378, 51)),
    ({"h100"}, Peak(989.4, 494.7, 66.9)),
    ({"a100"}, Peak(312, 156, 19.5)),
    ({"a40"}, Peak(149.7, 74.8, 37.4)),
    ({"a10"}, Peak(125, 62.5, 31.2)),
    ({"l40s"}, Peak(362, 183, 91.6)),
    ({"l40"}, Peak(181, 90.5, 90.5)),
    ({"l4"}, Peak(121, 60, 30.3)),
    ({"v100", "pcie"}, Peak(112, None, 14, bf16=False)),
    ({"v100"}, Peak(125, None, 15.7, bf16=False)),
    ({"t4"}, Peak(65, None, 8.1, bf16=False)),
    ({"a6000"}, Peak(154.8, 77.4, 38.7)),
    ({"6000", "ada"}, Peak(364.2, 182.1, 91.1)),
    ({"rtx", "5090"}, Peak(209.5, 104.8, 104.8)),
    ({"rtx", "4090"}, Peak(165.2, 82.6, 82.6)),
    ({"rtx", "3090"}, Peak(71, 35.6, 35.6)),
]
_OTHERS = {"laptop", "mig", "ti", "d", "max"}  # which share a name and not its rates


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Dense peak in FLOP/s of a card by the name CUDA gives it; None for one that is not known, or
    lacks the precision.

    precision: no (fp32), bf16 or fp16. tf32: whether products of fp32 may be rounded to it.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    found = None if words & _OTHERS else next((p for w, p in _PEAKS if w <= words), None)
    if found is None or (precision == "bf16" and not found.bf16):
        return None
    wide = found.tf32 if tf32 and found.tf32 else found.fp32
    return 1e12 * (wide if precision == "no" else found.half)

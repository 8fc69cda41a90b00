"""What scripts/plan.py works out and prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from train.config import (
    DreamBoothRun,
    FullRun,
    LoraRun,
    RunConfig,
    Section,
    TextualInversionRun,
    UserError,
    load,
    read_yaml,
)
from train.families import INPAINTING_CHANNELS
from train.flops import trains_text, trains_weights, windows

if TYPE_CHECKING:
    from train.architecture import Architecture
    from train.footprint import Footprint

GIB, GB, TERA = 2**30, 1e9, 1e12
# In the order in which a run's section tells its method: a LoRA may be part of others.
SCHEMAS: dict[str, type[RunConfig]] = {
    "dreambooth": DreamBoothRun,
    "textual_inversion": TextualInversionRun,
    "full": FullRun,
    "lora": LoraRun,
}
# What makes a run smaller, that which costs the least first: section, key, value.
_REMEDIES: list[tuple[str, str, Any]] = [
    ("data", "cache_batch_size", 1),
    ("train", "micro_batch_size", 1),
    ("train", "mixed_precision", "bf16"),
    ("train", "gradient_checkpointing", True),
    ("optim", "name", "adamw8bit"),
    ("train", "quantize", "nf4"),
]


class PlanConfig(Section):
    """What a run will need (scripts/plan.py); all other keys are those of the run, see
    train/lora.py --help."""

    method: Literal["lora", "full", "dreambooth", "textual_inversion"] | None = None
    """What trains; default: what the configuration has a section of."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What it trains on."""
    card: float | None = Field(None, gt=0)
    """Memory of the card, GiB, to say whether the run fits and what would make it fit."""
    gpu: str | None = None
    """Its name as CUDA has it, like "NVIDIA A100-SXM4-80GB", for the time of a step."""
    share: float = Field(0.35, gt=0, le=1)
    """Share of the card's peak rate that is taken to be reached; an assumption."""
    achieved: float | None = Field(None, gt=0)
    """TFLOP/s reached, in place of gpu and share; scripts/benchmark.py train measures it."""
    processes: int = Field(1, ge=1)
    """Processes that train together, one per card."""
    link: float | None = Field(None, gt=0)
    """GB/s from card to card, for what their exchange of gradients costs."""
    images: int | None = Field(None, ge=1)
    """How many pictures there will be, all square; default: data.path is looked at."""
    output: Path | None = None
    """JSON file for the plan; the run's own output= is left as the configuration has it."""


class Data(NamedTuple):
    """The pictures, as far as they matter here."""

    images: int
    size: tuple[int, int]
    """Width and height of the bucket whose batches are largest, pixels."""
    cache_bytes: int
    most: int | None = None
    """Samples that an epoch has of it, the most of a batch; None where that is no limit."""


def run_config(method: str | None, arguments: Sequence[str]) -> RunConfig:
    """The run's configuration. method: where None, what it has a section of. Raises UserError."""
    method = method or _method(arguments)
    return load(SCHEMAS[method], arguments)


def _method(arguments: Sequence[str]) -> str:
    """By the sections of the file and the overrides."""
    files, keys, rest = [], set[str](), iter(arguments)
    for argument in rest:
        if argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            keys.add(argument.partition("=")[0].partition(".")[0])
    for file in filter(None, files):
        try:
            values = read_yaml(Path(file))
        except (OSError, ValueError) as error:
            raise UserError(f"--config {file} cannot be read ({error})") from None
        keys |= values.keys() if isinstance(values, dict) else set()
    found = next((method for method in SCHEMAS if method in keys), None)
    if found is None:
        raise UserError(
            "the configuration has no section of a method, so it is not clear what trains: add "
            f"method= one of {', '.join(SCHEMAS)}"
        )
    return found


def foreseen(method: str, arguments: Sequence[str]) -> list[tuple[str, int]]:
    """The phases of a run on the CPU, with the bytes of each."""
    from train.architecture import Architecture
    from train.footprint import predict

    run = run_config(method, arguments)
    base = Architecture.of(run.model)
    data = _data(run, base, None)
    found = predict(_capped(run, data.most, 1), base, size=data.size, device="cpu")
    return [(phase.name, phase.bytes) for phase in found.phases]


def plan(config: PlanConfig, run: RunConfig) -> dict[str, Any]:
    """All of it, as JSON can hold it. Raises UserError."""
    from train.architecture import Architecture
    from train.demands import check_quantised
    from train.footprint import predict

    check_quantised(run)
    base = Architecture.of(run.model)
    data = _data(run, base, config.images)
    run = _capped(run, data.most, config.processes)
    how: dict[str, Any] = {"size": data.size, "device": config.device}
    footprint = predict(run, base, processes=config.processes, **how)
    made = {
        "base": base.described,
        "images": data.images,
        "largest_bucket": list(data.size),
        "memory_gib": {phase.name: _gib(phase.bytes) for phase in footprint.phases},
        "peak_gib": _gib(footprint.peak.bytes),
        "trained_numbers": footprint.trained,
        "disk_gib": _disk(run, data, footprint, base),
    }
    if config.card:
        made["card_gib"] = config.card
        made["fits"] = footprint.peak.bytes <= config.card * GIB
        if not made["fits"]:
            made["remedies"] = list(_remedies(run, base, config, how))
    return made | _time(config, run, base, data, footprint.trained)


def _gib(size: float) -> float:
    return round(size / GIB, 3)


def _data(run: RunConfig, base: Architecture, images: int | None) -> Data:
    from train import pictures

    inpainting = base.channels == INPAINTING_CHANNELS
    if images is not None:
        imagined = _imagined(run, images)
        taken = pictures.cache_bytes(imagined, config=run.data, inpainting=inpainting)
        return Data(images, tuple(imagined.sizes[0].tolist()), taken)
    elsewhere = [s.path for s in run.data.named_sources() if s.path.startswith("hf:")]
    if elsewhere or run.data.streaming:
        what = f"data.path={elsewhere[0]}" if elsewhere else "data.streaming=true"
        raise UserError(
            f"{what}: nothing is downloaded or streamed for a plan; give images=N, how many "
            "pictures there are"
        )
    try:
        found = pictures.find(run.data)
    except UserError as error:
        raise UserError(f"{error}. Without pictures, give images=N for so many") from None
    counts = Counter(map(tuple, found.sizes.tolist()))
    once = len(run.data.named_sources()) == 1  # else some may be there several times
    most = max(run.pictures_per_step, 1) if once else 1
    again = 1 if found.weights else found.repeats[0]  # as data/order.py takes them
    size = max(counts, key=lambda size: size[0] * size[1] * min(counts[size] * again, most))
    taken = pictures.cache_bytes(found, config=run.data, inpainting=inpainting)
    return Data(len(found.sizes), size, taken, counts[size] * again if once else None)


def _imagined(run: RunConfig, images: int) -> Any:
    """So many pictures, as `pictures.cache_bytes` takes them: squares of the largest resolution."""
    from train.pictures import cropping

    sources, step = run.data.named_sources(), run.data.bucket_step
    side = max(cropping(run.data, source).resolutions[-1] for source in sources) // step * step
    return SimpleNamespace(
        sizes=np.full((images, 2), side, np.int32),
        parts=[SimpleNamespace(settings=source) for source in sources],
        captions=range(images) if trains_text(run) is None else None,
        tokens=75 * windows(run),
    )


def _capped(run: RunConfig, most: int | None, processes: int) -> RunConfig:
    """With batches no larger than the samples that there are for one."""
    train, with_class = run.train, run.train.batch_size // run.pictures_per_step
    if most is None or most >= run.pictures_per_step:
        return run
    largest = -(-most * with_class // processes)
    micro = min(train.micro_batch_size or largest, largest)
    return run.model_copy(update={"train": train.model_copy(update={"micro_batch_size": micro})})


def _disk(run: RunConfig, data: Data, footprint: Footprint, base: Architecture) -> dict[str, float]:
    """As the run itself checks it before it starts: parameters, two moments and the average of each
    checkpoint, those that are kept, the one being written and the best; and the result, of full
    training all parts in fp32."""
    from train.validation_data import settings

    trained = 4 * footprint.trained
    one = trained * (3 + (run.train.ema_decay is not None))
    chosen = run.validation.score is not None or settings(run) is not None
    return {
        "cache": _gib(data.cache_bytes),
        "checkpoints": _gib((run.checkpoint.keep + 1 + chosen) * one),
        "result": _gib(4 * base.numbers() if trains_weights(run) else trained),
    }


def _remedies(
    run: RunConfig, base: Architecture, config: PlanConfig, how: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What makes the run smaller, one after the other and all together, until it fits."""
    from train.footprint import predict

    for section, key, value in _REMEDIES:
        part = getattr(run, section)
        useless = key == "quantize" and trains_weights(run)
        other = key == "name" and part.name != "adamw"
        if getattr(part, key) in (value, "bf16", "fp16") or useless or other:
            continue
        run = run.model_copy(update={section: part.model_copy(update={key: value})})
        peak = predict(run, base, processes=config.processes, **how).peak.bytes
        fits = peak <= (config.card or 0) * GIB
        yield {"set": f"{section}.{key}={_said(value)}", "peak_gib": _gib(peak), "fits": fits}
        if fits:
            return


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _time(
    config: PlanConfig, run: RunConfig, base: Architecture, data: Data, trained: int
) -> dict[str, Any]:
    from train import flops

    work = flops.count(base, data.size, windows=windows(run))
    picture = flops.per_picture(run, work)
    share = run.train.batch_size / config.processes
    made: dict[str, Any] = {
        "tflop_per_image": round(picture.model / TERA, 3),
        "tflop_per_step": round(picture.model * run.train.batch_size / TERA, 3),
        "exchanged_bytes_per_step": 4 * trained if config.processes > 1 else 0,
    }
    rate = _rate(config, run)
    if rate is None:
        return made
    step = (picture.model + picture.again) * share / rate
    made |= {
        "assumed_tflop_per_second": round(rate / TERA, 1),
        "step_seconds": round(step, 4),
        "training_hours": round(step * run.train.steps / 3600, 3),
    }
    if caching := _caching_rate(config, run, rate):
        seconds = _caching(run, work, data) / caching / config.processes
        made["caching_hours"] = round(seconds / 3600, 3)
    if config.processes > 1 and config.link:
        # A ring: each process sends and receives this share of all gradients.
        sent = 2 * (config.processes - 1) / config.processes * 4 * trained
        exchange = sent / (config.link * GB)
        made["exchange_seconds"] = round(exchange, 5)
        made["scaling_efficiency"] = round(step / (step + exchange), 4)
    return made


def _caching(run: RunConfig, work: Any, data: Data) -> float:
    """FLOPs. Masked pictures of an inpainting model are left out."""
    random = any(source.crop == "random" for source in run.data.named_sources())
    views = (2 if run.data.flip else 1) * (run.data.crop_variants if random else 1)
    text = work.text_encoder if trains_text(run) is None else 0
    return data.images * (work.vae_encode * views + text)


def _caching_rate(config: PlanConfig, run: RunConfig, rate: float) -> float | None:
    """FLOP/s of the same share of the peak as in training, in the precision of caching; None where
    the peaks are not known."""
    from train.flops import peak_flops

    train, half = run.train, run.data.cache_precision == "bf16"
    if config.gpu is None:
        return None
    peak = peak_flops(config.gpu, train.mixed_precision, tf32=train.tf32)
    caching = peak_flops(config.gpu, "bf16" if half else "no", tf32=train.tf32)
    return rate * caching / peak if peak and caching else None


def _rate(config: PlanConfig, run: RunConfig) -> float | None:
    """FLOP/s that are taken to be reached. Raises UserError for a GPU that is not known."""
    from train.flops import peak_flops

    if config.achieved:
        return config.achieved * TERA
    if config.gpu is None:
        return None
    peak = peak_flops(config.gpu, run.train.mixed_precision, tf32=run.train.tf32)
    if peak is None:
        raise UserError(
            f"gpu={config.gpu}: its peak in train.mixed_precision={run.train.mixed_precision} is "
            "not known here; give achieved=TFLOP/s instead (scripts/benchmark.py train measures it)"
        )
    return peak * config.share


# What is printed


def text(made: dict[str, Any]) -> str:
    width, height = made["largest_bucket"]
    lines = [
        f"base       {made['base']}",
        f"pictures   {made['images']:,}, at most {width} x {height} px",
        f"trains     {made['trained_numbers']:,} numbers",
        "memory     GiB",
        *(f"  {name:<16} {size:8.2f}" for name, size in made["memory_gib"].items()),
        f"  {'peak':<16} {made['peak_gib']:8.2f}{_verdict(made)}",
        *(_remedy(remedy) for remedy in made.get("remedies", [])),
        "disk       "
        + ", ".join(f"{name} {size:.2f} GiB" for name, size in made["disk_gib"].items()),
        *_times(made),
    ]
    return "\n".join(lines)


def _verdict(made: dict[str, Any]) -> str:
    if "fits" not in made:
        return ""
    return f"  {'fits' if made['fits'] else 'does not fit'} into {made['card_gib']:g} GiB"


def _remedy(remedy: dict[str, Any]) -> str:
    verdict = "fits" if remedy["fits"] else "not yet"
    return f"    with {remedy['set']:<38} {remedy['peak_gib']:8.2f}  {verdict}"


def _times(made: dict[str, Any]) -> Iterator[str]:
    yield (
        f"work       {made['tflop_per_image']:.2f} TFLOP for a picture, "
        f"{made['tflop_per_step']:.1f} for a step"
    )
    if "step_seconds" not in made:
        yield "time       give gpu=NAME or achieved=TFLOP/s"
        return
    caching = "caching not predicted, for which give gpu=NAME of a known card"
    if "caching_hours" in made:
        caching = f"{made['caching_hours']:.2f} h of caching before"
    yield (
        f"time       {made['step_seconds']:.3f} s for a step, {made['training_hours']:.2f} h in "
        f"all at {made['assumed_tflop_per_second']:g} TFLOP/s (assumed); {caching}"
    )
    if exchanged := made["exchanged_bytes_per_step"]:
        yield f"exchange   {exchanged / 2**20:,.1f} MiB of gradients for a step" + (
            f", {made['exchange_seconds'] * 1000:.1f} ms: scaling efficiency "
            f"{made['scaling_efficiency']:.1%} where nothing overlaps"
            if "exchange_seconds" in made
            else ""
        )

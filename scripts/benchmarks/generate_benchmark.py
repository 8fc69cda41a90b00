"""How fast pictures are made: where the time of scripts/generate.py goes, and what batches save."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from scripts.benchmarks.measuring import fresh, seconds, span, spread
from train.config import ROOT, load

HERE = __name__
GUIDED = 2  # the UNet sees each picture with its prompt and without

Results = dict[str, dict[str, Any]]


class Scale(NamedTuple):
    """How much of everything: sampling steps of a picture, pictures of the largest batch, and how
    often each is measured."""

    steps: int
    batches: tuple[int, ...]
    rounds: int


FULL = Scale(25, (1, 2, 4, 8), 7)
QUICK = Scale(4, (1, 2), 2)


def measure(
    parts: Sequence[str],
    scale: Scale,
    *,
    model: str = "data/assets/toy-base",
    precision: str = "no",
    side: int | None = None,
) -> Results:
    """The results of each part by its name.

    precision: no, bf16 or fp16. side: of the pictures, in pixels; by default the model's own.
    """
    what = {"model": model, "precision": precision, "side": side, "rounds": scale.rounds}
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "pictures": partial(fresh, f"{HERE}:pictures", steps=scale.steps, **what),
        "batches": partial(fresh, f"{HERE}:batches", sizes=list(scale.batches), **what),
    }
    return {part: known[part]() for part in parts}


def table(results: Results) -> str:
    """The results as Markdown."""
    lines = [("what", "measured", "target"), ("---", "---", "---")]
    lines += [row for part, result in results.items() for row in ROWS[part](result)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# One picture


def pictures(
    steps: int, rounds: int, model: str, precision: str, side: int | None
) -> dict[str, Any]:
    """One picture as scripts/generate.py makes it, and within each round what its UNet and its
    decoder take by themselves."""
    import torch

    drawing, jobs = _drawing(steps, model, precision, side)
    size = jobs[0].size
    unet, decode = _unet(drawing, size, 1), _decoder(drawing, size, 1)
    ways = {
        "picture": lambda: drawing.sample(jobs),
        "unet": lambda: [unet() for _ in range(steps)],
        "decode": decode,
    }
    with torch.inference_mode():
        taken = _in_turns(ways, rounds)
    return {
        "steps": steps,
        "size": list(size),
        "precision": precision,
        "rounds": rounds,
        "seconds": {name: spread([round[name] for round in taken]) for name in ways},
        "steps_per_second": spread([steps / round["unet"] for round in taken]),
        "unet_share": spread([round["unet"] / round["picture"] for round in taken]),
        "decode_share": spread([round["decode"] / round["picture"] for round in taken]),
    }


def _drawing(steps: int, model: str, precision: str, side: int | None) -> tuple[Any, list[Any]]:
    """What draws, and one job for it."""
    from accelerate import PartialState

    from eval.sampling import read_prompts
    from scripts.generation.config import GenerateConfig

    overrides = [f"model.path={model}", f"precision={precision}", f"steps={steps}", "output=unused"]
    overrides += [] if side is None else [f"width={side}", f"height={side}"]
    config = load(GenerateConfig, ["prompt=a large red heart", *overrides])
    # The command's own functions: nothing may import a command.
    command = runpy.run_path(str(ROOT / "scripts/generate.py"))
    drawing, _ = command["prepare"](config, "txt2img", [], [], PartialState().device)
    prompts = read_prompts(config)
    return drawing, command["list_jobs"](config, prompts, [], drawing.pipeline)


def _unet(drawing: Any, size: tuple[int, int], count: int) -> Callable[[], Any]:
    """One step of so many pictures, guided."""
    import torch

    unet = drawing.pipeline.unet
    like = {"device": drawing.pipeline._execution_device, "dtype": unet.dtype}
    width, height = (pixels // drawing.pipeline.vae_scale_factor for pixels in size)
    latents = torch.randn(GUIDED * count, unet.config.in_channels, height, width).to(**like)
    text = torch.randn(GUIDED * count, 77, unet.config.cross_attention_dim).to(**like)
    timestep = torch.tensor(500, device=like["device"])
    return _waited_for(lambda: unet(latents, timestep, encoder_hidden_states=text).sample)


def _decoder(drawing: Any, size: tuple[int, int], count: int) -> Callable[[], Any]:
    import torch

    pipeline = drawing.pipeline
    width, height = (pixels // pipeline.vae_scale_factor for pixels in size)
    latents = torch.randn(count, pipeline.vae.config.latent_channels, height, width)
    latents = latents.to(pipeline._execution_device, pipeline.vae.dtype)
    return _waited_for(lambda: pipeline.vae.decode(latents).sample)


def _waited_for(work: Callable[[], Any]) -> Callable[[], Any]:
    """A GPU has only been told when the call returns."""
    import torch

    def whole() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return whole


# Batches


def batches(
    sizes: list[int], rounds: int, model: str, precision: str, side: int | None
) -> dict[str, Any]:
    """Pictures per second of the UNet's step and of the decoder for so many pictures at once,
    against one by one, in turns within each round."""
    import torch

    drawing, jobs = _drawing(1, model, precision, side)
    size = jobs[0].size
    ways = {f"unet {count}": _unet(drawing, size, count) for count in sizes}
    ways |= {f"decode {count}": _decoder(drawing, size, count) for count in sizes}
    with torch.inference_mode():
        taken = _in_turns(ways, rounds)

    def gain(what: str, count: int) -> dict[str, float]:
        alone = f"{what} {sizes[0]}"
        gains = [count * t[alone] / (sizes[0] * t[f"{what} {count}"]) for t in taken]
        return spread(gains)

    return {
        "sizes": sizes,
        "size": list(size),
        "precision": precision,
        "rounds": rounds,
        "unet_per_second": [spread([n / t[f"unet {n}"] for t in taken]) for n in sizes],
        "unet_gain": [gain("unet", n) for n in sizes],
        "decode_per_second": [spread([n / t[f"decode {n}"] for t in taken]) for n in sizes],
        "decode_gain": [gain("decode", n) for n in sizes],
    }


def _in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> list[dict[str, float]]:
    """Seconds of each in each round."""
    for work in ways.values():
        work()  # once to warm up
    return [{name: seconds(work) for name, work in ways.items()} for _ in range(rounds)]


# The table


def _pictures_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    width, height = result["size"]
    what = (
        f"a picture of {width}x{height}, {result['steps']} steps, precision {result['precision']}"
    )
    yield f"{what}, seconds", span(result["seconds"]["picture"]), ""
    yield "the UNet's steps per second, guided", span(result["steps_per_second"], 1), ""
    yield "share of the time in the UNet", span(result["unet_share"]), ""
    yield "share in the decoder", span(result["decode_share"]), ""


def _batches_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for number, count in enumerate(result["sizes"]):
        for what, name in (("unet", "the UNet's step"), ("decode", "the decoder")):
            rate, gain = result[f"{what}_per_second"][number], result[f"{what}_gain"][number]
            said = f"{span(rate, 1)}; {span(gain)} times that of {result['sizes'][0]}"
            yield f"{name}, so many pictures at once: {count}, pictures per second", said, ""


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str, str]]]] = {
    "pictures": _pictures_rows,
    "batches": _batches_rows,
}

"""What checkpoints cost: the rate at which they are written, and what training loses by them."""

from __future__ import annotations

import os
import runpy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scripts.benchmarks.measuring import fresh, seconds, span, spread
from train.config import ROOT, LoraRun, load

HERE = __name__
SIDE = 1024  # of the square matrices of a large model, 4 MiB each

Results = dict[str, dict[str, Any]]


class Scale(NamedTuple):
    """How much of everything: matrices whose moments are written, steps of a run, and how often
    each is measured."""

    matrices: int
    writes: int
    steps: int
    runs: int


FULL = Scale(204, 7, 40, 12)
QUICK = Scale(20, 3, 8, 2)


def measure(parts: Sequence[str], scale: Scale, *, scratch: Path | None = None) -> Results:
    """The results of each part by its name."""
    known: dict[str, Callable[[str], dict[str, Any]]] = {
        "writing": partial(fresh, f"{HERE}:writing", matrices=scale.matrices, rounds=scale.writes),
        "training": partial(fresh, f"{HERE}:training", steps=scale.steps, rounds=scale.runs),
    }
    results = {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
            results[part] = known[part](folder=folder)  # type: ignore[call-arg]
    return results


def table(results: Results) -> str:
    """The results as Markdown."""
    rows = [("what", "measured", "target"), ("---", "---", "---")]
    rows += [row for part, result in results.items() for row in ROWS[part](result)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Writing


def writing(folder: str, matrices: int, rounds: int) -> dict[str, Any]:
    """A model's weights and AdamW's two moments of them, against the same bytes written one after
    the other into one file; both through to the disk."""
    from train.checkpoint import Checkpoints

    model, optimizer = _large(matrices)
    place, plain = Path(folder) / "checkpoints", Path(folder) / "plain"
    in_turn, beside = Checkpoints(place, keep=2), Checkpoints(place, keep=2, asynchronous=True)
    ours, plains, stood, size = [], [], [], 0
    for _ in range(rounds):
        ours.append(seconds(partial(in_turn.save, 1, model, optimizer)))
        size = sum(file.stat().st_size for file in place.rglob("*.safetensors"))
        shutil.rmtree(place)
        plains.append(seconds(partial(_write_plainly, plain, model, optimizer)))
        plain.unlink()
        stood.append(seconds(partial(beside.save, 1, model, optimizer)))
        beside.wait()
        shutil.rmtree(place)
    return {
        "mib": size // 2**20,
        "rounds": rounds,
        "mib_per_second": spread([size / 2**20 / taken for taken in ours]),
        "plain_mib_per_second": spread([size / 2**20 / taken for taken in plains]),
        "ratio": spread([plain / own for own, plain in zip(ours, plains, strict=True)]),
        "standstill_seconds": spread(stood),
    }


def _large(matrices: int) -> tuple[Any, Any]:
    """So many matrices, and an optimizer that has their moments."""
    import torch

    model = torch.nn.ParameterList([torch.randn(SIDE, SIDE) for _ in range(matrices)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(10.0),
            "exp_avg": torch.randn(SIDE, SIDE),
            "exp_avg_sq": torch.rand(SIDE, SIDE),
        }
    return model, optimizer


def _write_plainly(file: Path, model: Any, optimizer: Any) -> None:
    with file.open("wb", buffering=0) as stream:
        for parameter in model.parameters():
            state = optimizer.state[parameter]
            for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                stream.write(tensor.numpy())
        os.fsync(stream.fileno())


# Training


def training(folder: str, steps: int, rounds: int) -> dict[str, Any]:
    """The toy LoRA with a checkpoint after every step, beside training and in its course, against
    one after the last step alone."""
    run = _toy_run(Path(folder), steps)
    ways = {
        "last": partial(run, every=steps, asynchronous=True),
        "every": partial(run, every=1, asynchronous=True),
        "in_turn": partial(run, every=1, asynchronous=False),
    }
    run(every=1, asynchronous=True)  # once to warm up
    taken = [{name: seconds(work) for name, work in ways.items()} for _ in range(rounds)]
    file = next(Path(folder).glob("run-*/checkpoints"))
    return {
        "steps": steps,
        "rounds": rounds,
        "mib": round(sum(f.stat().st_size for f in file.glob("*/*")) / 2**20 / 2, 1),
        "seconds": {name: spread([round[name] for round in taken]) for name in ways},
        "every_to_last": spread([round["every"] / round["last"] for round in taken]),
        "in_turn_to_last": spread([round["in_turn"] / round["last"] for round in taken]),
    }


def _toy_run(folder: Path, steps: int) -> Callable[..., None]:
    """What trains so many steps, each time in a run directory of its own."""
    from data import toy
    from train import feeding, models, pictures
    from train.diffusion import Objective
    from train.launch import open_accelerator
    from train.loop import fit

    toy.write_pictures(folder / "pictures", 16, seed=0)
    overrides = [f"output={folder}", f"data.path={folder / 'pictures'}"]
    overrides += [f"data.cache={folder / 'cache'}", f"train.steps={steps}"]
    overrides += ["optim.warmup_steps=0", "preview.every=0", "validation.every=0"]
    config = load(LoraRun, overrides, default=ROOT / "configs/toy/lora.yaml")
    accelerator = open_accelerator(config.train.mixed_precision)
    pipeline = models.load_base(config, accelerator)
    batches = feeding.batches(pictures.find(config.data), pipeline, config, accelerator)
    objective = Objective.of(pipeline.scheduler, config.diffusion)
    # The command's own method: nothing may import a command.
    lora = runpy.run_path(str(ROOT / "train/lora.py"))["Lora"]
    method = lora(pipeline, objective, config.lora, seed=config.seed)
    outputs = (folder / f"run-{number}" for number in range(10**6))

    def run(*, every: int, asynchronous: bool) -> None:
        often = {"every": every, "asynchronous": asynchronous}
        checkpoint = config.checkpoint.model_copy(update=often)
        update = {"output": next(outputs), "checkpoint": checkpoint}
        fit(method, batches, config.model_copy(update=update), accelerator)

    return run


# The table


def _writing_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    size = f"{result['mib']:,} MiB of weights and moments"
    yield f"{size}, written, synced and hashed, MiB per second", _rate(result, ""), ""
    yield "the same bytes in one file, synced, MiB per second", _rate(result, "plain_"), ""
    yield "share of that rate", span(result["ratio"]), "at least 0.5"
    yield "training stands still for one, seconds", span(result["standstill_seconds"]), ""


def _rate(result: dict[str, Any], which: str) -> str:
    return span(result[f"{which}mib_per_second"], 0)


def _training_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    what = f"toy LoRA, {result['steps']} steps"
    yield f"{what}, one checkpoint at the end, seconds", span(result["seconds"]["last"]), ""
    each = f"one of {result['mib']} MiB every step"
    yield (
        f"{each} (checkpoint.asynchronous), times as long",
        span(result["every_to_last"]),
        ("at most 1.10"),
    )
    yield f"{each}, each waited for, times as long", span(result["in_turn_to_last"]), ""


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str, str]]]] = {
    "writing": _writing_rows,
    "training": _training_rows,
}

"""Runs that are killed and started again until they are done, and what is compared of them with a
run that nothing interrupted."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file

from tests.faults.injected import Fault, record, recorded
from tests.faults.processes import Starter
from tests.runs import arguments

APPLY, FORWARD = "train.optim:Schedule.apply", "train.denoiser:Denoiser.forward"
BACKWARD = "accelerate:Accelerator.backward"
TIMED = {"images_per_second", "data_wait_fraction", "peak_memory_gib", "mfu", "seconds", "waited"}
# What of tests/tiny.yaml a method has besides, and whether that has its section lora.
METHODS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
    "lora": ("train/lora.py", True, ()),
    "dreambooth": (
        "train/dreambooth.py",
        True,
        (
            "dreambooth.class_prompt=a circle",
            "dreambooth.class_images=7",
            "dreambooth.class_steps=1",
            "dreambooth.class_guidance=1",
            "lora.text_encoder={rank: 2}",
        ),
    ),
    "textual inversion": (
        "train/textual_inversion.py",
        False,
        ('textual_inversion.tokens=[{"token": "<owl>", "initial": "owl", "vectors": 3}]',),
    ),
    "full": ("train/full.py", False, ("train.ema_decay=0.9", "optim.learning_rate=1e-3")),
}


class Kill(NamedTuple):
    """SIGKILL in an optimizer step, counted from 0."""

    step: int
    batch: int = 0
    """Before this micro-batch of it, counted from 0: where it is not the first, the gradients are
    half there."""


@dataclass(frozen=True)
class Step:
    """What one process did of one optimizer step before it went on, or was killed."""

    pid: int
    rank: int
    number: int
    rates: dict[str, float]
    batches: tuple[dict[str, Any], ...]
    """The micro-batches that went through the network, as `described`."""


def command(method: str, world: Path, output: Path, *overrides: str) -> list[str]:
    """The entry of a method and the arguments of a tiny run; later overrides win."""
    entry, has_lora, own = METHODS[method]
    file, *rest = arguments(world, output, "preview.every=0", "checkpoint.keep=99", *own)
    values = yaml.safe_load(Path(file.removeprefix("--config=")).read_text(encoding="utf-8"))
    if not has_lora:
        del values["lora"]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return [entry, f"--config={output.with_suffix('.yaml')}", *rest, *overrides]


def whole(starter: Starter, command: Sequence[str], records: Path, **options: Any) -> list[Step]:
    """Runs to the end; what was recorded so far, by this run and those before it."""
    starter.finish(*command, faults=_records(records), **options)
    return steps_of(records)


def killed(
    starter: Starter,
    command: Sequence[str],
    records: Path,
    kill: Kill,
    *,
    start: int,
    micro_batches: Callable[[int], int],
    **options: Any,
) -> list[Step]:
    """Runs from the step `start` up to a kill; what this attempt did.

    micro_batches: how many each process has in a step.
    """
    before = len(steps_of(records))
    passes = sum(map(micro_batches, range(start, kill.step))) + kill.batch
    at, call = (BACKWARD, passes) if kill.batch else (APPLY, kill.step - start + 1)
    fault = Fault(at=at, do="kill", call=call, after=True)
    run = starter.start(*command, faults=[*_records(records), fault], **options)
    codes = run.wait()
    # Of several processes one can fail of another's death before its own.
    assert -signal.SIGKILL in codes and 0 not in codes, f"{codes}\n{run.output}"
    run.kill()
    return steps_of(records)[before:]


def newest(output: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    found = (path.name for path in (output / "checkpoints").glob("step-*"))
    return max((int(name.removeprefix("step-")) for name in found), default=0)


def _records(file: Path) -> list[Fault]:
    return [record(file, APPLY, after=True), record(file, FORWARD)]


def steps_of(records: Path) -> list[Step]:
    """What was recorded, by process and step, in the order of their beginnings."""
    steps: list[Step] = []
    current: dict[int, int] = {}
    for line in recorded(records):
        pid, rank = line["pid"], line["rank"]
        if line["at"] == APPLY:
            current[pid] = len(steps)
            steps.append(Step(pid, rank, line["given"][1], line["gives"], ()))
        elif "weight" in line["given"][1]:  # what is validated on has none
            at = steps[current[pid]]
            batches = (*at.batches, line["given"][1])
            steps[current[pid]] = Step(pid, rank, at.number, at.rates, batches)
    return steps


def by_step(steps: Iterable[Step]) -> dict[tuple[int, int], Step]:
    """By number and rank, the last attempt at each."""
    return {(step.number, step.rank): step for step in steps}


def samples(steps: Iterable[Step]) -> dict[str, dict[str, Any]]:
    """Those of the processes of one step by id, without padding, each with the rows of all that it
    has."""
    found: dict[str, dict[str, Any]] = {}
    for batch in (batch for step in steps for batch in step.batches):
        for row, name in enumerate(batch["ids"]):
            if batch["weight"][row] > 0:
                assert name not in found, f"{name} is there twice"
                found[name] = {key: values[row] for key, values in batch.items()}
    return found


def contents(output: Path) -> dict[str, Any]:
    """All that must be the same of two runs: tensors of all checkpoints and results, and the JSON
    beside them, without times."""
    found: dict[str, Any] = {"metrics.jsonl": metrics(output)}
    for file in sorted(output.rglob("*.safetensors")):
        found |= {f"{file.relative_to(output)}: {k}": v for k, v in load_file(file).items()}
    for file in sorted(output.glob("checkpoints/*/manifest.json")):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kept = {name: manifest[name] for name in ("step", "optimizer", "guard")}
        found[str(file.relative_to(output))] = kept | {"meter": _untimed(manifest["meter"])}
    return found


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [_untimed(json.loads(line)) for line in lines]


def _untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMED}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both, to the last bit."""
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not _same(one[name], other[name])
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)

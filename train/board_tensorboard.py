"""A run as TensorBoard's event files, in OUTPUT/tensorboard: `tensorboard --logdir runs`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from train.boards import SCORE_COLUMNS, Hello, Line, Preview, Say, total
from train.curves import AXIS, INTERVAL, QUARTERS, Curve, drawn, units
from train.system_use import SystemUse

_LAYOUT = {
    "validation": {
        "held-out loss, 95 % interval": ["Margin", INTERVAL],
        "held-out loss by quarter of the timesteps (q1: least noise)": ["Multiline", QUARTERS],
    }
}


class TensorBoard:
    """Event files that nothing has to be reached for.

    What was logged after the step that a run is resumed at is hidden by what comes again.
    """

    def __init__(self, hello: Hello, say: Say) -> None:
        from torch.utils.tensorboard import SummaryWriter

        start = hello.start
        purged = {} if start is None else {"purge_step": start + 1 if start else 0}
        self._folder = hello.output / "tensorboard"
        self._writer: Any = SummaryWriter(str(self._folder), flush_secs=5, **purged)
        self._system = SystemUse(hello.pid)
        self._step = start if start is not None else hello.steps
        self._describe(hello)
        say("note", f"TensorBoard: `tensorboard --logdir {shlex.quote(str(self._folder))}`")

    def _describe(self, hello: Hello) -> None:
        about = {"job": hello.job, "group": hello.group, "tags": ", ".join(hello.tags)}
        rows = [f"| {key} | {value} |" for key, value in {"name": hello.name, **about}.items()]
        self._text("run", "\n".join(["| | |", "|---|---|", *rows]))
        config = json.dumps(hello.settings, indent=2)
        self._text("config", "\n".join(f"    {line}" for line in config.splitlines()))
        self._text("units", "\n".join(f"- {name}: {unit}" for name, unit in units().items()))
        self._writer.add_custom_scalars(_LAYOUT)
        self._hyperparameters(hello.settings)

    def _text(self, tag: str, text: str) -> None:
        self._writer.add_text(tag, text, self._step)

    def _hyperparameters(self, settings: Line) -> None:
        """In this run, where `add_hparams` would begin one beside it."""
        from torch.utils.tensorboard.summary import hparams

        given = {key: v for key, v in flat(settings) if isinstance(v, bool | str | float | int)}
        for summary in hparams(given, {"validation/loss": None, "train/loss": None}):
            self._writer.file_writer.add_summary(summary)

    def log(self, line: Line) -> None:
        self._step = line[AXIS]
        for curve, value in drawn(line):
            self._number(curve, value)
        if "loss" in line:
            for name, value in self._system.read().items():
                self._number(Curve(f"system/{name}", ""), value)
        self._writer.flush()

    def _number(self, curve: Curve, value: float) -> None:
        from torch.utils.tensorboard.summary import scalar

        summary = scalar(curve.title, value)
        about = summary.value[0].metadata  # which `add_scalar` has no word for
        about.plugin_data.plugin_name, about.summary_description = "scalars", curve.unit
        self._writer.file_writer.add_summary(summary, self._step)

    def previews(self, step: int, pictures: list[Line]) -> None:
        """Each prompt's picture, the base's on its left."""
        for number, preview in enumerate(map(Preview.of, pictures)):
            self._writer.add_image(preview.named(number), pair(preview), step, dataformats="HWC")
        self._writer.flush()

    def norms(self, step: int, blocks: dict[str, list[float]]) -> None:
        import numpy as np

        for block, values in blocks.items():
            self._writer.add_scalar(f"norms/{block}", total(values), step)
            self._writer.add_histogram(f"norms/{block}, by layer", np.array(values), step)

    def scores(self, rows: list[Line]) -> None:
        lines = [SCORE_COLUMNS, ["---"] * len(SCORE_COLUMNS)]
        lines += [[_cell(row.get(column)) for column in SCORE_COLUMNS] for row in rows]
        self._text("evaluation/scores", "\n".join(f"| {' | '.join(line)} |" for line in lines))
        for row in rows:
            for end in ("value", "low", "high"):
                if row[end] is not None:
                    tag = f"evaluation/result/{row['metric']}{'' if end == 'value' else f'_{end}'}"
                    self._writer.add_scalar(tag, row[end], self._step)

    def artifact(self, name: str, kind: str, paths: list[str]) -> None:
        """Where they are: event files hold none."""
        self._text(f"{kind}/{name}", "\n".join(f"- {path}" for path in paths))

    def finish(self, code: int) -> None:
        self._writer.close()

    def cut_off(self, code: int) -> None:
        """Nothing: what is written is whole."""

    def kept(self) -> str:
        return f"; what there is lies in {self._folder}"


def pair(preview: Preview) -> Any:
    """Base and fine-tuned side by side (H, W, 3), uint8; the latter alone where there is no
    base's."""
    import numpy as np
    from PIL import Image

    paths: list[Path] = [path for path in (preview.base, preview.picture) if path]
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    return np.concatenate(pictures, axis=1)


def flat(settings: Line, prefix: str = "") -> list[tuple[str, Any]]:
    """Every value by its dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found += flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)

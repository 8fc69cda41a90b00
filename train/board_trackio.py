"""A run on Trackio, which keeps it on this machine unless it is told of a Space."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from train.boards import SCORE_COLUMNS, Hello, Line, Preview, Say, lasting_id, total
from train.curves import AXIS, drawn, units

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DATASET_ID", "TRACKIO_BUCKET_ID")


class Trackio:
    """A Trackio run, of a name of its own, that is resumed with the run directory.

    Nothing leaves the machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set. It looks at
    processor and GPUs itself where psutil and nvidia-ml-py are installed.
    """

    def __init__(self, hello: Hello, say: Say) -> None:
        if hello.offline:
            for name in _ELSEWHERE:
                os.environ.pop(name, None)
        import trackio

        self._trackio: Any = trackio
        # Trackio knows runs by name alone.
        self._id = lasting_id(hello.output / "trackio_id.txt")
        about = {"job": hello.job, "tags": list(hello.tags), "output": str(hello.output)}
        self._run: Any = trackio.init(
            project=hello.project,
            name=f"{hello.name}-{self._id}",
            group=hello.group,
            config={**hello.settings, "units": units(), "run": about},
            resume="allow",
            embed=False,
        )
        self._step = hello.start or 0
        say("note", f"Trackio: `trackio show --project {shlex.quote(hello.project)}`")

    def log(self, line: Line) -> None:
        self._step = line[AXIS]
        self._run.log({curve.title: value for curve, value in drawn(line)}, step=self._step)

    def previews(self, step: int, pictures: list[Line]) -> None:
        """A table with a row for each prompt, and each prompt's pictures over steps."""
        rows, shown = [], {}
        for number, preview in enumerate(map(Preview.of, pictures)):
            base = self._image(preview.base) if preview.base else None
            rows.append([step, preview.prompt, preview.seed, base, self._image(preview.picture)])
            shown[preview.named(number)] = self._image(preview.picture)
        columns = ["step", "prompt", "seed", "base", "fine-tuned"]
        table = self._trackio.Table(columns=columns, data=rows)
        self._run.log({"previews/table": table, **shown}, step=step)

    def _image(self, path: Path) -> Any:
        return self._trackio.Image(str(path))

    def norms(self, step: int, blocks: dict[str, list[float]]) -> None:
        found: Line = {}
        for block, values in blocks.items():
            found[f"norms/{block}"] = total(values)
            found[f"norms/{block}, by layer"] = self._trackio.Histogram(values, num_bins=16)
        self._run.log(found, step=step)

    def scores(self, rows: list[Line]) -> None:
        data = [[row.get(column) for column in SCORE_COLUMNS] for row in rows]
        table = self._trackio.Table(columns=list(SCORE_COLUMNS), data=data)
        found: Line = {"evaluation/scores": table}
        for row in rows:
            ends = {"": row["value"], "_low": row["low"], "_high": row["high"]}
            found |= {
                f"evaluation/result/{row['metric']}{end}": value
                for end, value in ends.items()
                if value is not None
            }
        self._run.log(found)

    def artifact(self, name: str, kind: str, paths: list[str]) -> None:
        artifact = self._trackio.Artifact(f"{name}-{self._id}", type=kind)
        for path in map(Path, paths):
            (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
        self._run.log_artifact(artifact)

    def finish(self, code: int) -> None:
        self._run.finish()

    def cut_off(self, code: int) -> None:
        """Nothing: what is written is whole."""

    def kept(self) -> str:
        return ""

"""A run on Weights & Biases, online or offline."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.boards import SCORE_COLUMNS, Hello, Line, Preview, Say, brief, lasting_id, total
from train.curves import AXIS, drawn, units

_COLUMNS = ["step", "prompt", "seed", "base", "fine-tuned"]


class Wandb:
    """A wandb run that is resumed with the run directory.

    The axis of its charts is our `step`, not wandb's own, which refuses to go back: after a resume
    the lines since the checkpoint come twice, one point on the other. Where the server cannot be
    reached it goes on offline. wandb itself watches the run's process and the machine.
    """

    INIT_SECONDS = 60
    _ENDING = Path(__file__).with_name("wandb_ending.py")

    def __init__(self, hello: Hello, say: Say) -> None:
        # Pictures and files wait to be sent beside the run, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(hello.output / "wandb"))
        import wandb

        self._wandb: Any = wandb
        self._say, self._why = say, ""
        self._sends_files = False
        self._run: Any = None
        # A sweep's agent has given the run its id.
        self._id = lasting_id(hello.output / "wandb_id.txt", os.environ.get("WANDB_RUN_ID"))
        self._about = self._arguments(hello)
        settings = self._settings(hello)
        self._run = self._started(self._about | {"settings": settings}, offline=hello.offline)
        self._run.define_metric(AXIS)
        self._run.define_metric("*", step_metric=AXIS)
        self._table: Any = None
        if self._run.url and not self._why:
            say("note", f"wandb: {self._run.url}")

    def _arguments(self, hello: Hello) -> Line:
        return {
            "project": hello.project,
            "entity": hello.entity,
            "name": hello.name,
            "id": self._id,
            "resume": "allow",
            "dir": str(hello.output),
            "config": {**hello.settings, "units": units()},
            "group": hello.group,
            "tags": list(hello.tags) or None,
            "job_type": hello.job,
        }

    def _settings(self, hello: Hello) -> Any:
        return self._wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            init_timeout=self.INIT_SECONDS,
            x_stats_pid=hello.pid,
        )

    def _started(self, arguments: Line, *, offline: bool) -> Any:
        if offline:
            return self._wandb.init(**arguments, mode="offline")
        try:
            return self._wandb.init(**arguments)
        except Exception as error:
            self._why = brief(error)
            self._say("warning", f"wandb goes on offline ({self._why})")
            with suppress(Exception, SystemExit):
                self._wandb.teardown()  # what has tried it holds on to the id
            return self._wandb.init(**arguments, mode="offline")

    def log(self, line: Line) -> None:
        self._run.log({AXIS: line[AXIS]} | {curve.title: value for curve, value in drawn(line)})

    def previews(self, step: int, pictures: list[Line]) -> None:
        """A table with a row for each prompt and step, and each prompt's pictures over steps."""
        if self._table is None:
            self._table = self._wandb.Table(columns=_COLUMNS, log_mode="INCREMENTAL")
        shown: Line = {}
        for number, preview in enumerate(map(Preview.of, pictures)):
            tuned = self._image(preview.picture, f"step {step}")
            base = self._image(preview.base, "base") if preview.base else None
            self._table.add_data(step, preview.prompt, preview.seed, base, tuned)
            shown[preview.named(number)] = [image for image in (base, tuned) if image]
        self._run.log({AXIS: step, "previews/table": self._table, **shown})

    def _image(self, path: Path, caption: str) -> Any:
        return self._wandb.Image(str(path), caption=caption)

    def norms(self, step: int, blocks: dict[str, list[float]]) -> None:
        found: Line = {AXIS: step}
        for block, values in blocks.items():
            found[f"norms/{block}"] = total(values)
            found[f"norms/{block}, by layer"] = self._wandb.Histogram(values, num_bins=16)
        self._run.log(found)

    def scores(self, rows: list[Line]) -> None:
        data = [[row.get(column) for column in SCORE_COLUMNS] for row in rows]
        columns = list(SCORE_COLUMNS)
        self._run.log({"evaluation/scores": self._wandb.Table(columns=columns, data=data)})
        for row in rows:
            ends = {"": row["value"], "_low": row["low"], "_high": row["high"]}
            for end, value in ends.items():
                if value is not None:
                    self._run.summary[f"evaluation/result/{row['metric']}{end}"] = value

    def artifact(self, name: str, kind: str, paths: list[str]) -> None:
        self._sends_files = True
        artifact = self._wandb.Artifact(f"{name}-{self._id}", type=kind)
        for path in map(Path, paths):
            if path.is_dir():
                artifact.add_dir(str(path), skip_cache=True, policy="immutable")
            else:
                # A copy: the run's reports are written again when it is evaluated.
                artifact.add_file(str(path), skip_cache=True)
        self._run.log_artifact(artifact)

    def finish(self, code: int) -> None:
        self._run.finish(exit_code=code)
        if self._run.offline:
            self._say("note", f"wandb was offline{self.kept()}")

    def cut_off(self, code: int) -> None:
        """wandb says how a run ended only once its files are sent, and calls it crashed before: has
        another process say it, as this one's would be late."""
        if not self._sends_files or self._run.offline:
            return
        process = subprocess.Popen(
            [sys.executable, "-P", str(self._ENDING)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        told = {"run": self._about, "code": code, "after": os.getpid()}
        process.stdin.write(json.dumps(told).encode())
        process.stdin.close()

    def kept(self) -> str:
        if self._run is None:
            return ""
        folder = shlex.quote(str(Path(self._run.dir).parent))
        return f"; `wandb sync {folder}` sends what is there"

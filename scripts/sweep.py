"""Trains once for each setting of a sweep, on this machine or on a cluster, and ranks the results.

    python scripts/sweep.py sweep=configs/sweeps/random.yaml
    python scripts/sweep.py sweep=configs/sweeps/rank.yaml parallel=4 data.path=my/pictures
    python scripts/sweep.py sweep=configs/sweeps/rank.yaml launch=slurm sbatch='[--time=2:00:00]'
    python scripts/sweep.py sweep=configs/sweeps/rank.yaml launch=none     # only the ranking

Every run gets a folder named after its values below the sweep's `output`. The same command again
goes on: what is done is left alone, what was interrupted resumes, what failed is tried again. Other
keys are given to every run. The ranking goes to OUTPUT/sweep.json too.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from data.files import write_atomically
from scripts import sweep_checking, sweep_launching, sweep_ranking, sweeping
from scripts.sweeping import SweepConfig, SweepFile, SweepRun
from train import screens
from train.config import RunFailed, command, load


def main(arguments: list[str]) -> None:
    own, rest = split(arguments)
    config = load(SweepConfig, own)
    sweep = sweeping.read(config.sweep)
    runs = sweeping.runs_of(sweep, rest)
    missing = [run for run in runs if not run.is_done]
    if config.launch != "none":
        sweep_checking.check(missing, rest)
    if config.dry_run:
        for run in missing:
            print(shlex.join([*(sweep.launcher or ["python"]), *run.words]))
        print(f"dry run: {len(missing)} of {len(runs)} runs to do, nothing trained")
        return

    print(f"{config.sweep}: {len(runs)} runs, {len(runs) - len(missing)} of them done before")
    if config.launch == "slurm" and missing:
        job = sweep_launching.submit(
            missing, sweep.output, at_once=config.parallel, options=config.sbatch
        )
        print(f"SLURM job {job['job']}: {len(missing)} tasks of {job['file']}")
        print("once they are through, launch=none ranks them")
        screens.done(job["file"], job=job["job"], tasks=len(missing))
        return
    codes: Mapping[str, int] = {}
    if config.launch == "local" and missing:
        logs = sweep.output / "logs"
        local = sweep_launching.Local(sweep.launcher, logs, parallel=config.parallel or 1)
        codes = local.run(missing)
    ranking = tell(sweep, runs)
    if any(codes.values()) or len(codes) < len(missing) and config.launch == "local":
        left = sum(not run.is_done for run in runs)
        raise RunFailed(f"{left} of {len(runs)} runs are not done; the same command goes on")
    screens.done(sweep.output / "sweep.json", ranking=ranking)


def tell(sweep: SweepFile, runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
    """The ranking, on the terminal and in OUTPUT/sweep.json; returns it as it stands there."""
    ranked = sweep_ranking.rank(runs, sweep.metric, sweep.better)
    ranking = sweep_ranking.as_json(ranked)
    content = {
        "metric": sweep.metric,
        "better": sweep.better,
        "ranking": ranking,
        "runs": [
            {"name": r.name, "values": dict(r.values), "seed": r.seed, "done": r.is_done}
            for r in runs
        ],
    }
    sweep.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(sweep.output / "sweep.json", text.encode("utf-8"))
    print(f"\n{sweep_ranking.table(ranked, sweep.metric)}\n\n{sweep.output / 'sweep.json'}")
    if any(one.is_done for one in ranked) and not any(one.seeds for one in ranked):
        print(
            f"note: no run has {sweep.metric}; a held-out loss needs validation.path=FOLDER, and "
            "metric: loss ranks by the training loss"
        )
    return ranking


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sweep's own arguments, and those of its runs."""
    if {"--help", "-h"} & set(arguments):
        return ["--help"], []
    own = [a for a in arguments if a.partition("=")[0] in SweepConfig.model_fields]
    return own, [a for a in arguments if a not in own]


if __name__ == "__main__":
    command(main)

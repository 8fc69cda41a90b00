"""The section `tracking` of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.parsing import Section


class TrackingConfig(Section):
    """Where the run can be watched (docs/tracking.md)."""

    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = []
    """Dashboards; metrics.jsonl is always written. A tracker that fails never ends the run."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """online; offline: keep everything on this machine, to be sent later; disabled: no dashboard.
    WANDB_MODE is heeded where this is online."""
    project: str = "sd-atelier"
    """Project name on the dashboard."""
    entity: str | None = None
    """The wandb team or user that the project belongs to; default yours."""
    name: str | None = None
    """The run's name on the dashboard; default the name of its folder."""
    group: str | None = None
    """What the dashboard shows this run together with; scripts/sweep.py gives the sweep's name."""
    tags: list[str] = []
    """Words to find the run by; Trackio, which has no tags, keeps them with the configuration."""
    artifacts: bool = True
    """Keep the dataset's report and the result with the run on the dashboard (wandb, Trackio)."""
    every: int = Field(10, ge=1)
    """Optimizer steps between logged lines."""

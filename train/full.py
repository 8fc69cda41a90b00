"""Trains every weight of a Stable Diffusion 2 model's UNet and, if asked, its text encoder.

    accelerate launch train/full.py                  # the embedded toy model and pictures
    accelerate launch train/full.py --config configs/full.yaml data.path=my/pictures

The result is OUTPUT/full, a complete diffusers folder. The same command resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ROOT, FullConfig, FullRun, OptimConfig, command, load
from train.plan import plan, start

if TYPE_CHECKING:
    from train.diffusion import Objective
    from train.method import Pipeline


def main(arguments: list[str]) -> None:
    config = load(FullRun, arguments, default=ROOT / "configs/toy/full.yaml")
    planned = plan(config, result="full")
    if planned is None:
        return

    # Heavy imports wait until the run is known to be possible.
    from eval import in_training
    from train import feeding, results
    from train.diffusion import Objective
    from train.loop import fit

    with start(config, planned) as (accelerator, pipeline):
        batches = feeding.batches(
            planned.pictures,
            pipeline,
            config,
            accelerator,
            cache_captions=not config.full.text_encoder,
        )
        pipeline.unet.to(accelerator.device)
        objective = Objective.of(pipeline.scheduler, config.diffusion)
        method = Full(pipeline, objective, config.full)
        judge = in_training.judge(planned.scoring, accelerator)
        publish = results.publisher(method, config.output / "full", accelerator)
        fit(method, batches, config, accelerator, judge, publish)


class Full:
    """All weights of the UNet and, with `text_encoder`, of the text encoder, in fp32."""

    def __init__(self, pipeline: Pipeline, objective: Objective, config: FullConfig) -> None:
        from train.denoiser import Denoiser

        pipeline.unet.requires_grad_(True)
        if config.text_encoder:
            pipeline.text_encoder.requires_grad_(True)
        self._pipeline = pipeline
        self.model = Denoiser(pipeline.unet, objective, pipeline.text_encoder)

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        from train import optim

        return optim.groups(optim.parts_of(self._pipeline), config)

    def pipeline(self) -> Pipeline:
        return self._pipeline

    def export(self, directory: Path) -> None:
        from train.export import save_pipeline

        save_pipeline(self._pipeline, directory)


if __name__ == "__main__":
    command(main)

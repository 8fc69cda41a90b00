"""Trains a LoRA on the UNet of a Stable Diffusion 2 model and, if asked, on its text encoder.

    accelerate launch train/lora.py                  # the embedded toy model and pictures
    accelerate launch train/lora.py --config configs/lora.yaml data.path=my/pictures

The result is OUTPUT/adapter, which diffusers' `load_lora_weights` reads. The same command resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import adapters
from train.config import ROOT, LoraConfig, LoraRun, OptimConfig, command, load
from train.plan import plan, start

if TYPE_CHECKING:
    from train.diffusion import Objective
    from train.method import Pipeline


def main(arguments: list[str]) -> None:
    config = load(LoraRun, arguments, default=ROOT / "configs/toy/lora.yaml")
    planned = plan(
        config,
        result="adapter",
        trainable_bytes=adapters.estimated_bytes(config.lora),
        check=lambda _: adapters.check(config.lora, config.model),
    )
    if planned is None:
        return

    # Heavy imports wait until the run is known to be possible.
    from eval import in_training
    from train import feeding, models, results
    from train.diffusion import Objective
    from train.loop import fit

    with start(config, planned) as (accelerator, pipeline):
        batches = feeding.batches(
            planned.pictures,
            pipeline,
            config,
            accelerator,
            cache_captions=config.lora.text_encoder is None,
        )
        models.store_in(pipeline, config.train, accelerator.device)
        objective = Objective.of(pipeline.scheduler, config.diffusion)
        method = Lora(pipeline, objective, config.lora, seed=config.seed)
        judge = in_training.judge(planned.scoring, accelerator)
        publish = results.publisher(method, config.output / "adapter", accelerator)
        fit(method, batches, config, accelerator, judge, publish)


class Lora:
    """Low-rank updates of the layers of the UNet and, with `text_encoder`, of the text encoder (Hu
    et al. 2021); everything else is frozen."""

    def __init__(
        self, pipeline: Pipeline, objective: Objective, config: LoraConfig, *, seed: int
    ) -> None:
        from train.denoiser import Denoiser

        adapters.attach(pipeline, config, seed=seed)
        self._pipeline = pipeline
        self.model = Denoiser(pipeline.unet, objective, pipeline.text_encoder)

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        from train import optim

        return optim.groups(adapters.named_parameters(self._pipeline), config)

    def pipeline(self) -> Pipeline:
        return self._pipeline

    def export(self, directory: Path) -> None:
        from train import export

        export.save_lora(self._pipeline, directory)
        export.save_scheduler(self._pipeline, directory)


if __name__ == "__main__":
    command(main)

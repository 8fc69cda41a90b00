"""Teaches a Stable Diffusion 2 model a subject, or several, and keeps what they are one of.

    accelerate launch train/dreambooth.py            # the embedded toy model and pictures
    accelerate launch train/dreambooth.py --config configs/dreambooth.yaml data.path=my/dog \
        data.caption="a photo of zwx dog" dreambooth.class_prompt="a photo of a dog"

The result is OUTPUT/adapter, which diffusers' `load_lora_weights` reads, or with lora=null
OUTPUT/full, a complete diffusers folder. The same command resumes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import adapters
from train.class_pictures import Planned
from train.config import ROOT, DreamBoothRun, LoraConfig, OptimConfig, command, load
from train.plan import plan, start

if TYPE_CHECKING:
    from train.diffusion import Objective
    from train.method import Pipeline
    from train.pictures import Pictures
    from train.prior import FrozenBase


HIGHEST_IN_FULL = 1e-5  # learning rate that does a subject good where every weight trains


def main(arguments: list[str]) -> None:
    config = load(DreamBoothRun, arguments, default=ROOT / "configs/toy/dreambooth.yaml")
    result = "adapter" if config.lora else "full"
    size = adapters.estimated_bytes(config.lora) if config.lora else None
    classes = Planned(config)
    planned = plan(
        config,
        result=result,
        trainable_bytes=size,
        check=partial(check, config, classes),
        dataset=classes.manifest,
    )
    if planned is None:
        return

    # Heavy imports wait until the run is known to be possible.
    from eval import in_training
    from train import feeding, models, results
    from train.diffusion import Objective
    from train.loop import fit

    pictures = planned.pictures
    with start(config, planned) as (accelerator, pipeline):
        beside = classes.complete(pictures, pipeline, accelerator)
        batches = feeding.batches(
            pictures,
            pipeline,
            config,
            accelerator,
            cache_captions=not trains_text_encoder(config),
            classes=beside,
        )
        if config.lora:
            models.store_in(pipeline, config.train)
        pipeline.unet.to(accelerator.device)
        objective = Objective.of(pipeline.scheduler, config.diffusion)
        method = DreamBooth(
            pipeline,
            objective,
            config.lora,
            text_encoder=config.dreambooth.text_encoder,
            prior=frozen_base(config, pipeline),
            seed=config.seed,
        )
        judge = in_training.judge(planned.scoring, accelerator)
        publish = results.publisher(method, config.output / result, accelerator)
        fit(method, batches, config, accelerator, judge, publish)


def check(config: DreamBoothRun, classes: Planned, found: Pictures) -> list[str]:
    """Lines for the plan. Raises UserError for adapters that the base cannot have, or classes that
    cannot go with the pictures."""
    if config.lora:
        adapters.check(config.lora, config.model)
    return [*classes.check(found), *rate_note(config)]


def rate_note(config: DreamBoothRun) -> list[str]:
    """LoRA's rates, left as they were, make every weight forget in a few steps."""
    if config.lora or config.optim.name == "prodigy":
        return []
    parts = {"learning_rate": config.optim.learning_rate}
    if config.dreambooth.text_encoder and (own := config.optim.text_encoder.learning_rate):
        parts["text_encoder.learning_rate"] = own
    return [
        f"note     lora=null trains every weight, at optim.{key}={rate:g}: above "
        f"{HIGHEST_IN_FULL:g} all else is forgotten while the subject is learned; 2e-6 is usual"
        for key, rate in parts.items()
        if rate > HIGHEST_IN_FULL
    ]


def trains_text_encoder(config: DreamBoothRun) -> bool:
    lora = config.lora
    return lora.text_encoder is not None if lora else config.dreambooth.text_encoder


def frozen_base(config: DreamBoothRun, pipeline: Pipeline) -> FrozenBase | None:
    """What predicts the class's targets, if anything does; to be made before training."""
    from train import prior

    if config.dreambooth.prior != "prediction":
        return None
    if config.lora:
        return prior.without_adapters(pipeline)
    return prior.copied(
        pipeline,
        text_encoder=config.dreambooth.text_encoder,
        mixed_precision=config.train.mixed_precision,
    )


class DreamBooth:
    """A subject's pictures beside those of its class (Ruiz et al. 2023): as a LoRA, or all weights
    of the UNet and, with `text_encoder`, of the text encoder.

    The loss is the mean over the subject's pictures plus a weight times the mean over the class's
    (their eq. 2), as the weights of the batches say. Loss weights that depend on the timestep act
    on both alike.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        objective: Objective,
        lora: LoraConfig | None,
        *,
        text_encoder: bool = False,
        prior: FrozenBase | None = None,
        seed: int,
    ) -> None:
        from train.denoiser import Denoiser

        if lora is not None:
            adapters.attach(pipeline, lora, seed=seed)
        else:
            pipeline.unet.requires_grad_(True)
            pipeline.text_encoder.requires_grad_(text_encoder)
        self._pipeline, self._lora = pipeline, lora
        self.model = Denoiser(pipeline.unet, objective, pipeline.text_encoder, prior=prior)

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        from train import optim

        return optim.groups(optim.parts_of(self._pipeline), config)

    def pipeline(self) -> Pipeline:
        return self._pipeline

    def export(self, directory: Path) -> None:
        from train import export

        if self._lora is None:
            export.save_pipeline(self._pipeline, directory)
        else:
            export.save_lora(self._pipeline, directory)
            export.save_scheduler(self._pipeline, directory)


if __name__ == "__main__":
    command(main)

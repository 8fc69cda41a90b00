"""A method in one file: of the UNet only the keys and values of its cross-attention train, which
read the text, as in Custom Diffusion (Kumari et al. 2023, arXiv:2212.04488, section 3.2).

    accelerate launch docs/examples/add_method.py output=runs/toy-cross

The result is OUTPUT/full, a complete diffusers folder. The same command resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from train.config import ROOT, OptimConfig, RunConfig, Section, command, load
from train.plan import plan, start

if TYPE_CHECKING:
    from train.diffusion import Objective
    from train.method import Pipeline


class CrossAttentionConfig(Section):
    projections: list[Literal["to_k", "to_v"]] = Field(["to_k", "to_v"], min_length=1)
    """Which projections of the text train: keys, values or both."""


class CrossAttentionRun(RunConfig):
    cross_attention: CrossAttentionConfig = CrossAttentionConfig()


def main(arguments: list[str]) -> None:
    config = load(CrossAttentionRun, arguments, default=ROOT / "configs/toy/full.yaml")
    planned = plan(config, result="full")
    if planned is None:
        return

    # Heavy imports wait until the run is known to be possible.
    from eval import in_training
    from train import feeding, results
    from train.diffusion import Objective
    from train.loop import fit

    with start(config, planned) as (accelerator, pipeline):
        batches = feeding.batches(planned.pictures, pipeline, config, accelerator)
        pipeline.unet.to(accelerator.device)
        objective = Objective.of(pipeline.scheduler, config.diffusion)
        method = CrossAttention(pipeline, objective, config.cross_attention)
        judge = in_training.judge(planned.scoring, accelerator)
        publish = results.publisher(method, config.output / "full", accelerator)
        fit(method, batches, config, accelerator, judge, publish)


class CrossAttention:
    """The UNet's projections of the text, in fp32; everything else is frozen."""

    def __init__(
        self, pipeline: Pipeline, objective: Objective, config: CrossAttentionConfig
    ) -> None:
        from train.denoiser import Denoiser

        ends = tuple(f"attn2.{name}.weight" for name in config.projections)
        for name, parameter in pipeline.unet.named_parameters():
            parameter.requires_grad_(name.endswith(ends))
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

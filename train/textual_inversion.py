"""Teaches a Stable Diffusion 2 model new words from pictures; with a LoRA, pivotal tuning.

    accelerate launch train/textual_inversion.py     # the embedded toy model and pictures
    accelerate launch train/textual_inversion.py --config configs/textual_inversion.yaml \
        data.path=my/pictures

The result is OUTPUT/adapter: embeddings for diffusers' `load_textual_inversion` and, with a LoRA,
pytorch_lora_weights.safetensors for `load_lora_weights`. The same command resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import adapters, new_tokens
from train.config import ROOT, LoraConfig, OptimConfig, TextualInversionRun, command, load
from train.new_tokens import NewToken
from train.plan import plan, start

if TYPE_CHECKING:
    from train.diffusion import Objective
    from train.method import Pipeline
    from train.pictures import Pictures


def main(arguments: list[str]) -> None:
    config = load(
        TextualInversionRun, arguments, default=ROOT / "configs/toy/textual_inversion.yaml"
    )
    size = estimated_bytes(config)
    planned = plan(config, result="adapter", trainable_bytes=size, check=partial(check, config))
    if planned is None:
        return

    # Heavy imports wait until the run is known to be possible.
    from eval import in_training
    from train import feeding, models, results
    from train.diffusion import Objective
    from train.loop import fit

    with start(config, planned) as (accelerator, pipeline):
        tokens = new_tokens.add(pipeline.tokenizer, config.textual_inversion.tokens)
        batches = feeding.batches(
            planned.pictures, pipeline, config, accelerator, cache_captions=False
        )
        models.store_in(pipeline, config.train, accelerator.device)
        objective = Objective.of(pipeline.scheduler, config.diffusion)
        method = TextualInversion(pipeline, objective, tokens, config.lora, seed=config.seed)
        judge = in_training.judge(planned.scoring, accelerator)
        publish = results.publisher(method, config.output / "adapter", accelerator)
        fit(method, batches, config, accelerator, judge, publish)


def check(config: TextualInversionRun, found: Pictures) -> list[str]:
    """What is learned, for the plan. Raises UserError for a token that the base has already or that
    no caption holds, and for adapters that it cannot have."""
    tokens = config.textual_inversion.tokens
    new_tokens.refuse_known((t.token for t in tokens), new_tokens.vocabulary(config.model))
    if config.textual_inversion.captions == "own":
        new_tokens.check_captions(tokens, found)
    if config.lora is not None:
        adapters.check(config.lora, config.model)
    rate = config.optim.tokens.learning_rate or config.optim.learning_rate
    return [
        f"learns   {token.token} from {token.initial!r} (vectors: {token.vectors or 'as many'}), "
        f"at {rate:g}"
        for token in tokens
    ]


def estimated_bytes(config: TextualInversionRun) -> int:
    """Upper estimate of the fp32 size of what trains on SD 2.1, for the disk preflight."""
    vectors = sum(token.vectors or 75 for token in config.textual_inversion.tokens)
    lora = adapters.estimated_bytes(config.lora) if config.lora else 0
    return vectors * 1024 * 4 + lora


class TextualInversion:
    """New rows of the text encoder's table (Gal et al. 2022) and, with `lora`, adapters beside them
    (pivotal tuning, after Roich et al. 2021); everything else is frozen."""

    def __init__(
        self,
        pipeline: Pipeline,
        objective: Objective,
        tokens: Sequence[NewToken],
        lora: LoraConfig | None,
        *,
        seed: int,
    ) -> None:
        from train import embeddings
        from train.denoiser import Denoiser

        if lora is not None:
            adapters.attach(pipeline, lora, seed=seed)
        self._pipeline, self._tokens, self._lora = pipeline, tokens, lora
        self._embeddings = embeddings.attach(pipeline.text_encoder, tokens)
        self.model = Denoiser(pipeline.unet, objective, pipeline.text_encoder)

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        from train import optim

        parts = adapters.named_parameters(self._pipeline) if self._lora else {}
        return optim.groups({"tokens": [("rows", self._embeddings.rows)], **parts}, config)

    def pipeline(self) -> Pipeline:
        return self._pipeline

    def export(self, directory: Path) -> None:
        from train import embeddings, export

        embeddings.save(self._embeddings, self._tokens, directory)
        if self._lora:
            export.save_lora(self._pipeline, directory)
        export.save_scheduler(self._pipeline, directory)


if __name__ == "__main__":
    command(main)

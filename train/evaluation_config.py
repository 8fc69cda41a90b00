"""The evaluation section of a run's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from train.parsing import Section


class EvaluationConfig(Section):
    path: Path | None = None
    """Held-out folder of captioned pictures: its pictures are the reference and, with
    protocol=held_out, its captions the prompts."""
    protocol: str | None = None
    """What is prompted for: held_out (the captions of evaluation.path), objects or living
    (DreamBooth's 25 prompts for a thing or an animal), style, or a YAML file of prompts. Default:
    held_out where there is an evaluation.path."""
    subject: str | None = None
    """What prompts call the subject, like `zwx dog` or `<my-dog>`; default: as the run's captions
    or tokens do."""
    noun: str | None = None
    """What the subject is one of, like `dog`; default: from the run's class prompt or the token's
    initial words."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP (folder or hub id) for text and picture similarity; not the one the base was built on.
    """
    features: str | None = None
    """What FID and the other distances stand on: an Inception file, or a CLIP, DINO or DINOv2
    folder or hub id; default: evaluation.clip."""
    dino: str | None = None
    """A DINO or DINOv2 folder or hub id for the likeness of subjects; default: none, CLIP alone."""
    resize: Literal["clean", "legacy_tf"] = "clean"
    """How pictures are resized for evaluation.features: antialiased, or as the first FIDs were."""
    images: int = Field(256, ge=2)
    """Pictures generated per model, of protocol=held_out."""
    per_prompt: int = Field(4, ge=1)
    """Pictures of each prompt, of the other protocols."""
    general: list[str] = []
    """Prompts without the subject, for what the model forgot; default: a list of everyday scenes.
    """
    scales: list[float] = []
    """Adapter scales of a sweep, like [0, 0.5, 1]; pictures of some prompts at each."""
    steps: int = Field(25, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    batch_size: int = Field(8, ge=1)
    """Pictures generated at once, per process."""
    seed: int = Field(1_000_000, ge=0, le=2**62)
    """Picture k uses seed + k, for the base and the fine-tuned model alike."""
    every: int = Field(0, ge=0)
    """Optimizer steps between evaluations during training; 0 for none."""
    training_images: int = Field(1000, ge=0)
    """Pictures trained on that the results are compared with, to find copies; evenly chosen where
    there are more, 0 for none."""
    quick_images: int = Field(64, ge=2)
    """Pictures of each evaluation during training."""

    @field_validator("general")
    @classmethod
    def _said_once(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("evaluation.general holds an empty prompt; remove it")
            if prompts.count(prompt) > 1:
                raise ValueError(f"evaluation.general holds {prompt!r} twice; remove one")
        return prompts

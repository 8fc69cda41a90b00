"""What the training benchmark trains, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.config import Section


class TrainSetting(Section):
    """One setting of scripts/benchmark.py train."""

    model: Literal["toy", "small", "full"] = "small"
    """The toy base; SD 2's shape with 8.6 million parameters; SD 2.1's own size."""
    method: Literal["lora", "textual_inversion", "full"] = "lora"
    """What trains."""
    resolution: int = Field(256, ge=64, multiple_of=64)
    """Side of the pictures in pixels."""
    micro_batch: int = Field(4, ge=1)
    """Pictures of one forward pass."""
    micro_batches: int = Field(1, ge=1)
    """Forward passes of one optimizer step."""
    rank: int = Field(8, ge=1)
    """Of the LoRA."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """As train.mixed_precision."""
    compile: Literal["none", "blocks", "graphs"] = "none"
    """As train.compile."""
    checkpointing: bool = False
    """As train.gradient_checkpointing."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """As train.quantize."""
    channels_last: bool = False
    """As train.channels_last."""
    tf32: bool = False
    """As train.tf32."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free"] = "adamw"
    """As optim.name."""
    workers: int = Field(1, ge=0)
    """As data.workers; a second one, on two cores that both train, costs more than it saves."""

    @property
    def batch(self) -> int:
        """Pictures of one optimizer step."""
        return self.micro_batch * self.micro_batches

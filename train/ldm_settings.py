"""What a single file says of itself beside its weights: metadata after ModelSpec, the noise
schedule, and the configuration that web UIs read next to it.

Who reads what (of their sources): diffusers reads the weights alone and takes a `config`. ComfyUI
tells SD 2's prediction type by the spread of one bias. AUTOMATIC1111 and Forge run the UNet on a
constant to tell it, unless NAME.yaml is beside the file; the schedule they take from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.files import write_atomically
from train.config import UserError
from train.families import BaseModel
from train.inspection import read_json
from train.ldm_names import DEPTH, UNET
from train.stored_tensors import Stored, of_tensor

HASH = "modelspec.hash_sha256"
_TELLS_V = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD_OF_V = 0.09  # ComfyUI's threshold, comfy/supported_models.py
# What stands for zero at zero terminal SNR, where samplers divide by it; diffusers' Euler has it.
_ALMOST_ZERO = 2.0**-24
_ZERO_SNR = "rescale_betas_zero_snr"


def modelspec(base: BaseModel, title: str) -> dict[str, str]:
    """The entries of ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec) but for the hash."""
    about = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture(base),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "prediction_type": "v" if base.prediction_type == "v_prediction" else base.prediction_type,
    }
    if base.resolution:
        about["resolution"] = f"{base.resolution}x{base.resolution}"
    return {f"modelspec.{key}": value for key, value in about.items()}


def architecture(base: BaseModel) -> str:
    """ModelSpec's name of a kind of model; depth and inpainting, which it does not list, are named
    after its pattern."""
    kind = {4: "", 5: "-depth", 9: "-inpainting"}[base.family.channels]
    v = base.prediction_type == "v_prediction"
    if base.family.generation == 1:
        return f"stable-diffusion-v1{'-v' if v else ''}{kind}"
    return f"stable-diffusion-v2-{'768-v' if v else '512'}{kind}"


def schedule(folder: Path) -> dict[str, Stored]:
    """The noise schedule as the layout has it, fp32 (timesteps,): what samplers read of it."""
    import torch
    from diffusers import DDIMScheduler

    settings = _scheduler(folder)
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    try:
        scheduler: Any = DDIMScheduler(
            **{key: settings[key] for key in (*kept, _ZERO_SNR) if key in settings}
        )
    except NotImplementedError:
        raise UserError(
            f"{folder / 'scheduler'}: beta_schedule={settings.get('beta_schedule')} is not known"
        ) from None
    alphas = scheduler.alphas_cumprod.float().clamp(min=_ALMOST_ZERO)
    tensors = {
        "betas": scheduler.betas.float(),
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": torch.cat([torch.ones(1), alphas[:-1]]),
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
    }
    return {name: of_tensor(tensor) for name, tensor in tensors.items()}


def notes(folder: Path, base: BaseModel, tensors: Mapping[str, Stored]) -> list[str]:
    """What ComfyUI will take the file for that it is not, and what to do about it there."""
    found = []
    says_v = False
    if base.family.generation == 2 and base.family.channels == 4 and _TELLS_V in tensors:
        says_v = float(tensors[_TELLS_V].read().float().std(correction=0)) > _SPREAD_OF_V
    is_v = base.prediction_type == "v_prediction"
    if says_v != is_v and (_TELLS_V in tensors or base.family.generation == 1):
        wanted = "v_prediction" if is_v else "eps"
        found.append(f"ComfyUI will guess its prediction type wrong: {_node(wanted)}")
    if _scheduler(folder).get(_ZERO_SNR):
        found.append(f"ComfyUI will not see its zero terminal SNR: {_node('zsnr on')}")
    if base.family.depth and not any(name.startswith(DEPTH) for name in tensors):
        found.append("AUTOMATIC1111 finds no depth estimator in the file, and downloads MiDaS")
    return found


def _node(setting: str) -> str:
    return f"put ModelSamplingDiscrete with {setting} behind the loader there"


def write_yaml(folder: Path, base: BaseModel, file: Path) -> None:
    """Writes the configuration that AUTOMATIC1111 and Forge read of `NAME.yaml` beside NAME; none
    for SD 1 that predicts noise, which is what they take a file for anyway."""
    if base.family.generation == 1 and base.prediction_type == "epsilon":
        file.unlink(missing_ok=True)  # of another model that stood here
        return
    text = yaml.safe_dump(configuration(folder, base), sort_keys=False)
    head = f"# Belongs to {file.stem}.safetensors: what it is, for AUTOMATIC1111 and Forge.\n"
    write_atomically(file, (head + text).encode())


def configuration(folder: Path, base: BaseModel) -> dict[str, Any]:
    """A model's settings as the authors' code (ldm.util.instantiate_from_config) takes them."""
    scheduler, vae = _scheduler(folder), _config(folder, "vae")
    target = {4: "LatentDiffusion", 5: "LatentDepth2ImageDiffusion", 9: "LatentInpaintDiffusion"}
    parameters = {
        "linear_start": scheduler.get("beta_start", 0.00085),
        "linear_end": scheduler.get("beta_end", 0.012),
        "timesteps": base.timesteps,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": (base.resolution or 512) // 8,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn" if base.family.channels == 4 else "hybrid",
        "monitor": "val/loss_simple_ema",
        "scale_factor": vae.get("scaling_factor", 0.18215),
        "use_ema": False,
        "parameterization": {"v_prediction": "v", "sample": "x0"}.get(base.prediction_type, "eps"),
        **_beside_the_text(base),
        "unet_config": _unet(_config(folder, "unet")),
        "first_stage_config": _vae(vae),
        "cond_stage_config": _text(base),
    }
    name = f"ldm.models.diffusion.ddpm.{target[base.family.channels]}"
    return {"model": {"target": name, "params": parameters}}


def _beside_the_text(base: BaseModel) -> dict[str, Any]:
    if base.family.channels == 4:
        return {}
    midas = {
        "target": "ldm.modules.midas.api.MiDaSInference",
        "params": {"model_type": "dpt_hybrid"},
    }
    return {"finetune_keys": None} | ({"depth_stage_config": midas} if base.family.depth else {})


def _unet(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = config["block_out_channels"]
    attending = ["CrossAttn" in kind for kind in config["down_block_types"]]
    parameters = {
        "use_checkpoint": False,
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "attention_resolutions": [2**i for i, attends in enumerate(attending) if attends][::-1],
        "num_res_blocks": config.get("layers_per_block", 2),
        "channel_mult": [width // channels[0] for width in channels],
        **_heads(config),
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection")),
        "transformer_depth": 1,
        "context_dim": config["cross_attention_dim"],
        "legacy": False,
    }
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": parameters,
    }


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Diffusers' `attention_head_dim` is the number of heads, in every block or in each."""
    heads = config["attention_head_dim"]
    if isinstance(heads, int):
        return {"num_heads": heads}
    return {"num_head_channels": config["block_out_channels"][0] // heads[0]}


def _vae(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = config["block_out_channels"]
    network = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    parameters = {
        "embed_dim": config["latent_channels"],
        "monitor": "val/rec_loss",
        "ddconfig": network,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": parameters}


def _text(base: BaseModel) -> dict[str, Any]:
    encoders = "ldm.modules.encoders.modules."
    if base.family.generation == 1:
        return {"target": f"{encoders}FrozenCLIPEmbedder"}
    parameters = {"freeze": True, "layer": "penultimate"}
    return {"target": f"{encoders}FrozenOpenCLIPEmbedder", "params": parameters}


def _scheduler(folder: Path) -> dict[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file, "the scheduler has no configuration")


def _config(folder: Path, part: str) -> dict[str, Any]:
    return read_json(folder / part / "config.json", f"{part} has no configuration")

"""Tiny models beside the base, with random weights: a ControlNet, a depth estimator, the x4
upscaler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
)
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from tests.tiny import tiny_pipeline


def tiny_controlnet(seed: int = 0) -> ControlNetModel:
    """One for `tiny_pipeline`, whose zero convolutions have been trained."""
    torch.manual_seed(seed)
    pipeline = tiny_pipeline(family="sd21-base")
    control = ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    for name, parameter in control.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return control


def tiny_estimator(folder: Path, processor: str = "DPTImageProcessorPil") -> None:
    """Gives a depth base's folder a depth estimator, as SD 2's has one; processor: what its
    model_index.json calls the processor."""
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(folder / "depth_estimator")
    size = {"height": 32, "width": 32}
    DPTImageProcessorPil(size=size).save_pretrained(folder / "feature_extractor")
    index = folder / "model_index.json"
    parts = {
        "depth_estimator": ["transformers", "DPTForDepthEstimation"],
        "feature_extractor": ["transformers", processor],
    }
    index.write_text(json.dumps(json.loads(index.read_text()) | parts))


def tiny_upscaler() -> Any:
    """The x4 upscaler in shape: 7 channels, a numbered noise level, a VAE of 4x."""
    base = tiny_pipeline(family="sd21-base")
    unet = UNet2DConditionModel.from_config(
        base.unet.config, in_channels=7, num_class_embeds=50, sample_size=32
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.08333,
    )
    pipeline: Any = StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=base.scheduler,
        max_noise_level=49,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

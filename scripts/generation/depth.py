"""Depth as the base's own estimator sees it, for pictures that come without a depth map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from train.config import ModelConfig, UserError
from train.inspection import from_hub

_PARTS = ("depth_estimator", "feature_extractor")


class Estimator:
    """The depth model of a depth base, with what prepares its input; in fp32."""

    def __init__(self, model: ModelConfig) -> None:
        """Raises UserError for a base that has none."""
        import transformers

        folder = _folder(model)
        try:
            self._model = transformers.AutoModelForDepthEstimation.from_pretrained(
                folder / _PARTS[0], use_safetensors=True, trust_remote_code=False
            ).eval()
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                folder / _PARTS[1], backend="pil", trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _without(model, reason) from None

    def to(self, device: Any) -> Estimator:
        self._model.to(device)
        return self

    def estimate(self, pixels: np.ndarray) -> np.ndarray:
        """Inverse depth, float32 (h, w), of pixels uint8 (H, W, 3)."""
        import torch
        from PIL import Image

        inputs = self._processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
        with torch.inference_mode():
            depth = self._model(inputs.to(self._model.device)).predicted_depth
        return depth[0].float().cpu().numpy()


def check(model: ModelConfig) -> None:
    """Raises UserError for a base without a depth estimator in safetensors, before it is loaded."""
    if Path(model.path).exists():
        _folder(model)


def _folder(model: ModelConfig) -> Path:
    folder = Path(model.path)
    if folder.is_file():
        raise _without(model, "a single file has none")
    if not folder.is_dir():
        wanted = [f"{part}/*.{end}" for part in _PARTS for end in ("json", "safetensors")]
        folder = from_hub(model.path, model.revision, wanted)
    for part, end in zip(_PARTS, ("safetensors", "json"), strict=True):
        if not any((folder / part).glob(f"*.{end}")):
            raise _without(model, f"{part}/ holds no .{end}")
    return folder


def _without(model: ModelConfig, reason: str) -> UserError:
    return UserError(
        f"model.path={model.path} cannot estimate depth ({reason}): give depth=FILE, a depth map "
        "of the picture as scripts/depth.py makes them"
    )

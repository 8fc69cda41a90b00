"""DINO and DINOv2 as extractors: the class token after the last normalisation.

Self-supervised, they tell one dog from another where CLIP sees dogs: hence DINO ViT-S/16 in the
DreamBooth protocol (Ruiz et al., 2022, arXiv:2208.12242, section 4.2; Caron et al., 2021,
arXiv:2104.14294; Oquab et al., 2023, arXiv:2304.07193).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.model_folder import hash_files, kind_of, load, weight_files
from eval.networks import Network, levels, settings_of
from eval.resizing import Input, Mode
from train.config import UserError

if TYPE_CHECKING:
    import torch

CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


class VisionExtractor(Network):
    """The class token (d,) of a vision transformer."""

    def __init__(
        self, folder: Path, *, name: str, device: str | torch.device, resize: Mode = "clean"
    ) -> None:
        import transformers

        kind = kind_of(folder)
        # A pooler is another layer, that DINO was not trained with.
        plain: dict[str, Any] = {"add_pooling_layer": False} if kind == "vit" else {}
        model = load(getattr(transformers, CLASSES[kind]), folder, **plain)
        self.model: Any = model.to(device)
        reads = _read(folder, resize)
        # DINOv2 fits its positions to the picture always, and takes no such argument.
        other_size = kind == "vit" and reads.side != model.config.image_size
        self._options = {"interpolate_pos_encoding": True} if other_size else {}
        super().__init__(
            name=name,
            fingerprint=hash_files(weight_files(folder)),
            reads=reads,
            dimension=model.config.hidden_size,
            device=device,
            settings=settings_of(model.config),
        )

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels, **self._options).last_hidden_state[:, 0]


def _read(folder: Path, resize: Mode) -> Input:
    """As the folder's image processor has it, but that nothing is cropped."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(
        folder, backend="pil", trust_remote_code=False
    )
    crops = getattr(processor, "do_center_crop", False) and processor.crop_size is not None
    size = processor.crop_size if crops else processor.size
    height, width = (size[key] or size["shortest_edge"] for key in ("height", "width"))
    if not height or height != width:
        raise UserError(
            f"{folder / 'preprocessor_config.json'} names no square to resize pictures to: give it "
            "a size or crop_size with an equal height and width"
        )
    if not processor.do_normalize:
        return Input(height, resize, (0.0,) * 3, (255.0,) * 3)
    return Input(height, resize, levels(processor.image_mean), levels(processor.image_std))

"""Image and text embeddings by a local CLIP folder: what FID and the CLIP score stand on.

How a picture is resized is part of the metric, so it is done here and named in `Extractor.resize`:
the whole picture is squashed to CLIP's square input by PIL's bicubic filter on floats, antialiased
and not requantised (the `clean` convention of Parmar et al., 2022, arXiv:2104.11222). CLIP's own
preprocessing crops the centre instead, and would not see the ends of a tall or a wide picture.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.config import UserError

if TYPE_CHECKING:
    import torch

Picture = np.ndarray | str | Path


class Extractor:
    """A CLIP model as a function from pictures or texts to projected, un-normalised embeddings.

    `name`: folder or hub id; `fingerprint`: sha256 of its weights; `resize`: the convention above
    with its size in pixels; `dimension`: d; `max_tokens`: longer texts are cut.
    """

    def __init__(self, folder: Path, *, name: str, device: str | torch.device) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.name, self.fingerprint = name, _hash_weights(folder)
        self.model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True)
        self.model = self.model.float().eval().requires_grad_(False).to(device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
        processor: Any = CLIPImageProcessorPil.from_pretrained(folder)
        self.mean, self.std = np.float32(processor.image_mean), np.float32(processor.image_std)
        self.side: int = self.model.config.vision_config.image_size
        self.resize = f"clean bicubic, squashed to {self.side}x{self.side}"
        self.dimension: int = self.model.config.projection_dim
        self.max_tokens: int = self.model.config.text_config.max_position_embeddings

    def describe(self) -> dict[str, Any]:
        """What must agree for two evaluations to be compared."""
        return {
            "name": self.name,
            "sha256": self.fingerprint,
            "resize": self.resize,
            "dimension": self.dimension,
        }

    def images(self, pictures: Iterable[Picture], *, batch_size: int = 32) -> np.ndarray:
        """Embeddings (N, d), float64, of uint8 RGB arrays (H, W, 3) or of image files, any size.

        An iterable is read a batch at a time, so the pictures need not fit in memory together.
        """
        return self._embed(pictures, self._image_batch, batch_size)

    def texts(self, texts: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Embeddings (N, d), float64, of texts; each is cut to `max_tokens` tokens."""
        return self._embed(texts, self._text_batch, batch_size)

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than CLIP reads."""
        if not texts:
            return 0
        tokens = self.tokenizer(list(texts), truncation=False, verbose=False).input_ids
        return sum(len(ids) > self.max_tokens for ids in tokens)

    def _embed(self, items: Iterable[Any], embed: Any, batch_size: int) -> np.ndarray:
        import torch

        rest, outputs = iter(items), [np.empty((0, self.dimension))]
        with torch.inference_mode():
            while batch := list(islice(rest, batch_size)):
                outputs.append(embed(batch).double().cpu().numpy())
        return np.concatenate(outputs)

    def _image_batch(self, pictures: Sequence[Picture]) -> torch.Tensor:
        import torch

        pixels = np.stack([self._prepare(picture) for picture in pictures])  # (B, 3, side, side)
        tensor = torch.from_numpy(pixels).to(self.model.device)
        return self.model.get_image_features(pixel_values=tensor).pooler_output

    def _text_batch(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        return self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output

    def _prepare(self, picture: Picture) -> np.ndarray:
        pixels = picture if isinstance(picture, np.ndarray) else read_rgb(picture)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, pixels.shape
        unit = squash(pixels, self.side) / np.float32(255)
        return ((unit - self.mean) / self.std).transpose(2, 0, 1)


def load_extractor(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """The extractor in a local folder or hub id: a transformers CLIP, in safetensors."""
    return Extractor(find_extractor(path).resolve(), device=device, name=str(path))


def find_extractor(path: str | Path) -> Path:
    """Its local folder, downloaded if a hub id; UserError for what cannot be an extractor."""
    folder = Path(path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
            raise UserError(
                f"no CLIP folder at {path}: give the folder of a CLIP model or a hub id"
            )
        folder = _download(str(path))
    _check_folder(folder)
    return folder


def squash(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) to float32 (side, side, 3) in [0, 255], the whole picture, antialiased."""
    from PIL import Image

    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = [channel.resize((side, side), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1).clip(0, 255)


def read_rgb(path: str | Path) -> np.ndarray:
    """An image file as uint8 (H, W, 3)."""
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def _check_folder(folder: Path) -> None:
    needed = ("config.json", "preprocessor_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: save CLIPModel, CLIPImageProcessorPil and "
            "CLIPTokenizer into one folder"
        )
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise UserError(f"{folder} has no tokenizer: save its CLIPTokenizer there")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise UserError(f"{folder} holds a model of type {kind!r}, expected 'clip'")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no .safetensors weights: re-save it as safetensors")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{hub_id} is neither a CLIP folder here nor a hub id that can be fetched ({reason}): "
            "give a local folder"
        ) from None


def _hash_weights(folder: Path) -> str:
    """What `cat *.safetensors | sha256sum` prints."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()

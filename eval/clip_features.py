"""A CLIP as an extractor (Radford et al., 2021, arXiv:2103.00020).

CLIP's own preprocessing crops the centre, and would not see the ends of a tall or a wide picture;
here the whole picture is squashed (see eval/resizing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.model_folder import hash_files, load, weight_files
from eval.networks import Network, levels, rows, settings_of, stacked
from eval.resizing import Input, Mode

if TYPE_CHECKING:
    import torch


class ClipExtractor(Network):
    """Projected, un-normalised embeddings of pictures and of texts, in one space.

    `max_tokens`: longer texts are cut.
    """

    def __init__(
        self, folder: Path, *, name: str, device: str | torch.device, resize: Mode = "clean"
    ) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        model = load(CLIPModel, folder)
        self.model: Any = model.to(device)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        processor: Any = CLIPImageProcessorPil.from_pretrained(folder)
        side = model.config.vision_config.image_size
        super().__init__(
            name=name,
            fingerprint=hash_files(weight_files(folder)),
            reads=Input(side, resize, levels(processor.image_mean), levels(processor.image_std)),
            dimension=model.config.projection_dim,
            device=device,
            settings=settings_of(model.config),
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (N, d), float64, of texts; each is cut to `max_tokens` tokens."""
        if not texts:
            return np.empty((0, self.dimension))
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.max_tokens, truncation=True
        )
        pairs = np.stack([tokens.input_ids, tokens.attention_mask], axis=1)  # (N, 2, max_tokens)
        found = rows(pairs, np.asarray, self._embed_texts, self.device)
        return stacked(found, self.dimension)

    def count_cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than CLIP reads."""
        if not texts:
            return 0
        tokens = self.tokenizer(list(texts), truncation=False, verbose=False).input_ids
        return sum(len(ids) > self.max_tokens for ids in tokens)

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        ids, mask = tokens.unbind(dim=1)
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

"""Models of transformers that put pictures into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data import counter
from train.config import RunFailed, UserError

if TYPE_CHECKING:
    import torch

ENCODER_DECODER = "vision-encoder-decoder"  # a family without a processor of its own
CHAT_PROMPT = "Describe this picture in one sentence."


def check_model(model: str) -> None:
    """Raises UserError for what cannot be a model of transformers, before anything is loaded."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model={model} has no config.json: give a model's own folder")
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"model={model} has no .safetensors file. Pickled weights can run code when loaded "
                "and are refused: save the model as safetensors"
            )
    elif folder.exists() or folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise UserError(
            f"model={model}: no such folder. Give a model's folder, or a hub id like "
            "Salesforce/blip-image-captioning-base"
        )


@dataclass(frozen=True)
class Captioner:
    """A model that writes about pictures, with what makes its input of them."""

    model: Any
    processor: Any
    """Makes the input of pictures and prompt; for a vision-encoder-decoder, of pictures alone."""
    tokenizer: Any
    name: str
    """As the user gave it."""

    @classmethod
    def load(
        cls, name: str, *, revision: str | None = None, dtype: torch.dtype, device: torch.device
    ) -> Captioner:
        """From a folder or the hub: safetensors only, and no code of the model's own.

        Raises UserError where it cannot be had, or is no model that writes about pictures.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        library: Any = AutoModelForImageTextToText
        try:
            model, info = library.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
            if model.config.model_type == ENCODER_DECODER:
                processor = _image_processor(name, where)
                tokenizer = AutoTokenizer.from_pretrained(name, **where)
            else:
                processor = _processor(name, where)
                tokenizer = processor.tokenizer
        except Exception as error:  # from missing files to weights that do not fit
            raise UserError(_not_loaded(name, error)) from None
        if info["missing_keys"]:
            raise UserError(
                f"model={name} lacks weights ({min(info['missing_keys'])} and the like), so it was "
                "not trained to write about pictures: choose one that was"
            )
        if not model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # what is written goes on where the prompt ends
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model.to(device).eval(), processor, tokenizer, name)

    def caption(
        self,
        images: Sequence[Image.Image],
        ids: Sequence[str],
        *,
        prompt: str = "",
        max_new_tokens: int = 50,
        beams: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """What the model writes about each picture after the prompt, white space made single.

        `images` are RGB. temperature: 0 takes the likeliest token each time; above it, tokens are
        drawn, for each picture as a function of (seed, id), whatever else is in the batch. Raises
        RunFailed where the memory does not suffice.
        """
        import torch

        inputs = self._inputs(images, prompt)
        try:
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    num_beams=beams,
                    do_sample=False,
                    logits_processor=_drawing(temperature, seed, ids) if temperature else None,
                )
        except torch.OutOfMemoryError:
            raise RunFailed(
                f"the memory does not suffice for {len(images)} pictures at once: lower "
                "batch_size, or use precision=bf16; the same command goes on where it was"
            ) from None
        given = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        written = self.tokenizer.batch_decode(
            tokens[:, _prompt_length(tokens, given) :], skip_special_tokens=True
        )
        return [" ".join(text.split()) for text in written]

    def _inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        try:
            inputs = dict(self._processed(list(images), prompt))
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            how = f"with prompt={prompt!r}" if prompt else "without a prompt"
            raise UserError(
                f"model={self.name} does not take pictures {how} ({_first_line(error)}): give the "
                "prompt that its documentation names"
            ) from None
        dtype, device = self.model.dtype, self.model.device
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def _processed(self, images: list[Image.Image], prompt: str) -> Any:
        if self.model.config.model_type == ENCODER_DECODER:
            inputs = self.processor(images, return_tensors="pt")
            if prompt:
                inputs["decoder_input_ids"] = self.tokenizer(
                    [prompt] * len(images), add_special_tokens=False, return_tensors="pt"
                ).input_ids
            return inputs
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(
                [_chat(image, prompt or CHAT_PROMPT) for image in images],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        text = {"text": [prompt] * len(images), "padding": True} if prompt else {}
        inputs = self.processor(images=images, return_tensors="pt", **text)
        if prompt and self.model.config.model_type == "git":
            # Its tokenizer ends the prompt, and it would write after an end.
            for key in ("input_ids", "attention_mask"):
                inputs[key] = inputs[key][:, :-1]
        return inputs


def _processor(name: str, where: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(name, **where)
    # Of the two kinds the one that is always there, so that captions do not depend on what else
    # happens to be installed.
    processor.image_processor = _image_processor(name, where)
    return processor


def _image_processor(name: str, where: dict[str, Any]) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(name, backend="pil", **where)


def _chat(image: Image.Image, prompt: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def _drawing(temperature: float, seed: int, ids: Sequence[str]) -> Any:
    """Makes taking the likeliest token a draw from softmax(scores / temperature).

    The Gumbel-max trick (Gumbel 1954): the argmax of scores / temperature + Gumbel noise is such a
    draw. The library's own sampling is a function of the batch and of the global generator.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class Drawing(LogitsProcessor):
        def __init__(self) -> None:
            self._generators = [counter.generator(seed, "captioner", id) for id in ids]

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            noise = np.stack([rows.gumbel(size=scores.shape[-1]) for rows in self._generators])
            return scores.float() / temperature + torch.from_numpy(noise).to(scores)

    return LogitsProcessorList([Drawing()])


def _prompt_length(tokens: torch.Tensor, given: torch.Tensor | None) -> int:
    """How many of the tokens are the prompt's: models differ in whether they repeat it.

    BLIP repeats it without its last token, and another than its first; a vision-encoder-decoder
    may put one before it.
    """
    if given is None:
        return 0
    length = given.shape[1]
    for start, end, into in ((0, length, 0), (1, length - 1, 1), (0, length, 1)):
        part = given[:, start:end]
        if part.numel() and part.equal(tokens[:, into : into + end - start]):
            return into + end - start
    return 0


def _not_loaded(name: str, error: Exception) -> str:
    reason = _first_line(error)
    if "torchvision" in str(error) or "VIDEO_PROCESSOR" in str(error):
        reason = "its processor reads videos too, which needs torchvision"
    return (
        f"model={name} could not be loaded as a model that writes about pictures: {reason}. Check "
        "the name and the network, or choose another, such as a BLIP, BLIP-2 or GIT"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__

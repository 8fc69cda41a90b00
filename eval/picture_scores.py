"""Scores of training pictures by local models: aesthetic, likeness to the caption, and NSFW.

The published filters of LAION: an aesthetic predictor on CLIP's image embedding (threshold 4.5 in
Stable Diffusion 2's own training set), the cosine between CLIP's embeddings of picture and caption,
and a classifier's probability. Pictures are cut to their middle square before CLIP sees them, as
CLIP's own preprocessing does, so that published thresholds hold.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.files import Progress, silent
from data.images import Colour, open_image
from data.records import Record
from eval.clip_features import ClipExtractor
from train.config import UserError

READERS = min(8, os.cpu_count() or 1)
FILE = "scores.jsonl"

Pixels = np.ndarray  # uint8 (H, W, 3)


class Scorer(Protocol):
    """A number for each picture. `name` is the column's; `fingerprint` names all that it depends
    on but the picture and, where `reads_captions`, its captions."""

    name: str
    fingerprint: str
    side: int
    reads_captions: bool

    def score(self, pictures: Sequence[Pixels], captions: Sequence[tuple[str, ...]]) -> Any: ...


class Aesthetic:
    """LAION's predictor: a linear map, or a few, of the normalised embedding; about 1 to 10."""

    name, reads_captions = "aesthetic", False

    def __init__(self, extractor: ClipExtractor, head: Path, *, relu: bool = False) -> None:
        self._extractor, self.side, self._relu = extractor, extractor.side, relu
        self._layers = read_head(head, extractor.dimension)
        digest = hashlib.sha256(head.read_bytes()).hexdigest()
        self.fingerprint = _fingerprint(self.name, extractor.fingerprint, digest, str(relu))

    def score(self, pictures: Sequence[Pixels], captions: Sequence[tuple[str, ...]]) -> np.ndarray:
        values = _unit(self._extractor.images(map(middle, pictures)))
        for number, (weight, bias) in enumerate(self._layers):
            values = values @ weight.T + bias
            if self._relu and number < len(self._layers) - 1:
                values = np.maximum(values, 0)
        return values[:, 0]


class CaptionLikeness:
    """The cosine between CLIP's embeddings of picture and caption; of several captions the mean."""

    name, reads_captions = "clip", True

    def __init__(self, extractor: ClipExtractor) -> None:
        self._extractor, self.side = extractor, extractor.side
        self.fingerprint = _fingerprint(self.name, extractor.fingerprint)

    def score(self, pictures: Sequence[Pixels], captions: Sequence[tuple[str, ...]]) -> np.ndarray:
        seen = _unit(self._extractor.images(map(middle, pictures)))
        texts = [text for several in captions for text in several]
        owner = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
        likeness = (seen[owner] * _unit(self._extractor.texts(texts))).sum(axis=1)
        return np.bincount(owner, likeness) / np.bincount(owner)


class Nsfw:
    """A picture classifier's probability of one label."""

    name, reads_captions = "nsfw", False

    def __init__(self, model: str, *, label: str | None, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                model, backend="pil", trust_remote_code=False
            )
            self._model: Any = AutoModelForImageClassification.from_pretrained(
                model, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"nsfw.model={model} cannot be loaded ({reason}): give the folder of an image "
                "classifier in safetensors, with its preprocessor_config.json, or its hub id"
            ) from None
        self._model.float().eval().to(device)
        self._class = find_label(self._model.config.id2label, label)
        size = getattr(self._model.config, "image_size", 224)
        self.side = max(size) if isinstance(size, list | tuple) else int(size)
        self.fingerprint = _fingerprint(self.name, _hash_state(self._model), str(self._class))

    def score(self, pictures: Sequence[Pixels], captions: Sequence[tuple[str, ...]]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            inputs = self._processor(images=list(pictures), return_tensors="pt")
            logits = self._model(**inputs.to(self._model.device)).logits
        return logits.double().softmax(dim=-1)[:, self._class].cpu().numpy()


def find_label(labels: dict[int, str], wanted: str | None) -> int:
    """The class of this label; without one, of the only label with "nsfw" in it."""
    found = [
        int(number)
        for number, label in labels.items()
        if (label == wanted if wanted is not None else "nsfw" in label.lower())
    ]
    if len(found) != 1:
        said = f"nsfw.label={wanted}" if wanted is not None else 'a label with "nsfw" in it'
        raise UserError(
            f"{said} is not among the classifier's labels ({', '.join(labels.values())}): give "
            "nsfw.label one of them"
        )
    return found[0]


def read_head(file: Path, dimension: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The weights (out, in) and biases (out,) of the predictor's linear maps, first to last.

    From .safetensors, or from .pth, of which nothing but tensors is read. Raises UserError where
    they do not lead from `dimension` numbers to one.
    """
    tensors = _read_tensors(file)
    names = [name for name in tensors if name.rpartition(".")[2] == "weight"]
    names.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
    layers = [(tensors[name], tensors.get(f"{name[:-6]}bias", np.zeros(1))) for name in names]
    sizes = [dimension, *(len(weight) for weight, _ in layers)]
    inputs = [weight.shape[1] if weight.ndim == 2 else 0 for weight, _ in layers]
    if not layers or inputs != sizes[:-1] or sizes[-1] != 1:
        shapes = ", ".join(f"{name} {tensors[name].shape}" for name in names) or "no weights"
        raise UserError(
            f"aesthetic.head={file} does not lead from the CLIP model's {dimension} numbers to one "
            f"({shapes}): give the head that was trained on this CLIP (aesthetic.clip)"
        )
    return layers


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file

    from train.safetensors_file import read_header

    try:
        if file.suffix == ".safetensors":
            read_header(file)
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.double().numpy() for name, tensor in tensors.items()}
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(
            f"aesthetic.head={file} cannot be read ({str(error).strip().splitlines()[0]}): give "
            "the predictor's weights as .safetensors, or as a .pth of nothing but tensors"
        ) from None


def middle(pixels: Pixels) -> Pixels:
    """The middle square."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


# Scoring -------------------------------------------------------------------------------------


def score_all(
    records: Sequence[Record],
    scorers: Sequence[Scorer],
    folder: Path,
    *,
    background: Colour,
    batch_size: int,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Each scorer's numbers, float64 (n,), by its name.

    folder/scores.jsonl keeps every number under the hash of the picture's bytes, its captions and
    the model, batch by batch: what is known is not computed again. A picture is decoded once for
    all scorers that want it.
    """
    known = _read_known(folder / FILE)
    keys = [[_key(record, scorer, background) for scorer in scorers] for record in records]
    wanted = [k for k, own in enumerate(keys) if not all(key in known for key in own)]
    done = len(records) - len(wanted)
    side = max((scorer.side for scorer in scorers), default=1)
    with ThreadPoolExecutor(READERS) as pool, _appending(folder / FILE) as file:
        rest = iter(wanted)
        while batch := list(islice(rest, batch_size)):
            load = _loader(records, background, side)
            pictures = dict(zip(batch, pool.map(load, batch), strict=True))
            for at, scorer in enumerate(scorers):
                some = [k for k in batch if keys[k][at] not in known]
                found = _score(scorer, [pictures[k] for k in some], [records[k] for k in some])
                for k, value in zip(some, found, strict=True):
                    known[keys[k][at]] = value
                    file.write(json.dumps({"key": keys[k][at], "value": value}) + "\n")
            file.flush()
            done += len(batch)
            progress(done, len(records))
    return {
        scorer.name: np.array([known[own[at]] for own in keys], np.float64)
        for at, scorer in enumerate(scorers)
    }


def _loader(records: Sequence[Record], background: Colour, side: int) -> Callable[[int], Pixels]:
    def load(k: int) -> Pixels:
        content = records[k].read()
        if hashlib.sha256(content).hexdigest() != records[k].sha256:
            raise UserError(f"{records[k].id} was changed while it was being read: run this again")
        image = open_image(io.BytesIO(content), background, cover=(side, side))
        shortest = min(image.size)
        if shortest > 4 * side:  # a large picture that cannot be decoded at a fraction
            image.thumbnail((10**6, 4 * side) if image.height == shortest else (4 * side, 10**6))
        return np.asarray(image)

    return load


def _score(
    scorer: Scorer, pictures: Sequence[Pixels], records: Sequence[Record]
) -> Iterator[float]:
    if pictures:
        values = scorer.score(pictures, [record.captions for record in records])
        yield from (float(value) for value in values)


def _appending(file: Path) -> io.TextIOWrapper:
    try:
        stream = file.open("a+b")
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                stream.write(b"\n")  # the torn line before it then stays a line of its own
        return io.TextIOWrapper(stream, encoding="ascii")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def _read_known(file: Path) -> dict[str, float]:
    known: dict[str, float] = {}
    if not file.exists():
        return known
    with file.open("rb") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                known[str(entry["key"])] = float(entry["value"])
            except (ValueError, KeyError, TypeError):
                continue  # a line that was torn when a run was broken off
    return known


def _key(record: Record, scorer: Scorer, background: Colour) -> str:
    captions = record.captions if scorer.reads_captions else ()
    return _fingerprint(record.sha256, scorer.fingerprint, str(background), *captions)[:32]


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()


def _hash_state(model: Any) -> str:
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

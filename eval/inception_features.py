"""The FID-Inception as an extractor, from a state dict or a TorchScript file.

The well-known files are pt_inception-2015-12-05-6726825d.pth (a state dict, of pytorch-fid and
torch-fidelity) and inception-2015-12-05.pt (TorchScript, of StyleGAN): both are the TensorFlow
graph of 2015. Neither is downloaded here.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.model_folder import hash_files
from eval.networks import Network
from eval.resizing import Input, Mode
from train.config import UserError

if TYPE_CHECKING:
    import torch


SUFFIXES = (".pt", ".pth", ".safetensors")
FILES = "pt_inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt"
CONVENTION = "softmax of the 1,008 logits without the bias (torch-fidelity's logits_unbiased)"


class InceptionExtractor(Network):
    """Features (2048,) of the last pooling layer."""

    def __init__(
        self, file: Path, *, name: str, device: str | torch.device, resize: Mode = "clean"
    ) -> None:
        from eval.inception import FEATURES, MEAN, SIDE, STD

        weight: torch.Tensor
        self._layers, weight = _read_script(file) if is_script(file) else _read_network(file)
        self._layers.to(device)
        self._weight = weight.detach().double().cpu().numpy()  # (1008, 2048)
        super().__init__(
            name=name,
            fingerprint=hash_files([file]),
            reads=Input(SIDE, resize, (MEAN,) * 3, (STD,) * 3),
            dimension=FEATURES,
            device=device,
        )

    def classes(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities (N, 1008), float64, from features (N, 2048): the CONVENTION of the
        published inception score (Salimans et al., 2016, arXiv:1606.03498)."""
        logits = [self._weight @ row for row in features]  # one by one: see eval/networks.py
        probabilities = np.array(logits).reshape(-1, len(self._weight))
        probabilities -= probabilities.max(axis=1, keepdims=True)
        np.exp(probabilities, out=probabilities)
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        # Or TorchScript may fuse layers from the third call on, and round otherwise than before.
        with torch.jit.optimized_execution(False):
            return self._layers(pixels).flatten(start_dim=1)


def check(file: Path) -> None:
    """UserError where it is not the FID-Inception."""
    if is_script(file):
        _read_script(file)
    else:
        _check_state(file, _read_state(file))


def is_script(file: Path) -> bool:
    """Whether it is TorchScript, which carries its code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_network(file: Path) -> tuple[Any, Any]:
    from eval.inception import Inception

    state = _read_state(file)
    _check_state(file, state)
    network = Inception()
    counters = {name: t for name, t in network.state_dict().items() if _is_counter(name)}
    network.load_state_dict(counters | state)
    network.float().eval().requires_grad_(False)
    return network, network.fc.weight


def _read_script(file: Path) -> tuple[Any, Any]:
    import torch

    from eval.inception import CLASSES, FEATURES

    try:
        script = torch.jit.load(file, map_location="cpu").float().eval()
        weight = dict(script.named_parameters())["output.weight"]
        layers = script.layers
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(
            f"{file} is TorchScript, but not of the FID-Inception ({_reason(error)}): give {FILES}"
        ) from None
    if tuple(weight.shape) != (CLASSES, FEATURES):
        raise UserError(
            f"{file} has {weight.shape[0]} classes on {weight.shape[1]} features, where the "
            f"FID-Inception has {CLASSES} on {FEATURES}: give {FILES}"
        )
    return layers, weight


def _read_state(file: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    from train.safetensors_file import read_header

    try:
        if file.suffix == ".safetensors":
            read_header(file)
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor for name, tensor in state.items() if tensor.ndim >= 0}
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(
            f"{file} cannot be read as the weights of a network ({_reason(error)}): give {FILES}"
        ) from None


def _check_state(file: Path, state: dict[str, Any]) -> None:
    import torch

    from eval.inception import CLASSES, Inception

    classes = len(state["fc.weight"]) if "fc.weight" in state else CLASSES
    if classes != CLASSES or any(name.startswith("AuxLogits.") for name in state):
        raise UserError(
            f"{file} is an Inception of {classes:,} classes, as torchvision's: another network "
            "than the one of 1,008 classes that FID is defined on, and its numbers could not be "
            f"compared; give {FILES}"
        )
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Inception().state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    counters = {name: shape for name, shape in expected.items() if _is_counter(name)}
    shapes = counters | shapes  # older files have no counters
    wrong = sorted(name for name in expected | shapes if shapes.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"{file} does not hold the weights of the FID-Inception: {len(wrong)} of "
            f"{len(expected)} are missing or are others, {wrong[0]} for one; give {FILES}"
        )


def _is_counter(name: str) -> bool:
    """Of batches seen in training: no feature depends on it."""
    return name.endswith(".num_batches_tracked")


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Training as a plain program, to hold whole runs against: what the weights are after some steps.

It knows nothing of the project: networks are called with dictionaries of weights, adapters are
merged by matrix product, noise, clipping and AdamW are written out. In float64, on whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]
Batch = dict[str, Any]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents, timesteps, text) to v."""

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)


def losses(
    batch: Batch,
    predict: Predict,
    text: Tensor,
    *,
    prior: Predict | None = None,
    prior_text: Tensor | None = None,
) -> Tensor:
    """Each sample's mean squared error of v, (B,); of those that the batch marks as prior, from
    what `prior` predicts."""
    latents, noise = batch["latents"].double(), batch["noise"].double()
    timesteps = batch["timestep"]
    a = ALPHA_BAR[timesteps].sqrt()[:, None, None, None]
    s = (1 - ALPHA_BAR[timesteps]).sqrt()[:, None, None, None]
    noisy, target = a * latents + s * noise, a * noise - s * latents
    if prior is not None:
        with torch.no_grad():
            predicted = prior(noisy, timesteps, text if prior_text is None else prior_text)
            target = torch.where(batch["prior"][:, None, None, None], predicted, target)
    return ((predict(noisy, timesteps, text) - target) ** 2).mean((1, 2, 3))


def train(
    weights: Weights,
    loss_of: Callable[[Weights, Batch], Tensor],
    batches: Iterable[Batch],
    settings: Callable[[str, Tensor], tuple[float, float]],
    *,
    eps: float,
    clip: float,
) -> tuple[Weights, list[tuple[float, float]]]:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) at a constant (rate, decay) for each weight.
    Returns the weights after the last batch, and each step's loss and gradient norm."""
    weights = {name: value.double() for name, value in weights.items()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    history = []
    for step, batch in enumerate(batches, 1):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        total = loss_of(leaves, batch)
        gradients = torch.autograd.grad(total, list(leaves.values()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        for name, gradient in zip(leaves, gradients, strict=True):
            gradient = gradient * min(1.0, clip / norm.item())
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            rate, decay = settings(name, gradient)
            weights[name] = (1 - rate * decay) * weights[name]
            weights[name] = weights[name] - rate * mean / (square.sqrt() + eps)
        history.append((total.item(), norm.item()))
    return weights, history


def unet(network: nn.Module, weights: Weights) -> Predict:
    """A UNet with some of its weights replaced."""
    return lambda noisy, timesteps, text: (
        functional_call(network, weights, (noisy, timesteps, text)).sample
    )


def encoded(network: nn.Module, weights: Weights, ids: Tensor) -> Tensor:
    """The text encoder's last hidden states, with some of its weights replaced."""
    return functional_call(network, weights, (ids,)).last_hidden_state


def merged(network: nn.Module, adapters: Weights, scale: float) -> Weights:
    """W + scale B A (Hu et al. 2021, section 4.1) of every layer that has NAME.lora_A and _B."""
    frozen, result = dict(network.named_parameters()), {}
    for name, down in adapters.items():
        layer, found, _ = name.partition(".lora_A")
        if found:
            up = adapters[name.replace(".lora_A", ".lora_B")]
            weight = frozen[f"{layer}.weight"].detach()
            update = up.flatten(1) @ down.flatten(1)  # (out, in x height x width)
            result[f"{layer}.weight"] = weight + scale * update.reshape(weight.shape)
    return result


def part(weights: Weights, prefix: str) -> Weights:
    """Those under `prefix`, without it."""
    return {n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)}

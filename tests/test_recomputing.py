"""Which blocks compute their activations again, and that nothing else changes by it."""

import pytest
import torch

from tests.tiny import tiny_pipeline
from train import adapters, base_layers, recomputing
from train.config import DiffusionConfig, LoraConfig, ModelConfig, TextLoraConfig, UserError
from train.denoiser import Denoiser
from train.diffusion import Objective

CHOICES = {
    "none": False,
    "all": True,
    "one block": ["down_blocks.0"],
    "transformers": ["up_blocks.1.attentions", "mid_block.attentions.*"],
    "everything": ["*"],
}


def denoiser(wanted, config):
    pipeline = tiny_pipeline()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    recomputing.enable(pipeline, wanted)
    adapters.attach(pipeline, config, seed=0)
    objective = Objective.of(pipeline.scheduler, DiffusionConfig())
    return Denoiser(pipeline.unet, objective, pipeline.text_encoder)


def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([100, 700]),
        "input_ids": torch.randint(3, 90, (2, 77), generator=generator),
    }


def trained(wanted, config=None):
    """Losses, gradients, and how many bytes of activations one step keeps for its backward pass."""
    config = config or LoraConfig(dropout=0.3, text_encoder=TextLoraConfig())
    model, kept = denoiser(wanted, config), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(1)  # of the dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch())
        size = sum(kept.values())
    losses.mean().backward()
    return losses, [p.grad for p in model.parameters() if p.requires_grad], size


def test_losses_and_gradients_are_the_same_to_the_bit_and_less_is_kept():
    found = {name: trained(wanted) for name, wanted in CHOICES.items()}
    losses, gradients, size = found["none"]
    for name, (other_losses, other_gradients, _) in found.items():
        assert torch.equal(losses, other_losses), name
        assert all(map(torch.equal, gradients, other_gradients)), name
    sizes = {name: size for name, (_, _, size) in found.items()}
    assert sizes["all"] < sizes["everything"] < sizes["one block"] < size
    assert sizes["everything"] < sizes["transformers"] < size
    assert sizes["all"] < size / 3


def test_only_the_blocks_that_fit_recompute():
    pipeline = tiny_pipeline()
    recomputing.enable(pipeline, ["down_blocks.0", "*.attentions.1"])
    on = {n for n, m in pipeline.unet.named_modules() if recomputes(m)}
    assert on == {
        "down_blocks.0",
        "down_blocks.0.attentions.0",
        "up_blocks.1.attentions.1",
    }
    assert not any(map(recomputes, pipeline.text_encoder.modules()))


def recomputes(module):
    return getattr(module, "gradient_checkpointing", False)


def test_a_pattern_that_fits_nothing_is_refused_with_the_blocks_there_are(base):
    with pytest.raises(UserError) as caught:
        recomputing.enable(tiny_pipeline(), ["down_blocks.0", "down_blocks.7"])
    said = str(caught.value)
    assert "train.gradient_checkpointing: 'down_blocks.7' fits no block" in said
    assert "down_blocks.0, down_blocks.1, mid_block, up_blocks.0, up_blocks.1," in said
    with pytest.raises(UserError) as before_loading:
        recomputing.check(["down_blocks.0", "down_blocks.7"], ModelConfig(path=str(base)))
    assert str(before_loading.value) == said
    recomputing.check(["mid_block"], ModelConfig(path=str(base)))


def test_the_blocks_are_known_from_the_configuration_alone(base):
    found = base_layers.of_base(ModelConfig(path=str(base)))
    assert found is not None
    unet = tiny_pipeline().unet
    there = {n for n, m in unet.named_modules() if hasattr(m, "gradient_checkpointing")}
    assert set(recomputing.blocks_of(found["unet"])) == there

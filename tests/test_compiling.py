"""train/compiling.py: compiled blocks compute what they compute uncompiled, once for all shapes."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.fx.experimental._config as symbols
from diffusers import UNet2DConditionModel
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from train import adapters, compiling
from train.config import LoraConfig, UserError

SHAPES = [(8, 8), (8, 12), (12, 8), (16, 16)]


class Parts:
    """As much of a pipeline as adapters look at."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.text_encoder = unet, nn.Module()


@pytest.fixture(autouse=True)
def apart():
    """What was compiled before, and how, is not this test's, nor is this test's another's."""
    torch.compiler.reset()
    counters.clear()
    kept = {name: getattr(dynamo, name) for name in ("recompile_limit", "optimize_ddp")}
    with dynamo.patch(**kept), symbols.patch(use_duck_shape=True):
        yield
    torch.compiler.reset()


def no_more():
    """Within it nothing is compiled again."""
    return dynamo.patch(error_on_recompile=True)


def trained(**changed) -> nn.Module:
    """A small UNet with adapters that do something."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        attention_head_dim=2,
        cross_attention_dim=16,
        use_linear_projection=True,
        norm_num_groups=8,
    ).eval()
    adapters.add(unet, LoraConfig(**({"rank": 2, "alpha": 2} | changed)), seed=0)
    for name, parameter in unet.named_parameters():
        if ".lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return unet


def step(unet: nn.Module, shape=(8, 8), *, precision=torch.float32, batch=2):
    """Losses and gradients of a step."""
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, *shape, generator=random)
    text = torch.randn(batch, 7, 16, generator=random)
    timesteps = torch.arange(batch) * 400
    unet.zero_grad()
    torch.manual_seed(2)  # dropout
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        losses = (
            unet(latents, timesteps, encoder_hidden_states=text).sample.square().mean((1, 2, 3))
        )
    losses.sum().backward()
    grads = {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}
    return losses.detach(), grads


def same(one, other, tolerance=0.0):
    """Of the largest number in each tensor."""
    assert one[1].keys() == other[1].keys() and one[1]
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    for a, b in pairs:
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def predicted(unet: nn.Module, *, adapted: bool = True) -> torch.Tensor:
    unet.eval()
    with torch.no_grad(), nullcontext() if adapted else adapters.switched_off(Parts(unet)):
        text = torch.ones(2, 7, 16)
        prediction = unet(torch.ones(2, 4, 8, 12), 3, encoder_hidden_states=text).sample
    unet.train()
    return prediction


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(unet: nn.Module) -> nn.Module:
    """Traced as in earnest, and run by torch as it stands."""
    compiling.compile_regions(unet, "blocks", backend="eager")
    return unet


def test_every_repeated_block_is_compiled_and_keeps_its_names():
    unet, other = trained(), trained()
    names = list(unet.state_dict())
    compiling.compile_regions(unet, "none")
    assert not any(block._compiled_call_impl for block in unet.modules())
    compiled(unet)
    found = [type(b).__name__ for b in unet.modules() if b._compiled_call_impl]
    assert sorted(found) == ["BasicTransformerBlock"] * 3 + ["ResnetBlock2D"] * 3
    assert list(unet.state_dict()) == names
    same(step(copy.deepcopy(unet)), step(other))
    assert not graphs()  # a copy is not compiled


def test_neither_other_buckets_nor_switched_off_adapters_compile_again():
    unet, other = compiled(trained(dropout=0.3)), trained(dropout=0.3)
    unet.train(), other.train()
    same(step(unet), step(other))
    first = graphs()
    assert 3 <= first <= 6 and not counters["graph_break"]
    with no_more():
        for shape in SHAPES:
            same(step(unet, shape), step(other, shape))
        same(step(unet, batch=5), step(other, batch=5))
        base = predicted(unet, adapted=False)
        assert torch.equal(base, predicted(other, adapted=False))
        assert not torch.equal(base, predicted(unet))
        same(step(unet), step(other))
    assert graphs() == first


def test_what_records_no_gradients_runs_uncompiled():
    unet = compiled(trained())
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 3, encoder_hidden_states=torch.zeros(1, 7, 16))
    assert not graphs()


@pytest.mark.slow
def test_recomputed_activations_and_bf16():
    unet, other = compiled(trained(dropout=0.3)), trained(dropout=0.3)
    for one in (unet, other):
        one.train()
        one.enable_gradient_checkpointing()
    same(step(unet, precision=torch.bfloat16), step(other, precision=torch.bfloat16))
    first = graphs()
    same(
        step(unet, (8, 12), precision=torch.bfloat16),
        step(other, (8, 12), precision=torch.bfloat16),
    )
    assert graphs() == first


@pytest.mark.slow
def test_dora_is_compiled_in_pieces_and_computes_the_same():
    settings = {"dora": True, "targets": ["attention", "convolution"]}
    unet, other = compiled(trained(**settings)), trained(**settings)
    same(step(unet), step(other))
    with no_more():
        same(step(unet, (8, 12)), step(other, (8, 12)))


class Blocks(nn.Module):
    """One of each that a UNet repeats, as small as they come."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        torch.manual_seed(0)
        self.resnet = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4)
        self.transformer = BasicTransformerBlock(16, 2, 8, dropout=0.3, cross_attention_dim=8)
        self.resnet.requires_grad_(False)

    def forward(self, pixels, time, text):
        hidden = self.resnet(pixels, time).flatten(2).transpose(1, 2)
        return self.transformer(hidden, encoder_hidden_states=text).square().mean((1, 2))


def updated(how: compiling.How) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of three steps, each in another bucket, and the weights after them."""
    model, losses = Blocks(), []
    compiling.compile_regions(model, how)
    optimizer = torch.optim.SGD(model.transformer.parameters(), lr=0.5)
    for number, (height, width) in enumerate(SHAPES[:3]):
        torch.manual_seed(number)
        pixels = torch.randn(2, 16, height, width, requires_grad=True)
        with dynamo.patch(error_on_recompile=number > 0):
            loss = model(pixels, torch.randn(2, 8), torch.randn(2, 7, 8)).sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), dict(model.named_parameters())


@pytest.mark.slow
def test_updates_match_those_of_uncompiled_blocks_in_every_bucket():
    """By the compiler of earnest runs, with dropout: to 1e-5 of the largest number in each."""
    plain, fast = updated("none"), updated("blocks")
    assert graphs() == 2
    same(fast, plain, tolerance=1e-5)


@pytest.mark.parametrize(
    "how, device, path, said",
    [
        ("graphs", "cpu", None, "CUDA graphs.*train.compile=blocks"),
        ("blocks", "cpu", "", r"C\+\+ compiler.*no g\+\+.*CXX.*train.compile=none"),
        ("blocks", "cuda", "", "C compiler.*no gcc or clang.*variable CC"),
    ],
)
def test_what_cannot_work_is_said_before(monkeypatch, how, device, path, said):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    with pytest.raises(UserError, match=said):
        compiling.check(how, device)
    compiling.check("none", device)


def test_pythons_headers_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"no Python\.h.*python3-dev"):
        compiling.check("blocks", "cpu")
    (tmp_path / "Python.h").touch()
    compiling.check("blocks", "cpu")

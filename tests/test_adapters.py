import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from scripts.toy.full_size import UNET
from tests.tiny import tiny_pipeline
from train import adapters
from train.config import LoraConfig, UserError


@pytest.fixture(scope="module")
def base():
    return tiny_pipeline().unet


@pytest.fixture
def unet(base):
    return copy.deepcopy(base)


def _adapted(unet) -> set[str]:
    return {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}


# The tiny UNet: 1 + 2 transformers around one in the middle, each of one block with self- and
# cross-attention; 1 + 1 resnets down, 2 in the middle, 2 + 2 up.
COUNTS = {"attention": 4 * 8, "proj": 4 * 2, "feed_forward": 4 * 2, "convolution": 8 * 2 + 5}
ENDS = {
    "attention": (".to_q", ".to_k", ".to_v", ".to_out.0"),
    "proj": ("attentions.0.proj_in", "attentions.0.proj_out", "1.proj_in", "1.proj_out"),
    "feed_forward": (".ff.net.0.proj", ".ff.net.2"),
    "convolution": (".conv1", ".conv2", ".conv_shortcut"),
}


@pytest.mark.parametrize("target", COUNTS)
def test_a_target_means_its_layers_and_all_of_them(unet, target):
    known = {name for name, _ in unet.named_modules()}
    adapters.add(unet, LoraConfig(targets=[target]), seed=0)
    found = _adapted(unet)
    assert found == {name for name in known if name.endswith(ENDS[target])}
    assert len(found) == COUNTS[target]


def test_targets_add_up(unet):
    adapters.add(unet, LoraConfig(targets=list(COUNTS)), seed=0)
    assert len(_adapted(unet)) == sum(COUNTS.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_the_adapter_trains_and_in_fp32_whatever_the_base(unet, dtype):
    unet.to(dtype)
    adapters.add(unet, LoraConfig(), seed=0)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name


def test_an_untrained_adapter_changes_nothing_and_alpha_over_rank_is_its_strength(unet):
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    before = unet(*inputs).sample
    adapters.add(unet, LoraConfig(rank=4, alpha=6.0), seed=0)
    assert torch.equal(unet(*inputs).sample, before)

    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape[0] == b.shape[1] == 4
    torch.nn.init.normal_(b)
    x = torch.randn(3, a.shape[1])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 6 / 4 * x @ a.T @ b.T)


def test_the_first_values_depend_on_the_seed_alone(base):
    states = []
    for seed, drawn in ((0, 0), (0, 5), (1, 0)):
        unet = copy.deepcopy(base)
        torch.randn(drawn)
        adapters.add(unet, LoraConfig(), seed=seed)
        states.append(torch.cat([p.flatten() for p in unet.parameters() if p.requires_grad]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_network_without_such_layers_is_the_users_mistake():
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(UserError, match="lora.targets"):
        adapters.add(unet, LoraConfig(), seed=0)


@pytest.mark.parametrize("target", COUNTS)
def test_the_estimate_for_the_disk_covers_sd_21_and_little_more(target):
    config = LoraConfig(rank=8, targets=[target])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        adapters.add(unet, config, seed=0)
    size = 4 * sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert size <= adapters.estimated_bytes(config) <= 1.3 * size + 2**20

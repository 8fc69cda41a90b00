import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from eval.features import find_clip, find_extractor, load_extractor
from eval.frechet import frechet_from_features
from eval.inception import FEATURES, MEAN, STD, Inception
from eval.kernel_distances import kid
from eval.resizing import legacy_tf
from train.config import UserError


def seeded_state() -> dict[str, torch.Tensor]:
    """Weights from numpy, whose numbers do not change with torch."""
    rng, state = np.random.default_rng(0), {}
    for name, tensor in Inception().state_dict().items():
        values = rng.standard_normal(tuple(tensor.shape), dtype=np.float32)
        if name.endswith("conv.weight") or name == "fc.weight":
            values *= np.sqrt(2 / tensor[0].numel())
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.1 * np.abs(values)
        else:
            values *= 0.1
        state[name] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    return state


@pytest.fixture(scope="module")
def state():
    return seeded_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    yield path
    path.unlink()  # 95 MB


@pytest.fixture(scope="module")
def shapes(state):
    """Tensors of the right shapes that take no space in a file."""
    return {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()}


@pytest.fixture(scope="module")
def extractor(file):
    return load_extractor(file, resize="legacy_tf")


def pictures(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (40 + 9 * k, 60, 3), dtype=np.uint8) for k in range(count)]


def test_it_has_the_entries_and_the_parameters_of_the_published_network(state):
    # 94 convolutions of 6 entries each, and the classes.
    assert len(state) == 566 == 94 * 6 + 2
    assert sum(p.numel() for p in Inception().parameters()) == 23_850_960  # 23.85 M
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7b.branch3x3dbl_3a.bn.bias"].shape == (384,)


def test_features_are_those_of_torch_fidelity_on_the_same_weights(extractor):
    # The numbers are torch-fidelity 0.4.0's own, with which eval/inception.py agreed to the bit.
    features = extractor.images(pictures(1))
    classes = extractor.classes(features)
    assert features.shape == (1, 2048) and classes.shape == (1, 1008)
    assert features.mean() == pytest.approx(1.7490756, rel=1e-5)
    assert features[0, [0, 777, 2000]] == pytest.approx([3.8621597, 1.8560264, 2.2440295], rel=1e-4)
    assert classes[0].argmax() == 528 and classes[0, 528] == pytest.approx(0.2185883, rel=1e-3)


def test_features_depend_on_the_picture_alone(extractor):
    some = pictures()
    whole = extractor.images(some)
    assert (extractor.images(some[::-1])[::-1] == whole).all()
    assert (extractor.images(some[1:2])[0] == whole[1]).all()


def test_average_pooling_does_not_count_the_padding():
    ones = torch.ones(1, 192, 9, 9)
    block = Inception().Mixed_5b
    assert (block.pool(ones) == 1).all()  # 4/9 in the corners, were the padding counted
    last = Inception().Mixed_7c
    assert isinstance(last.pool, nn.MaxPool2d) and last.pool(ones).shape == ones.shape


def test_class_probabilities_leave_the_bias_out(extractor, state):
    features = np.abs(np.random.default_rng(1).standard_normal((2, 2048)))
    logits = torch.from_numpy(features) @ state["fc.weight"].double().T
    found = extractor.classes(features)
    np.testing.assert_allclose(found, logits.softmax(dim=1).numpy(), rtol=1e-9)
    assert extractor.classes(features[:0]).shape == (0, 1008)
    assert extractor.classes(1e4 * features).sum(axis=1) == pytest.approx([1, 1])


def test_safetensors_and_weights_without_counters_serve_too(extractor, state, tmp_path):
    bare = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(bare) == 472
    save_file(bare, tmp_path / "weights.safetensors")
    other = load_extractor(tmp_path / "weights.safetensors", resize="legacy_tf")
    (tmp_path / "weights.safetensors").unlink()  # 95 MB
    assert (other.images(pictures(1)) == extractor.images(pictures(1))).all()
    assert other.describe()["resize"] == "legacy_tf bilinear, squashed to 299x299"


# The published TorchScript: `layers` from scaled pixels to features, `output` to classes.


class Script(nn.Module):
    def __init__(self, classes: int = 1008) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 2048, 8, stride=32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.output = nn.Linear(2048, classes)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def script(tmp_path):
    torch.manual_seed(0)
    module = Script()
    torch.jit.script(module).save(tmp_path / "inception-2015-12-05.pt")
    return module, tmp_path / "inception-2015-12-05.pt"


def test_a_torchscript_file_is_read_after_our_own_resize(script):
    module, path = script
    extractor = load_extractor(path, resize="legacy_tf")
    picture = pictures(1)[0]
    scaled = torch.from_numpy((legacy_tf(picture, 299) - 128) / 128).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = module.layers(scaled).flatten(1)
        classes = (expected @ module.output.weight.T).softmax(dim=1)
    # TorchScript may rewrite itself at the second and third call.
    found = [extractor.images([picture]) for _ in range(4)]
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(extractor.classes(found[0]), classes.numpy(), rtol=1e-4)
    assert all((features == found[0]).all() for features in found)


def test_torchscript_of_something_else_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "linear.pt")
    with pytest.raises(UserError, match="linear.pt is TorchScript, but not of the FID-Inception"):
        find_extractor(tmp_path / "linear.pt")
    torch.jit.script(Script(classes=1000)).save(tmp_path / "thousand.pt")
    with pytest.raises(UserError, match="1000 classes on 2048 features"):
        find_extractor(tmp_path / "thousand.pt")


def test_torchvisions_inception_is_refused_with_the_reason(shapes, tmp_path):
    thousand = shapes | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(thousand, tmp_path / "inception_v3_google.pth")
    with pytest.raises(UserError, match="1,000 classes, as torchvision's: another network") as said:
        find_extractor(tmp_path / "inception_v3_google.pth")
    assert "\n" not in str(said.value) and "pt_inception-2015-12-05" in str(said.value)


def test_other_weights_are_refused_by_name(shapes, tmp_path):
    for change, name in (
        (lambda s: s.pop("Mixed_5b.branch1x1.bn.bias"), "Mixed_5b.branch1x1.bn.bias"),
        (lambda s: s.update({"extra": torch.zeros(1)}), "extra"),
        (lambda s: s.update({"fc.bias": torch.zeros(3)}), "fc.bias"),
    ):
        wrong = dict(shapes)
        change(wrong)
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=f"1 of 566 are missing or are others, {name}"):
            find_extractor(tmp_path / "wrong.pth")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 torn"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"torn{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"torn{suffix} cannot be read as the weights") as said:
        find_extractor(path)
    assert "\n" not in str(said.value)


def test_a_pickle_of_more_than_tensors_is_refused_unexecuted(tmp_path):
    torch.save({"fc.weight": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth cannot be read"):
        find_extractor(tmp_path / "evil.pth")
    torch.save({"step": 3}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="numbers.pth cannot be read"):
        find_extractor(tmp_path / "numbers.pth")


def test_an_inception_is_no_clip_and_other_files_are_no_extractor(file, tmp_path):
    with pytest.raises(UserError, match="embeds pictures, but not texts"):
        find_clip(file)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="model.onnx is no extractor: give an Inception file"):
        find_extractor(tmp_path / "model.onnx")


class Reduced(torch.nn.Module):
    """Our network in float64 on levels (B, 3, H, W), and some of its features: torchmetrics' matrix
    root is only exact to 1e-6 where there are more pictures than features."""

    num_features = 12

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.network = Inception().double().eval().requires_grad_(False)
        self.network.load_state_dict(state)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        features = self.network((levels.double() - MEAN) / STD)
        return features[:, :: FEATURES // self.num_features][:, : self.num_features]


def test_fid_and_kid_agree_with_torchmetrics_on_the_features_of_this_network(state):
    module = Reduced(state)
    rng = np.random.default_rng(3)
    # Scenes of unlike brightness, the second set darker; 80 pixels are enough for the layers.
    means = [rng.uniform(60, most, size=(24, 3, 1, 1)) for most in (200, 150)]
    levels = [mean + rng.normal(scale=40, size=(24, 3, 80, 80)) for mean in means]
    real, made = (torch.from_numpy(x.clip(0, 255).astype(np.uint8)) for x in levels)
    fid = FrechetInceptionDistance(feature=module).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=module, subsets=1, subset_size=24)
    for metric in (fid, kernel.set_dtype(torch.float64)):
        metric.update(real, real=True)
        metric.update(made, real=False)
    ours = [module(pictures).numpy() for pictures in (made, real)]
    assert frechet_from_features(*ours) == pytest.approx(float(fid.compute()), rel=1e-6)
    assert kid(*ours).value == pytest.approx(float(kernel.compute()[0]), rel=1e-6)

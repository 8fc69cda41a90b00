import io
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from data import beside
from scripts import depth
from scripts.depth import DepthConfig, Estimator
from tests.runs import finish, launch
from train.config import UserError, load


def tiny_dpt(folder):
    """A DPT with random weights, made for squares of 64 pixels as the published ones for 384."""
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        use_auxiliary_head=False,
        initializer_range=0.3,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_dpt(tmp_path_factory.mktemp("dpt"))


def picture(width=96, height=64, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "set"
    (source / "below").mkdir(parents=True)
    for number in range(5):
        picture(seed=number).save(source / f"{number}.png")
    picture(64, 96, seed=9).save(source / "below/tall.jpg")
    return source


def run(folder, model, *arguments):
    depth.main([f"source={folder}", f"model={model}", "batch_size=2", *arguments])


def maps(folder):
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path))
        for path in sorted(folder.rglob("*.depth.png"))
    }


def test_every_picture_gets_a_map_of_16_bits_in_its_aspect(folder, model, capsys):
    run(folder, model)
    made = maps(folder)
    assert list(made) == [*(f"{n}.depth.png" for n in range(5)), "below/tall.depth.png"]
    assert {grey.dtype for grey in made.values()} == {np.dtype("uint16")}
    assert made["0.depth.png"].shape == (64, 96) and made["below/tall.depth.png"].shape == (96, 64)
    assert all((grey.min(), grey.max()) == (0, 65535) for grey in made.values())
    assert "depth maps: 6 made, 0 there already, of 6 pictures" in capsys.readouterr().out


def test_a_map_rises_with_what_the_model_gives(folder, model):
    run(folder, model)
    network = DPTForDepthEstimation.from_pretrained(model).eval()
    processor = DPTImageProcessorPil.from_pretrained(model)
    pixels = processor(Image.open(folder / "0.png"), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        given = network(pixels).predicted_depth
    given = torch.nn.functional.interpolate(given[None], size=(64, 96), mode="bicubic")[
        0, 0
    ].numpy()
    expected = (given - given.min()) / (given.max() - given.min()) * 65535
    np.testing.assert_allclose(maps(folder)["0.depth.png"], expected, atol=2)


def test_the_map_is_that_of_the_upright_picture(tmp_path, model):
    upright, exif = picture(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    run(tmp_path, model)
    made = maps(tmp_path)
    assert np.array_equal(made["a.depth.png"], made["b.depth.png"])


def test_a_large_picture_has_a_map_of_bounded_size(tmp_path, model):
    picture(3000, 2000).save(tmp_path / "a.jpg")
    picture(3000, 300).save(tmp_path / "long.jpg")
    run(tmp_path, model, "long_side=300")
    assert {k: v.shape for k, v in maps(tmp_path).items()} == {
        "a.depth.png": (200, 300),
        "long.depth.png": (30, 300),
    }


def test_only_what_is_missing_is_made_and_a_persons_map_kept(folder, model, capsys, monkeypatch):
    run(folder, model)
    before = {path: path.read_bytes() for path in folder.rglob("*.depth.png")}
    Image.new("I;16", (96, 64)).save(folder / "0.depth.png")
    own = (folder / "0.depth.png").read_bytes()
    (folder / "1.depth.png").unlink()
    seen = []
    estimate = Estimator.estimate
    monkeypatch.setattr(Estimator, "estimate", lambda s, b: seen.append(len(b)) or estimate(s, b))
    run(folder, model)
    assert seen == [1] and (folder / "0.depth.png").read_bytes() == own
    assert "1 made, 5 there already" in capsys.readouterr().out
    monkeypatch.setattr(Estimator, "load", lambda *_: pytest.fail("loaded with nothing to do"))
    run(folder, model)
    monkeypatch.undo()
    run(folder, model, "overwrite=true")
    assert {path: path.read_bytes() for path in folder.rglob("*.depth.png")} == before


def test_masks_and_maps_are_no_pictures_and_bad_ones_are_named(folder, model, capsys):
    Image.new("L", (96, 64)).save(folder / "0.mask.png")
    (folder / "torn.jpg").write_bytes((folder / "below/tall.jpg").read_bytes()[:200])
    (folder / "text.png").write_text("no picture")
    picture().save(folder / "4.jpg")
    run(folder, model)
    said = capsys.readouterr().out
    assert "6 made" in said and "without one (3):" in said
    assert "text.png: is not a picture that can be read" in said and "torn.jpg: " in said
    assert "4.png: would share 4.depth.png with 4.jpg: rename one" in said
    assert not (folder / "0.mask.depth.png").exists()


def test_output_is_a_tree_of_its_own(folder, model, tmp_path):
    before = sorted(folder.rglob("*"))
    run(folder, model, f"output={tmp_path / 'out'}")
    assert sorted(folder.rglob("*")) == before
    made = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.png"))
    assert [path.as_posix() for path in made][-1] == "depth/below/tall.png" and len(made) == 6


@pytest.mark.slow
def test_two_processes_make_what_one_does_also_after_a_kill(folder, model, tmp_path):
    run(folder, model, "batch_size=1")
    alone = maps(folder)
    for path in folder.rglob("*.depth.png"):
        path.unlink()
    arguments = [f"source={folder}", f"model={model}", "batch_size=1"]
    process = launch("scripts/depth.py", *arguments)
    while not maps(folder) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = finish(launch("scripts/depth.py", *arguments, processes=2))
    there = maps(folder)
    assert there.keys() == alone.keys() and "of 6 pictures" in output
    assert all(np.abs(there[k].astype(int) - alone[k]).max() <= 8 for k in alone)


def test_distances_are_turned_over():
    near_to_far = torch.tensor([[1.0, 2.0, 4.0]])
    grey = np.asarray(Image.open(io.BytesIO(depth.to_png(depth.inverse(near_to_far).numpy()))))
    assert grey.tolist() == [[65535, 21845, 0]]
    spike = depth.inverse(torch.tensor([[0.0, *[8.0] * 9, 16.0]]))
    assert spike.max() / spike.median() == 16
    assert not np.asarray(Image.open(io.BytesIO(depth.to_png(np.ones((2, 2)))))).any()


def test_what_a_family_gives_is_known_or_asked_for():
    from transformers import DepthAnythingConfig, Dinov2Config, GLPNConfig

    assert (
        depth.known_kind(DPTConfig()) == "inverse" and depth.known_kind(GLPNConfig()) == "distance"
    )
    metric = DepthAnythingConfig(depth_estimation_type="metric")
    assert depth.known_kind(metric) == "distance"
    with pytest.raises(UserError, match="gives=inverse"):
        depth.known_kind(DPTConfig(backbone_config=Dinov2Config()))


def test_maps_that_are_not_finite_are_problems(folder, model):
    config = load(DepthConfig, [f"source={folder}", f"model={model}"])
    estimator = Estimator.load(config, "cpu")
    for parameter in estimator.model.head.parameters():
        parameter.data[:] = float("nan")
    problems = {}
    with depth._bar(0, shown=False) as bar:
        files = beside.find(folder).files
        assert not list(depth.estimate(estimator, files, config, problems, bar))
    assert len(problems) == 6 and "precision=no" in problems["0.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=/gone", "model=a/b"], "source=/gone does not exist"),
        (["source={set}", "model=/gone"], "model=/gone is not a folder"),
        (["source={set}", "model={set}"], "lacks config.json"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(folder, arguments, message, monkeypatch):
    monkeypatch.setattr(Estimator, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        depth.main([argument.format(set=folder) for argument in arguments])


def test_a_model_of_another_kind_is_refused(folder, tmp_path):
    from tests.tiny import tiny_clip

    with pytest.raises(UserError, match="could not be loaded as a depth estimation model"):
        run(folder, tiny_clip(tmp_path / "clip"))

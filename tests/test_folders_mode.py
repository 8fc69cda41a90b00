import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import evaluate as entry
from tests.tiny import tiny_clip
from train.config import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    tiny_clip(folder / "clip", dimension=4)
    for name, seed, light in (("real", 0, 0), ("near", 1, 0), ("far", 2, 90)):
        _pictures(folder / name, seed=seed, light=light)
    return folder


def _pictures(folder: Path, *, seed: int, light: int, count: int = 24) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for k in range(count):
        colour = rng.integers(0, 120, 3) + light
        pixels = np.clip(colour + rng.integers(-20, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")


def _measured(world: Path, tmp_path: Path, images: str, reference: str, *more: str) -> dict:
    entry.main(
        [
            f"images={world / images}",
            f"reference={world / reference}",
            f"output={tmp_path / 'out'}",
            f"cache={tmp_path / 'cache'}",
            f"evaluation.clip={world / 'clip'}",
            *more,
        ]
    )
    return json.loads((tmp_path / "out" / "metrics.json").read_text())


def _value(metrics: dict, name: str) -> float:
    return metrics["scores"][name]["values"]["finetuned"]["value"]


def test_a_folder_like_the_reference_is_nearer_than_one_unlike_it(world, tmp_path, capsys):
    near = _measured(world, tmp_path / "n", "near", "real")
    far = _measured(world, tmp_path / "f", "far", "real")
    for name in ("fid", "kid", "cmmd"):
        assert _value(near, name) < _value(far, name)
    assert near["verdict"] in capsys.readouterr().out
    assert (tmp_path / "n" / "out" / "report.html").is_file()


def test_kept_statistics_serve_in_place_of_the_folder(world, tmp_path):
    file = tmp_path / "real.safetensors"
    whole = _measured(world, tmp_path / "a", "far", "real", f"save_reference={file}")
    kept = _measured(world, tmp_path / "b", "far", str(file))
    assert _value(kept, "fid") == pytest.approx(_value(whole, "fid"), rel=1e-9)
    with pytest.raises(UserError, match="resize"):
        _measured(world, tmp_path / "c", "far", str(file), "evaluation.resize=legacy_tf")


@pytest.mark.parametrize(
    ("images", "reference", "more", "message"),
    [
        ("gone", "real", (), "images=.*gone is not a folder"),
        ("near", "clip", (), "reference=.*clip holds 0 pictures"),
        ("near", "real", ("evaluation.clip=./none",), "none"),
        ("near", "real", ("evaluation.clop=1",), "did you mean"),
        ("near", "real", ("save_reference=x.npz",), "must end in .safetensors"),
    ],
)
def test_a_mistake_is_named_and_nothing_written(world, tmp_path, images, reference, more, message):
    with pytest.raises(UserError, match=message):
        _measured(world, tmp_path, images, reference, *more)
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_is_named(world, tmp_path):
    folder = tmp_path / "bad"
    _pictures(folder, seed=3, light=0, count=3)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1.png"):
        _measured(world, tmp_path, str(folder), "real")

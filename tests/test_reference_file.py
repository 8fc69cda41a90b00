import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from eval.frechet import frechet_distance
from eval.moments import Moments
from eval.reference_file import load, read, save
from train.config import UserError

CLIP = {"name": "models/clip", "sha256": "ab" * 32, "resize": "clean", "dimension": 6}


def _moments(seed: int, n: int = 50) -> Moments:
    return Moments.of(np.random.default_rng(seed).normal(size=(n, 6)) + 3)


def test_saved_moments_come_back_to_the_bit_with_all_that_is_said_of_them(tmp_path):
    moments, path = _moments(1), tmp_path / "made" / "reference.safetensors"
    save(path, moments, CLIP, pictures="held-out", sha256="cd" * 32)
    loaded = load(path, CLIP)
    assert loaded.n == 50
    assert (loaded.mean == moments.mean).all() and (loaded.m2 == moments.m2).all()
    assert frechet_distance(loaded, _moments(2)) == frechet_distance(moments, _moments(2))
    _, about = read(path)
    sources = {"pictures": "held-out", "sha256": "cd" * 32}
    assert about == {"extractor": CLIP, "n": 50, "sources": sources}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_loaded_moments_can_take_in_more(tmp_path):
    save(tmp_path / "reference.safetensors", _moments(1), CLIP)
    loaded = load(tmp_path / "reference.safetensors", CLIP)
    loaded.merge(_moments(2))
    assert loaded.n == 100


def test_another_name_of_the_same_extractor_is_no_difference(tmp_path):
    save(tmp_path / "reference.safetensors", _moments(1), CLIP)
    assert load(tmp_path / "reference.safetensors", CLIP | {"name": "elsewhere/clip"}).n == 50


@pytest.mark.parametrize(
    ("key", "other", "both"),
    [
        ("sha256", "ef" * 32, ["another weights", "models/clip (abababababab)", "efefefefefef"]),
        ("resize", "legacy_tf", ["another resize mode", "models/clip (clean)", "legacy_tf"]),
        ("dimension", 7, ["another dimension", "models/clip (6)", "(7)"]),
    ],
)
def test_statistics_of_another_kind_are_refused_and_both_named(tmp_path, key, other, both):
    save(tmp_path / "reference.safetensors", _moments(1), CLIP)
    with pytest.raises(UserError) as error:
        load(tmp_path / "reference.safetensors", CLIP | {key: other})
    for part in [*both, "reference.safetensors", "remake"]:
        assert part in str(error.value)


def test_what_is_no_reference_file_is_refused(tmp_path):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(UserError, match="no reference file"):
        load(path, CLIP)
    save_file({"mean": np.zeros(6)}, path)
    with pytest.raises(UserError, match="no reference file"):
        load(path, CLIP)
    save(path, _moments(1), CLIP)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        load(path, CLIP)


@pytest.mark.parametrize(
    ("about", "m2"),
    [
        ([1], np.eye(6)),
        ({"n": 5}, np.eye(6)),
        ({"extractor": {"dimension": 6}, "n": 5}, np.eye(6)),
        ({"extractor": CLIP, "n": 1}, np.eye(6)),
        ({"extractor": CLIP, "n": "5"}, np.eye(6)),
        ({"extractor": CLIP | {"dimension": "6"}, "n": 5}, np.eye(6)),
        ({"extractor": CLIP, "n": 5}, np.full((6, 6), np.nan)),
        ({"extractor": CLIP, "n": 5}, np.eye(7)),
    ],
)
def test_a_file_that_does_not_say_what_it_is_of_or_holds_no_numbers_is_refused(tmp_path, about, m2):
    path = tmp_path / "reference.safetensors"
    header = {"format": "sd-atelier reference 1", "about": json.dumps(about)}
    save_file({"mean": np.zeros(6), "m2": m2}, path, metadata=header)
    with pytest.raises(UserError, match="damaged"):
        load(path, CLIP)


def test_an_extractor_of_another_dimension_is_not_written_down(tmp_path):
    with pytest.raises(ValueError, match="6 dimensions"):
        save(tmp_path / "reference.safetensors", _moments(1), CLIP | {"dimension": 7})
    assert not list(tmp_path.iterdir())

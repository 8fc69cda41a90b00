import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from eval.feature_cache import compact, sign
from eval.features import extract, load_extractor
from tests.tiny import tiny_clip
from train.config import UserError


class Counting:
    """An extractor that notes what it is given. Features: mean and spread of the levels."""

    name, fingerprint, resize, dimension, cache_key = "counting", "f", "none", 2, "key"

    def __init__(self) -> None:
        self.seen: list[float] = []

    def describe(self):
        return {}

    def images(self, pictures):
        pictures = [np.asarray(Image.open(p)) if not hasattr(p, "mean") else p for p in pictures]
        self.seen += [float(p.mean()) for p in pictures]
        return np.array([[p.mean(), p.std()] for p in pictures]).reshape(-1, 2)


def pictures(count: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (8, 9, 3), dtype=np.uint8) for _ in range(count)]


def on_processes(world: int, work):
    """What `work(rank, gather)` gives on each of `world` processes, of which threads do here."""
    barrier, box = threading.Barrier(world), [None] * world

    def gather(rank, value):
        box[rank] = value
        barrier.wait()
        found = list(box)
        barrier.wait()
        return found

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda r: work(r, lambda value: gather(r, value)), range(world)))


def test_each_picture_is_embedded_once_and_stands_in_every_place_of_its_own():
    some, extractor = pictures(3), Counting()
    several = [some[0], some[1], some[0].copy(), some[2], some[1]]
    found = extract(extractor, several)
    assert found.dtype == np.float64 and len(extractor.seen) == 3
    assert (found == Counting().images(several)).all()
    assert extract(extractor, []).shape == (0, 2)


def test_only_what_the_cache_lacks_is_embedded(tmp_path):
    some, extractor = pictures(), Counting()
    first = extract(extractor, some[:3], cache=tmp_path)
    again = extract(extractor, some, cache=tmp_path)
    assert (again[:3] == first).all() and len(extractor.seen) == 5
    assert (extract(extractor, some[::-1], cache=tmp_path)[::-1] == again).all()
    assert len(extractor.seen) == 5


def test_another_extractor_finds_nothing_of_the_first(tmp_path):
    extract(Counting(), pictures(), cache=tmp_path)
    other = Counting()
    other.cache_key = "other"
    extract(other, pictures(), cache=tmp_path)
    assert len(other.seen) == 5


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("known", [0, 2, 5])
def test_any_number_of_processes_finds_the_same_bits_and_shares_the_work(world, known, tmp_path):
    some = [*pictures(), pictures(2)[1]]
    extract(Counting(), some[:known], cache=tmp_path)
    extractors = [Counting() for _ in range(world)]

    def work(rank, gather):
        how = {"cache": tmp_path, "rank": rank, "world": world, "gather": gather}
        return extract(extractors[rank], some, **how)

    expected = Counting().images(some)
    for found in on_processes(world, work):
        assert (found == expected).all()
    shares = [len(extractor.seen) for extractor in extractors]
    assert sum(shares) == 5 - known and max(shares) - min(shares) <= 1


def test_without_a_cache_processes_find_the_same_bits(tmp_path):
    extractor = load_extractor(tiny_clip(tmp_path))
    some = [*pictures(5), *pictures(2)]
    alone = extract(extractor, some)
    share = on_processes(
        2, lambda r, gather: extract(extractor, some, rank=r, world=2, gather=gather)
    )
    assert all((found == alone).all() for found in share)


def test_a_file_is_known_by_its_bytes_and_not_by_its_name(tmp_path):
    extractor = Counting()
    for k, pixels in enumerate(pictures(2)):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    extract(extractor, [tmp_path / "0.png"], cache=tmp_path / "cache")
    (tmp_path / "0.png").replace(tmp_path / "moved.png")
    extract(extractor, [str(tmp_path / "moved.png")], cache=tmp_path / "cache")
    assert len(extractor.seen) == 1
    (tmp_path / "1.png").replace(tmp_path / "moved.png")
    extract(extractor, [tmp_path / "moved.png"], cache=tmp_path / "cache")
    assert len(extractor.seen) == 2


def test_arrays_of_the_same_bytes_and_another_shape_are_others():
    pixels = pictures(1)[0]
    assert sign(pixels) != sign(pixels.reshape(9, 8, 3))
    assert sign(pixels[:, ::2]) == sign(pixels[:, ::2].copy())


def test_a_damaged_entry_is_computed_again(tmp_path):
    whole = extract(Counting(), pictures(), cache=tmp_path)
    (shard,) = (tmp_path / "shards").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1  # in the last row's numbers
    shard.write_bytes(content)
    extractor = Counting()
    assert (extract(extractor, pictures(), cache=tmp_path) == whole).all()
    assert len(extractor.seen) == 1
    extractor = Counting()
    assert (extract(extractor, pictures(), cache=tmp_path) == whole).all()
    assert not extractor.seen


@pytest.mark.parametrize("kept", [0, 7, 0.5])
def test_a_torn_file_is_not_believed(kept, tmp_path):
    whole = extract(Counting(), pictures(), cache=tmp_path)
    (shard,) = (tmp_path / "shards").glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    extractor = Counting()
    assert (extract(extractor, pictures(), cache=tmp_path) == whole).all()
    assert len(extractor.seen) == 5


def test_what_was_embedded_before_an_interruption_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.features.AT_ONCE", 2)

    class Killed(Counting):
        def images(self, pictures):
            if len(self.seen) == 4:
                raise KeyboardInterrupt
            return super().images(pictures)

    with pytest.raises(KeyboardInterrupt):
        extract(Killed(), pictures(7), cache=tmp_path)
    extractor = Counting()
    extract(extractor, pictures(7), cache=tmp_path)
    assert len(extractor.seen) == 3


def test_features_of_a_picture_that_changes_meanwhile_are_not_kept(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(pictures()[0]).save(file)

    class Slow(Counting):
        def images(self, some):
            Image.fromarray(pictures()[1]).save(file)
            return super().images(some)

    with pytest.raises(UserError, match="a.png changed while it was measured: run this again"):
        extract(Slow(), [file], cache=tmp_path / "cache")
    extractor = Counting()
    extract(extractor, [pictures()[0], file], cache=tmp_path / "cache")
    assert len(extractor.seen) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png cannot be read"):
        extract(Counting(), [*pictures(1), tmp_path / "gone.png"])


def test_rows_are_kept_short_only_where_nothing_is_lost():
    assert compact(np.array([1.5, -2.0])).dtype == np.float32
    for row in ([0.1, 1.0], [1e300, 0.0], [np.nan, 0.0]):
        kept = compact(np.array(row))
        assert kept.dtype == np.float64
        np.testing.assert_array_equal(kept, row)

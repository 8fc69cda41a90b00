import signal
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eval import generation
from scripts import prior_images
from scripts.prior_images import PriorConfig
from tests.runs import finish, launch
from tests.tiny import tiny_pipeline
from train.config import UserError, load

HOW = ["steps=1", "guidance=1", "width=32", "height=32", "batch_size=2"]


@pytest.fixture
def make(base, tmp_path):
    def run(*arguments, how=HOW):
        output = tmp_path / "prior"
        prior_images.main([f"model={base}", f"output={output}", *how, *arguments])
        return sorted(output.glob("*.png"))

    return run


@pytest.fixture
def made(monkeypatch):
    """The seeds of the pictures that are made from now on."""
    seeds = []
    sample = generation._sample
    monkeypatch.setattr(
        generation, "_sample", lambda p, b: seeds.extend(i["seed"] for i in b) or sample(p, b)
    )
    return seeds


def pixels(paths):
    return np.stack([np.asarray(Image.open(path).convert("RGB")).astype(int) for path in paths])


def test_the_folder_is_a_source_whose_captions_are_the_prompts(make, capsys):
    from data.sources import scan

    paths = make("prompts=[a cat, a  small dog]", "count=5")
    assert [path.name for path in paths] == [f"{k:05d}.png" for k in range(5)]
    captions = [record.captions for record in scan(paths[0].parent).table]
    assert captions == [("a cat",), ("a small dog",)] * 2 + [("a cat",)]
    said = capsys.readouterr().out
    assert f"class pictures: 5 in {paths[0].parent}" in said and "data.sources=" in said


def test_a_larger_count_only_adds(make, made):
    few = pixels(make("prompt=a dog", "count=2", "seed=7"))
    assert made == [7, 8]
    many = pixels(make("prompt=a dog", "count=3", "seed=7"))
    assert made == [7, 8, 9] and np.array_equal(many[:2], few)
    with pytest.raises(UserError, match=r"1 pictures beyond count=2 \(00002.png\)"):
        make("prompt=a dog", "count=2", "seed=7")


def test_exactly_the_damaged_and_the_missing_are_made_again(make, made):
    paths = make("prompt=a dog", "count=5")
    before = [path.read_bytes() for path in paths]
    paths[0].write_bytes(b"")
    paths[2].write_bytes(before[2][:-100])
    paths[4].unlink()
    made.clear()
    make("prompt=a dog", "count=5")
    assert made == [0, 1, 2, 3, 4]  # in whole batches, or a picture would have other bits
    assert [path.read_bytes() for path in paths] == before
    made.clear()
    paths[4].unlink()
    make("prompt=a dog", "count=5")
    assert made == [4]


def own_picture(folder, name):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / name, format="JPEG")
    return folder / name


@pytest.mark.parametrize("name", ["00001.png", "dog.jpg", "sub/00000.png"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_persons_picture_is_never_touched(make, tmp_path, name, begun):
    if begun:
        make("prompt=a dog", "count=1")
    (tmp_path / "prior/sub").mkdir(parents=True, exist_ok=True)
    own = own_picture(tmp_path / "prior", name)
    before = own.read_bytes()
    with pytest.raises(UserError, match=f"did not make .*{name}.*choose another output="):
        make("prompt=a dog", "count=2")
    assert own.read_bytes() == before
    assert begun or not (tmp_path / "prior/config.yaml").exists()


def test_other_settings_do_not_replace_pictures(make, tmp_path):
    paths = make("prompt=a dog", "count=1")
    before = paths[0].read_bytes()
    with pytest.raises(UserError, match=r"other settings \(prompt, guidance; see"):
        make("prompt=a cat", "guidance=3", "count=1")
    make("prompt=a dog", "count=1", "batch_size=7")
    assert paths[0].read_bytes() == before
    (tmp_path / "prior/config.yaml").write_text("seed: 0\nlora: {}\n")
    with pytest.raises(UserError, match="is not of this script"):
        make("prompt=a dog", "count=1")


def test_sizes_are_like_those_of_the_pictures_to_be_learned(make, tmp_path):
    (tmp_path / "own").mkdir()
    for number, size in enumerate([(200, 100)] * 3 + [(100, 200)]):
        Image.new("RGB", size).save(tmp_path / f"own/{number}.png")
    how = ["steps=1", "guidance=1", "resolution=64", "bucket_step=8", f"like={tmp_path / 'own'}"]
    paths = make("prompts=[a cat, a dog]", "count=8", how=how)
    kinds = Counter((Image.open(p).size, p.with_suffix(".txt").read_text()[:5]) for p in paths)
    (wide,) = {size for size, _ in kinds if size[0] > size[1]}
    tall = wide[::-1]
    assert kinds == {(wide, "a cat"): 3, (wide, "a dog"): 3, (tall, "a cat"): 1, (tall, "a dog"): 1}
    config = load(PriorConfig, ["output=x", "prompt=x", *how])
    assert prior_images.bucket_shares(config) == {wide: 0.75, tall: 0.25}


def test_listed_sizes_take_turns(make):
    paths = make("prompt=a", "count=3", "sizes=[[32, 16], [16, 32]]", how=HOW[:2])
    assert [Image.open(path).size for path in paths] == [(32, 16), (16, 32), (32, 16)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 60))
@settings(deadline=None, max_examples=50)
def test_every_beginning_of_the_sizes_is_in_proportion(weights, count):
    shares = {(8 * k, 8): weight / sum(weights) for k, weight in enumerate(weights, start=1)}
    sizes = prior_images.in_proportion(shares, count)
    assert sizes == prior_images.in_proportion(shares, count + 3)[:count]
    for length in range(1, count + 1):
        given = Counter(sizes[:length])
        assert all(given[size] - length * share < 1 for size, share in shares.items())


def test_pictures_of_one_colour_are_named(make, monkeypatch, capsys):
    black = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    sample = generation._sample
    monkeypatch.setattr(
        generation, "_sample", lambda p, b: black if b[0]["seed"] == 1 else sample(p, b)
    )
    make("prompt=a dog", "count=3", "batch_size=1")
    assert "1 of them are of one colour all over (00001.png)" in capsys.readouterr().out


def test_a_picture_that_is_not_finite_is_named(make, base, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.vae.decoder.conv_out.bias.data[:] = float("nan")
    pipeline.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="'a dog' with seed 3 came out not finite at precision=no"):
        make("prompt=a dog", "seed=3", f"model={tmp_path / 'nan'}")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["sizes=[[32, 30]]"], "multiples of 8"),
        (["sizes=[[32, 32]]", "width=32"], "not several"),
        (["like=/gone"], "like=/gone: "),
        (["prompt=null", "prompt_file=/gone"], "prompt_file=/gone cannot be read"),
        (["model=/gone"], "model.path=/gone"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(make, wrong, message, monkeypatch):
    monkeypatch.setattr(prior_images, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        make("prompt=a dog", *wrong, how=[])


@pytest.mark.slow
def test_two_processes_make_what_one_does_also_after_a_kill(base, make, tmp_path):
    alone = pixels(make("prompts=[a cat, a dog]", "count=7"))
    output = tmp_path / "two"
    arguments = [f"model={base}", f"output={output}", "prompts=[a cat, a dog]", "count=7", *HOW]
    process = launch("scripts/prior_images.py", *arguments)
    while not list(output.glob("*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = finish(launch("scripts/prior_images.py", *arguments, processes=2))
    assert said.count("class pictures: 7") == 1
    paths = sorted(output.glob("*.png"))
    assert len(paths) == 7 == len(list(output.glob("*.txt")))
    assert (pixels(paths) == alone).all()

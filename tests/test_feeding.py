"""From a data section to what trains: sources, captions, masks, crops and policies, end to end."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.hf_sets import parquet
from tests.runs import arguments, finish, launch, make_world
from train import lora, pictures
from train.config import LoraRun, UserError, load
from train.node_caches import share_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(world: Path, output: Path, *overrides: str) -> dict[str, torch.Tensor]:
    lora.main(arguments(world, output, "preview.every=0", "train.steps=3", *overrides))
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def dataset(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text())["dataset"]


def test_captions_that_change_are_encoded_at_every_step_and_alike_with_workers(world, tmp_path):
    changing = ["data.captions.shuffle_tags=true", "data.captions.separator= "]
    one = run(world, tmp_path / "one", *changing)
    assert same(one, run(world, tmp_path / "two", *changing, "data.workers=2"))
    assert not same(one, run(world, tmp_path / "plain"))


def test_captions_encoded_at_every_step_train_as_cached_ones_do(world, tmp_path, monkeypatch):
    cached = run(world, tmp_path / "cached", "data.captions.prefix=photo, ")
    monkeypatch.setattr(pictures, "CACHED_VARIANTS", 0)
    live = run(world, tmp_path / "live", "data.captions.prefix=photo, ")
    for name, value in cached.items():  # the cache keeps embeddings in fp16
        torch.testing.assert_close(live[name], value, atol=2e-3, rtol=0)


def test_a_long_caption_is_read_in_windows_and_else_reported_as_cut(world, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for picture in sorted((world / "pictures").glob("*.png"))[:4]:
        (folder / picture.name).write_bytes(picture.read_bytes())
        (folder / picture.name).with_suffix(".txt").write_text("a b c")
    long = sorted(folder.glob("*.txt"))[0]
    long.write_text("word " * 30)
    cut = run(world, tmp_path / "cut", f"data.path={folder}")
    said = capsys.readouterr().out
    assert "captions cut at 75 tokens (1)" in said and f"{long.stem}.png (120 tokens)" in said
    whole = run(world, tmp_path / "whole", f"data.path={folder}", "data.captions.max_tokens=150")
    assert "cut at" not in capsys.readouterr().out
    assert not same(cut, whole)


def test_several_sources_are_mixed_by_weight(world, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for picture in sorted((world / "pictures").glob("*.png"))[:2]:
        Image.open(picture).transpose(Image.Transpose.ROTATE_180).save(other / picture.name)
    sources = (
        f"data.sources=[{{path: {world / 'pictures'}, weight: 0.75}}, "
        f"{{path: {other}, weight: 0.25, caption: upside down}}]"
    )
    values = [a for a in arguments(world, tmp_path / "run") if not a.startswith("data.path=")]
    values[0] = _without_path(tmp_path, values[0])
    lora.main([*values, sources, "preview.every=0", "train.steps=3"])
    assert [s["pictures"] for s in dataset(tmp_path / "run")["sources"]] == [9, 2]
    found = pictures.find(load(LoraRun, [*values, sources]).data)
    assert found.weights == [0.75, 0.25]
    assert {record.id.split("/")[0] for record in found.records} == {"pictures", "other"}
    assert "upside down" in (found.captions or [])


def _without_path(folder: Path, config: str) -> str:
    """The tiny configuration without its data.path."""
    text = Path(config.removeprefix("--config=")).read_text().replace("  path: required\n", "")
    (folder / "several.yaml").write_text(text)
    return f"--config={folder / 'several.yaml'}"


def test_masks_reach_the_loss(world, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (world / "pictures").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    where = f"data.path={folder}"
    plain = run(world, tmp_path / "plain", where)
    for picture in (world / "pictures").glob("*.png"):
        mask = Image.new("L", Image.open(picture).size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / f"{picture.stem}.mask.png")
    assert same(plain, run(world, tmp_path / "aside", where))
    masked = run(world, tmp_path / "masked", where, "data.masks=true")
    assert not same(plain, masked)


def test_random_crops_of_a_picture_are_each_cached(world, tmp_path):
    run(world, tmp_path / "run", "data.crop=random", "data.crop_variants=3", "data.resolution=48")
    from data.store import TensorStore
    from train.feeding import latent_keys
    from train.models import load_pipeline

    config = load(
        LoraRun,
        arguments(
            world,
            tmp_path / "run",
            "data.crop=random",
            "data.crop_variants=3",
            "data.resolution=48",
        ),
    )
    found = pictures.find(config.data)
    keys = latent_keys(found, load_pipeline(str(world / "base")), config.data)
    store = TensorStore(config.data.cache)
    for index in range(len(found.records)):
        assert len(keys.keys(index)) == 3
        assert all(store.names(key) for key in keys.keys(index))


@pytest.mark.parametrize("policy", ["abort", "report", "quarantine"])
def test_a_bad_picture_is_dealt_with_as_configured(world, tmp_path, policy, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (world / "pictures").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "bad.png").write_bytes(b"not a picture")
    (folder / "bad.txt").write_text("words")
    what = [f"data.path={folder}", f"data.on_bad_image={policy}"]
    if policy == "abort":
        with pytest.raises(UserError, match=r"(?s)data\.on_bad_image=report.*bad\.png"):
            run(world, tmp_path / "run", *what)
        return
    run(world, tmp_path / "run", *what)
    assert "left out (1): bad.png: is not a picture" in capsys.readouterr().out
    assert dataset(tmp_path / "run")["left_out"] == 1
    copy = tmp_path / "run" / "quarantine" / "bad.png"
    assert copy.exists() == (policy == "quarantine")
    assert (folder / "bad.png").read_bytes() == b"not a picture"


def test_pictures_too_small_to_keep_are_named(world, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (12, 90)).save(folder / "thin.png")
    Image.new("RGB", (64, 64)).save(folder / "fine.png")
    values = ["data.caption=x", "data.upscale=false", f"data.path={folder}"]
    with pytest.raises(UserError, match=r"thin\.png.*data\.bucket_step=16"):
        run(world, tmp_path / "run", *values)
    config = load(LoraRun, arguments(world, tmp_path, *values, "data.on_bad_image=report"))
    found = pictures.find(config.data)
    assert [r.id for r in found.records] == ["fine.png"]
    assert [bad.id for bad in found.rejected] == ["thin.png"]


# Streaming


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return parquet(tmp_path_factory.mktemp("hub") / "set", 3, 4, 2, first=64)


def streamed(shards: Path, folder: Path, *overrides: str) -> list[str]:
    return [
        f"data.path={shards}",
        "data.streaming=true",
        f"data.cache={folder / 'cache'}",
        "train.steps=3",
        "preview.every=0",
        *overrides,
    ]


def test_a_streamed_set_trains_and_passes_once(world, shards, tmp_path, monkeypatch, capsys):
    probed = []
    monkeypatch.setattr(
        "train.feeding.share_of", lambda *given: probed.append(1) or share_of(*given)
    )
    held_out = f"validation.path={world / 'pictures'}"
    one = run(world, tmp_path / "one", *streamed(shards, tmp_path, held_out))
    assert "3 shards" in capsys.readouterr().out
    assert probed == [1]  # for the stream, latents, captions and held-out pictures
    assert dataset(tmp_path / "one")["pictures"] == 0  # when it began; they are counted later
    monkeypatch.setattr(
        "data.streaming.stream_unit", lambda *_, **__: pytest.fail("streamed again")
    )
    assert same(one, run(world, tmp_path / "two", *streamed(shards, tmp_path)))


def test_what_the_cache_has_lost_is_streamed_again(world, shards, tmp_path):
    one = run(world, tmp_path / "one", *streamed(shards, tmp_path))
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.unlink()
    assert same(one, run(world, tmp_path / "two", *streamed(shards, tmp_path)))


def test_a_streamed_set_trains_alike_on_two_processes(world, shards, tmp_path):
    settings = ["lora.dropout=0", "optim.learning_rate=1e-3", "optim.eps=1e-6"]
    one = run(world, tmp_path / "one", *streamed(shards, tmp_path / "a", *settings))
    values = arguments(world, tmp_path / "two", *streamed(shards, tmp_path / "b", *settings))
    finish(launch("train/lora.py", *values, processes=2))
    two = load_file(tmp_path / "two" / "adapter" / "pytorch_lora_weights.safetensors")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_captions_are_counted_as_they_are_worded(world, tmp_path, capsys):
    forms = "{" + "a b c d e f g h i j " * 4 + "|x}"
    folder = tmp_path / "pictures"
    folder.mkdir()
    for picture in sorted((world / "pictures").glob("*.png"))[:2]:
        (folder / picture.name).write_bytes(picture.read_bytes())
        (folder / picture.name).with_suffix(".txt").write_text(forms + forms)
    where = f"data.path={folder}"
    run(world, tmp_path / "one", where, "data.captions.wildcards=true")
    assert "(2): " in capsys.readouterr().out  # 80 tokens where both are long
    run(
        world, tmp_path / "two", where, "data.captions.choose=first", "data.captions.max_tokens=225"
    )
    assert "cut at" not in capsys.readouterr().out
    suffix = "data.captions.suffix= " + "a " * 80
    run(world, tmp_path / "three", "data.captions.choose=first", suffix)
    assert "captions cut at 75 tokens (9)" in capsys.readouterr().out


def test_a_mask_without_any_white_is_named(world, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture = sorted((world / "pictures").glob("*.png"))[0]
    (folder / picture.name).write_bytes(picture.read_bytes())
    Image.new("L", Image.open(picture).size, 0).save(folder / f"{picture.stem}.mask.png")
    with pytest.raises(UserError, match=r"\.mask\.png is black all over"):
        where = f"data.path={folder}"
        run(world, tmp_path / "run", where, "data.masks=true", "data.caption=x")


def test_several_resolutions_train_in_one_run(world, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (50, 50), (48, 48), (64, 80)]):
        Image.new("RGB", size, (number * 60, 90, 30)).save(folder / f"{number}.png")
    run(
        world, tmp_path / "run", f"data.path={folder}", "data.caption=x", "data.resolution=[48, 64]"
    )
    assert dataset(tmp_path / "run")["buckets"] == {"48x48": 2, "64x64": 2}


def test_depth_maps_are_not_ignored_by_a_base_without_depth(world, tmp_path):
    with pytest.raises(UserError, match=r"data.depth=true: .* is no depth model"):
        run(world, tmp_path / "run", "data.depth=true")

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from data.records import FILE, Record
from eval.features import load_extractor
from eval.picture_scores import (
    FILE as SCORES,
)
from eval.picture_scores import (
    Aesthetic,
    CaptionLikeness,
    Nsfw,
    find_label,
    middle,
    read_head,
    score_all,
)
from tests.tiny import tiny_clip
from train.config import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_extractor(tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def records(tmp_path):
    return [record(tmp_path, number, (f"a picture {number}",)) for number in range(5)]


def record(folder, number, captions):
    file = folder / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Record(file.name, f"{FILE}{file}", captions, 60, 40, sha256)


def score(records, scorers, folder, **options):
    options = {"background": (255, 255, 255), "batch_size": 2} | options
    return score_all(records, scorers, folder, **options)


def head(folder, *, name="head.pth", sizes=(16, 4, 1)):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    # Drop-outs stand between the linear maps of the published file, and take numbers.
    state = {
        f"layers.{2 * k}.{kind}": tensor
        for k, layer in enumerate(layers)
        for kind, tensor in layer.state_dict().items()
    }
    file = folder / name
    (save_file if name.endswith("safetensors") else torch.save)(state, file)
    return file, layers


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
@pytest.mark.parametrize("relu", [False, True])
def test_the_aesthetic_score_is_the_head_of_the_unit_embedding(clip, records, tmp_path, name, relu):
    file, layers = head(tmp_path, name=name)
    found = score(records, [Aesthetic(clip, file, relu=relu)], tmp_path)["aesthetic"]
    squares = [middle(np.asarray(Image.open(record.path))) for record in records]
    values = torch.from_numpy(clip.images(squares))
    values = torch.nn.functional.normalize(values).float()
    hidden = layers[0](values).relu() if relu else layers[0](values)
    assert found == pytest.approx(layers[1](hidden)[:, 0].tolist(), abs=1e-5)


def test_a_head_of_another_clip_or_with_more_than_tensors_in_it_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not lead from the CLIP model's 768 numbers"):
        read_head(head(tmp_path)[0], 768)
    torch.save({"weight": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth cannot be read"):
        read_head(tmp_path / "evil.pth", 16)


def test_the_likeness_is_the_cosine_and_of_several_captions_the_mean(clip, records, tmp_path):
    both = record(tmp_path, 0, ("a picture 0", "something else"))
    found = score([*records, both], [CaptionLikeness(clip)], tmp_path)["clip"]
    image = clip.images([middle(np.asarray(Image.open(both.path)))])[0]
    texts = clip.texts(["a picture 0", "something else"])
    cosines = texts @ image / np.linalg.norm(texts, axis=1) / np.linalg.norm(image)
    assert found[0] == pytest.approx(cosines[0], abs=1e-6)
    assert found[5] == pytest.approx(cosines.mean(), abs=1e-6)


def test_known_scores_are_not_computed_again_and_a_torn_line_is(clip, records, tmp_path):
    class Counting(CaptionLikeness):
        seen = 0

        def score(self, pictures, captions):
            Counting.seen += len(pictures)
            return super().score(pictures, captions)

    first = score(records, [Counting(clip)], tmp_path)["clip"]
    file = tmp_path / SCORES
    file.write_bytes(file.read_bytes()[:-9])
    renamed = [record(tmp_path, 1, ("another caption",)), *records]
    again = score(renamed, [Counting(clip)], tmp_path)["clip"]
    assert again[1:] == pytest.approx(first)
    assert Counting.seen == 5 + 2  # the torn one, and the picture with another caption
    score(renamed, [Counting(clip)], tmp_path)
    assert Counting.seen == 7


def test_a_picture_that_was_changed_after_the_scan_is_not_scored_as_what_it_was(
    clip, records, tmp_path
):
    records[3].path.write_bytes(records[2].path.read_bytes())
    with pytest.raises(UserError, match=r"3\.png was changed"):
        score(records, [CaptionLikeness(clip)], tmp_path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nsfw")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_the_probability_is_that_of_the_label(classifier, records, tmp_path):
    unsafe = score(records, [Nsfw(classifier, label=None, device="cpu")], tmp_path)["nsfw"]
    safe = score(records, [Nsfw(classifier, label="normal", device="cpu")], tmp_path)["nsfw"]
    assert unsafe + safe == pytest.approx(np.ones(5))
    assert len(set(unsafe)) == 5


def test_a_label_that_is_not_there_is_named_with_those_that_are():
    assert find_label({0: "SFW", 1: "NSFW"}, "SFW") == 0
    with pytest.raises(UserError, match="drawings, neutral"):
        find_label({0: "drawings", 1: "neutral"}, None)
    with pytest.raises(UserError, match="cannot be loaded"):
        Nsfw("/nowhere", label=None, device="cpu")

import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from data import captioner
from data.captioner import Captioner
from scripts import caption
from tests.runs import finish, launch
from tests.tiny import tiny_tokenizer
from train.config import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "red"]
LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = LAYERS | {"image_size": 32, "patch_size": 16}
SIDES = {"height": 32, "width": 32}
IDS = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 0}
CHAT = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} it is:"
)


def blip(folder):
    ids = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = LAYERS | ids | {"vocab_size": len(WORDS), "encoder_hidden_size": 16}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessorPil(size=SIDES), tokenizer).save_pretrained(folder)
    return BlipForConditionalGeneration(config)


def vit_gpt2(folder):
    gpt2 = GPT2Config(vocab_size=190, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), gpt2)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 188, 189, 189
    tiny_tokenizer().save_pretrained(folder)
    ViTImageProcessorPil(size=SIDES).save_pretrained(folder)
    return VisionEncoderDecoderModel(config)


def git(folder):
    config = GitConfig(vision_config=VISION, vocab_size=190, **LAYERS, **IDS)
    GitProcessor(_clip_images(), tiny_tokenizer()).save_pretrained(folder)
    return GitForCausalLM(config)


def llava(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    text = LAYERS | IDS | {"model_type": "llama", "vocab_size": 191, "num_key_value_heads": 2}
    vision = VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=190)
    LlavaProcessor(
        _clip_images(),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return LlavaForConditionalGeneration(config)


def _clip_images():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDES)


FAMILIES = {"blip": blip, "vit-gpt2": vit_gpt2, "git": git, "llava": llava}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder per family: random weights, large enough that pictures make a difference."""
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model = make(folder / name)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def picture(seed, size=(40, 30)):
    """Some coloured squares."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for k in range(7):
        picture(k, (40, 30 + 9 * k)).save(folder / ("below" if k % 2 else "") / f"{k}.png")
    return folder


@pytest.fixture
def run(models, source, capsys):
    def run(*arguments):
        caption.main(
            [
                f"source={source}",
                f"model={models / 'vit-gpt2'}",
                "max_new_tokens=6",
                "batch_size=2",
                *arguments,
            ]
        )
        return capsys.readouterr().out

    return run


def texts(folder):
    paths = sorted([*folder.rglob("*.txt"), *folder.rglob("*.caption")])
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def load(folder):
    return Captioner.load(str(folder), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_what_the_model_writes_after_the_prompt(models, family):
    """Against the model's own generate, one picture at a time."""
    loaded = load(models / family)
    images = [picture(1), picture(2), picture(3, (32, 90))]
    for prompt in ("", "a photo"):
        written = loaded.caption(images, "abc", prompt=prompt, max_new_tokens=6)
        for image, found in zip(images, written, strict=True):
            inputs = loaded._inputs([image], prompt)
            tokens = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
            whole = " ".join(loaded.tokenizer.decode(tokens, skip_special_tokens=True).split())
            assert found and whole.endswith(found)
            if prompt and family != "llava":  # whose tokenizer here takes words apart
                assert whole.removesuffix(found).strip() == prompt
        assert len(set(written)) > 1


def test_the_prompt_is_found_however_the_model_repeats_it():
    def length(tokens, given):
        return captioner._prompt_length(torch.tensor([tokens]), torch.tensor([given]))

    assert captioner._prompt_length(torch.tensor([[1, 2]]), None) == 0
    assert length([5, 6, 7, 8], [5, 6]) == 2  # as it is
    assert length([9, 6, 7, 8], [5, 6, 7, 3]) == 3  # BLIP: another start, and no end
    assert length([0, 5, 6, 8], [5, 6]) == 3  # after a start
    assert length([0, 8, 9], [5, 6]) == 0  # not at all


def test_drawn_captions_depend_on_the_picture_and_the_seed_alone(models):
    loaded = load(models / "git")
    images, ids = [picture(k) for k in range(4)], ["a", "b", "c", "d"]
    how = {"max_new_tokens": 8, "temperature": 5.0}
    together = loaded.caption(images, ids, seed=1, **how)
    alone = [
        loaded.caption([image], [id], seed=1, **how)[0]
        for image, id in zip(images, ids, strict=True)
    ]
    assert together == alone
    assert loaded.caption(images, ids, seed=2, **how) != together
    assert len(set(loaded.caption([images[0]] * 4, ids, seed=1, **how))) > 1


def test_draws_follow_the_softmax():
    shares = torch.tensor([0.5, 0.3, 0.2])
    ids = [str(k) for k in range(3000)]
    scores = captioner._drawing(2.0, 0, ids)(None, (2 * shares.log()).expand(len(ids), 3))
    counts = Counter(scores.argmax(-1).tolist())
    assert all(abs(counts[k] / len(ids) - share) < 0.03 for k, share in enumerate(shares.tolist()))


def test_every_picture_gets_a_caption_and_none_that_has_one_is_touched(run, source):
    (source / "0.txt").write_text("by hand\n")
    (source / "2.caption").write_text("by hand, too")
    (source / "4.caption").write_text(" \n")
    (source / "below/1.txt").write_text("")
    Image.new("L", (40, 48)).save(source / "2.mask.png")
    assert "5 written, 2 kept as they are" in run("prefix=so: ", "suffix=.")
    found = texts(source)
    assert found.pop("0.txt") == "by hand\n" and found.pop("2.caption") == "by hand, too"
    assert set(found) == {"4.caption", "6.txt", "below/1.txt", "below/3.txt", "below/5.txt"}
    assert all(text.startswith("so: ") and text.endswith(".\n") for text in found.values())
    before = texts(source)
    assert "0 written, 7 kept" in run("prefix=other") and texts(source) == before
    assert "7 written, 0 kept" in run("prefix=other", "overwrite=true")
    assert set(texts(source)) == set(before)
    assert all(text.startswith("other") for text in texts(source).values())


def test_pictures_are_upright_and_the_same_in_any_batch(run, source):
    run()
    turned = picture(2, (40, 48)).transpose(Image.Transpose.ROTATE_90)
    turned.save(source / "turned.png")
    exif = Image.Exif()
    exif[274] = 6
    turned.save(source / "sideways.png", exif=exif)
    run("batch_size=5")
    assert texts(source)["sideways.txt"] == texts(source)["2.txt"] != texts(source)["turned.txt"]
    before = texts(source)
    run("batch_size=3", "overwrite=true")
    assert texts(source) == before


def test_what_cannot_be_captioned_is_named(run, source):
    (source / "broken.png").write_bytes((source / "0.png").read_bytes()[:60])
    (source / "text.jpg").write_text("no picture")
    (source / "0.jpg").write_bytes((source / "2.png").read_bytes())
    (source / "2.txt").mkdir()
    (source / "4.txt").write_bytes(b"caf\xe9")
    os.mkfifo(source / "6.txt")
    out = run()
    assert "4 written" in out and "not captioned (7)" in out
    assert "0.png: would share its caption with 0.jpg" in out
    assert "2.png: 2.txt is in the way" in out and "6.png: 6.txt is in the way" in out
    assert "4.txt is not UTF-8" in out and "text.jpg: is not a picture" in out
    assert "broken.png: cannot be decoded" in out
    with pytest.raises(UserError, match="on_bad_image=abort"):
        run("on_bad_image=abort")


def test_an_unreadable_picture_can_stop_the_command(run, source):
    (source / "5.jpg").write_text("no picture")
    with pytest.raises(UserError, match="5.jpg: is not a picture"):
        run("on_bad_image=abort", "batch_size=1")


def test_a_model_that_says_nothing_leaves_no_file(run, source, monkeypatch):
    monkeypatch.setattr(Captioner, "caption", lambda self, images, ids, **how: [""] * len(ids))
    out = run()
    assert "0 written" in out and "nothing to say about (7)" in out
    assert not texts(source)


def test_a_caption_written_in_the_meantime_is_kept(run, source, monkeypatch):
    def slow(self, images, ids, **how):
        (source / "0.txt").write_text("by hand")
        return ["by model"] * len(ids)

    monkeypatch.setattr(Captioner, "caption", slow)
    assert "6 written, 1 kept" in run()
    assert texts(source)["0.txt"] == "by hand"


def test_an_interrupted_command_goes_on_where_it_was(run, source, monkeypatch):
    original, calls = Captioner.caption, []

    def interrupted(self, images, ids, **how):
        calls.append(list(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, images, ids, **how)

    monkeypatch.setattr(Captioner, "caption", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    first = {path: path.stat().st_mtime_ns for path in source.rglob("*.txt")}
    assert len(first) == 4
    assert "3 written, 4 kept" in run()
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert [len(ids) for ids in calls] == [2, 2, 2, 2, 1]


def test_captions_go_where_the_folder_has_them(run, source):
    (source / "below").rename(source / "images")
    (source / "texts").mkdir()
    (source / "texts/1.txt").write_text("by hand")
    assert "2 written, 1 kept" in run()
    assert set(texts(source)) == {"texts/1.txt", "texts/3.txt", "texts/5.txt"}


def test_mistakes_are_told_before_anything_is_loaded(run, source, models, tmp_path, monkeypatch):
    monkeypatch.setattr(Captioner, "load", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    wrong = {
        "temperature=1 beams=2": "leave one of them out",
        "model=/gone": "no such folder",
        f"model={tmp_path / 'pickled'}": "no .safetensors file",
        f"model={source}": "no config.json",
        f"source={tmp_path / 'gone'}": "does not exist",
        f"source={models}": "holds no pictures",
        "extension=.md": "extension",
    }
    for arguments, message in wrong.items():
        with pytest.raises(UserError, match=message):
            run(*arguments.split())
    (source / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    with pytest.raises(UserError, match="holds a metadata file"):
        run()


def test_models_that_do_not_write_about_pictures_are_refused(run, models, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    ViTConfig(**VISION).save_pretrained(other)
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(UserError, match="could not be loaded as a model that writes"):
        run(f"model={other}")
    for file in (models / "blip").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = load_file(other / "model.safetensors")
    kept = {name: value for name, value in state.items() if "text_decoder" not in name}
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"):
        run(f"model={other}")


def arguments(models, source):
    return [f"source={source}", f"model={models / 'git'}", "temperature=3", "max_new_tokens=6"]


def test_two_processes_write_what_one_writes(models, source):
    output = finish(launch("scripts/caption.py", *arguments(models, source), processes=2))
    assert "captions: 7 written, 0 kept" in output
    both = texts(source)
    caption.main([*arguments(models, source), "overwrite=true"])
    assert len(both) == 7 and texts(source) == both


@pytest.mark.slow
def test_what_a_killed_process_began_two_finish(models, source):
    for k in range(100):
        picture(k).save(source / f"more-{k:03}.png")
    many = [*arguments(models, source), "batch_size=1", "max_new_tokens=60"]
    process = launch("scripts/caption.py", *many)
    while len(texts(source)) < 10 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    first = texts(source)
    assert 10 <= len(first) < 100
    output = finish(launch("scripts/caption.py", *many, processes=2))
    assert f"written, {len(first)} kept" in output
    assert len(texts(source)) > 100 and texts(source).items() >= first.items()

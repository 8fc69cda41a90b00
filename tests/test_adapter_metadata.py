"""What an exported file says of itself: all of it there, of the right kind, and true."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import kohya_by_hand
from tests.runs import arguments, make_world
from tests.test_kohya import ALL, FILE, TEXT
from tests.tiny import tiny_pipeline
from train import (
    adapter_file,
    adapter_metadata,
    adapters,
    export,
    kohya,
    pictures,
    rundir,
    stored_tensors,
)
from train import training_metadata as training
from train.adapter_file import Adapter
from train.config import DiffusionConfig, LoraConfig, LoraRun, SourceConfig, UserError, load
from train.models import reschedule
from train.safetensors_file import MAX_HEADER_BYTES, read_header

INTEGERS = """batch_size_per_device total_batch_size epoch num_epochs steps max_train_steps seed
    num_train_images num_reg_images num_batches_per_epoch gradient_accumulation_steps session_id
    lr_warmup_steps min_bucket_reso max_bucket_reso keep_tokens network_dim"""
FLOATS = """learning_rate unet_lr text_encoder_lr training_started_at training_finished_at
    network_alpha max_grad_norm caption_dropout_rate caption_tag_dropout_rate min_snr_gamma
    noise_offset"""
FLAGS = """v2 gradient_checkpointing full_fp16 cache_latents lowram flip_aug color_aug random_crop
    shuffle_caption enable_bucket bucket_no_upscale zero_terminal_snr debiased_estimation"""
MAPPINGS = "tag_frequency dataset_dirs reg_dataset_dirs bucket_info network_args"
WORDS = """base_model_version network_module output_name sd_model_name mixed_precision lr_scheduler
    optimizer resolution clip_skip training_comment loss_type max_token_length"""
KINDS = {
    INTEGERS: r"\d+",
    FLOATS: r"\d+\.\d+|\d+e-\d+",
    FLAGS: "True|False",
    MAPPINGS: r"\{.*\}",
    WORDS: ".+",
}
SPEC = """sai_model_spec architecture implementation title resolution date prediction_type
    hash_sha256 implementation_version trigger_phrase"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """What a run leaves, without its training."""
    folder = tmp_path_factory.mktemp("runs") / "my-owl"
    changes = ["diffusion.min_snr_gamma=5", "diffusion.noise_offset=0.05", "train.batch_size=8"]
    changes += ["data.captions.trigger=sks", "train.mixed_precision=bf16", "lora.rank=4"]
    changes += ["lora.text_encoder.rank=3", "train.micro_batch_size=2", "optim.warmup_steps=2"]
    config = load(LoraRun, arguments(world, folder, *changes))
    found = pictures.find(config.data)
    counts = {"buckets": found.bucket_counts(), "pictures": len(found.records)}
    sources = [{"name": "pictures", "path": str(world / "pictures"), "pictures": 9}]
    said = f"9 pictures, as {world} holds no metadata.jsonl"
    base = {"path": str(world / "base"), "family": "SD 2", "prediction_type": "v_prediction"}
    manifest = {
        "base": base | {"resolution": 768, "timesteps": 1000},
        "dataset": {"sources": sources, "recognised": said, **counts, "note": f"see {world}/x y"},
        "processes": 2,
    }
    rundir.create(config, manifest)
    lines = [{"step": step, "epoch": step / 4, "loss": 0.5} for step in range(1, 7)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    pipeline = tiny_pipeline()
    settings = LoraConfig(rank=4, alpha=6, targets=ALL, text_encoder=TEXT)
    adapters.attach(pipeline, settings, seed=0)
    export.save_lora(pipeline, folder / "adapter")
    export.save_scheduler(pipeline, folder / "adapter")
    return folder


def written(run, output, **changes) -> dict[str, str]:
    file = run / "adapter" / FILE
    about = adapter_metadata.of_run(run, file, "lora") | changes
    kohya.write(file, output, metadata=about, dtype=torch.float16)
    return kohya_by_hand.read(output)[1]


def test_every_key_is_there_and_of_its_kind(run, tmp_path):
    found = written(run, tmp_path / "a.safetensors")
    for keys, pattern in KINDS.items():
        for key in keys.split():
            assert re.fullmatch(pattern, found[f"ss_{key}"]), (key, found[f"ss_{key}"])
    for key in SPEC.split():
        assert found[f"modelspec.{key}"] not in ("", "None"), key
    assert found["sshs_model_hash"] == kohya_by_hand.model_hash(tmp_path / "a.safetensors")
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    assert list(found) == sorted(found)


def test_they_are_true(run):
    found = adapter_metadata.of_run(run, run / "adapter" / FILE, "lora")
    wanted = {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "6.0",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "6.0"}',
        "ss_output_name": "my-owl",
        "ss_sd_model_name": "base",
        "ss_batch_size_per_device": "2",
        "ss_gradient_accumulation_steps": "2",
        "ss_num_train_images": "9",
        "ss_num_batches_per_epoch": "4",
        "ss_epoch": "2",
        "ss_steps": "6",
        "ss_min_snr_gamma": "5.0",
        "ss_mixed_precision": "bf16",
        "ss_resolution": "(64, 64)",
        "ss_clip_skip": "None",
        "ss_keep_tokens": "0",
        "ss_dataset_dirs": '{"pictures": {"n_repeats": 1, "img_count": 9}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.prediction_type": "v",
        "modelspec.resolution": "64x64",
        "modelspec.title": "my-owl",
        "modelspec.trigger_phrase": "sks",
    }
    assert {key: found[key] for key in wanted} == wanted
    assert float(found["ss_training_started_at"]) <= float(found["ss_training_finished_at"])
    buckets = json.loads(found["ss_bucket_info"])["buckets"]
    assert sum(bucket["count"] for bucket in buckets.values()) == 9
    assert buckets["0"]["resolution"] == [48, 80]
    tags = json.loads(found["ss_tag_frequency"])["pictures"]
    assert sum(tags.values()) == 9 and all(" on a " in tag for tag in tags)


def test_our_own_record_is_whole_and_names_no_one_s_folders(run, world):
    found = adapter_metadata.of_run(run, run / "adapter" / FILE, "lora")
    record = json.loads(found["sd_atelier"])
    assert record["config"]["lora"]["rank"] == 4
    assert record["config"]["model"]["path"] == "base"
    assert record["manifest"]["base"]["family"] == "SD 2"
    assert record["scheduler"]["prediction_type"] == "v_prediction"
    assert not [key for key, value in found.items() if str(world.parent) in value]
    assert not [key for key, value in found.items() if str(run.parent) in value]


@pytest.mark.parametrize(
    ("family", "prediction", "version", "architecture"),
    [
        ("SD 2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("SD 2", "epsilon", "sd_v2", "stable-diffusion-v2-512"),
        ("SD 1", "epsilon", "sd_v1", "stable-diffusion-v1"),
        ("SD 2 depth", "epsilon", "sd_v2", "stable-diffusion-v2-depth"),
        ("SD 2 inpainting", "epsilon", "sd_v2", "stable-diffusion-v2-inpainting"),
    ],
)
def test_the_base_is_named_as_others_name_it(tmp_path, family, prediction, version, architecture):
    (tmp_path / "config.yaml").write_text("output: x\n")
    base = {"family": family, "prediction_type": prediction, "path": "me/base", "kind": "hub id"}
    (tmp_path / "manifest.json").write_text(json.dumps({"base": base}))
    for kind in ("lora", "textual-inversion", "model"):
        found = adapter_metadata.of(None, tmp_path, name="x", kind=kind)
        if kind == "model":  # its folder tells better
            assert not {"modelspec.architecture", "modelspec.prediction_type"} & found.keys()
        else:
            assert found["modelspec.architecture"] == f"{architecture}/{kind}"
        assert found["ss_base_model_version"] == version
        assert found["ss_v2"] == str(family.startswith("SD 2"))
        assert found["ss_sd_model_name"] == "me/base"


def test_an_override_of_what_is_predicted_counts(tmp_path):
    (tmp_path / "config.yaml").write_text("diffusion: {prediction_type: epsilon}\n")
    base = {"family": "SD 2", "prediction_type": "v_prediction"}
    (tmp_path / "manifest.json").write_text(json.dumps({"base": base}))
    found = adapter_metadata.of(None, tmp_path, name="x", kind="lora")
    assert found["ss_base_model_version"] == "sd_v2"
    assert found["modelspec.prediction_type"] == "epsilon"


def test_a_torn_run_gives_what_it_has(tmp_path):
    found = adapter_metadata.of(None, tmp_path, name="x", kind="model")
    assert found["ss_output_name"] == "x" and found["ss_steps"] == "None"
    assert found["ss_tag_frequency"] == "{}" and "ss_v2" not in found
    assert not {"ss_num_train_images", "ss_dataset_dirs"} & found.keys()
    assert found["modelspec.title"] == "x" and "modelspec.architecture" not in found
    (tmp_path / "config.yaml").write_text("[")
    (tmp_path / "manifest.json").write_text("{")
    assert adapter_metadata.of(None, tmp_path, name="x", kind="model")["ss_seed"] == "None"


def test_of_every_path_the_name_alone_is_published(tmp_path):
    config = {
        "output": "runs/jane/x",
        "model": {"path": "data/jane", "config": "jane/family"},
        "data": {"path": "data/jane/p", "sources": [{"path": "../jane/q", "class_path": "jane/r"}]},
        "evaluation": {"path": "data/jane/e", "clip": "jane/clip", "images": 8},
        "preview": {"prompts": ["a/b jane-free"], "images": ["jane/1.png", "jane/2.png"]},
        "lora": {"start_from": "runs/jane/old/"},
    }
    before = "data.path: 'jane/before' -> PosixPath('data/jane/p')"
    manifest = {
        "base": {"path": "data/jane", "kind": "diffusers folder", "family": "SD 1"},
        "changes": [{"step": 1, "changes": [before]}],
        "note": "see data/jane/e, runs/jane/x/log",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = adapter_metadata.of(None, tmp_path, name="x", kind="lora")
    record = json.loads(found["sd_atelier"])
    assert found["ss_sd_model_name"] == record["config"]["model"]["path"] == "jane"
    assert "jane/" not in json.dumps(found) and "/jane" not in json.dumps(found)
    assert record["config"]["preview"] == {
        "prompts": ["a/b jane-free"],
        "images": ["1.png", "2.png"],
    }
    assert record["config"]["data"]["sources"] == [{"path": "q", "class_path": "r"}]
    assert record["manifest"]["note"] == "see e, x/log"


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        ("me/base", "hub id", "me/base"),
        ("me/base", "diffusers folder", "base"),
        ("me/base", None, "base"),
        ("me/b.safetensors", "hub id", "b.safetensors"),
        ("C:\\me\\b.safetensors", "single file", "b.safetensors"),
    ],
)
def test_a_base_has_its_whole_name_where_it_is_the_hub_s(tmp_path, path, kind, name):
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"path": path}}))
    base = {"family": "SD 1", "path": path, "kind": kind}
    (tmp_path / "manifest.json").write_text(json.dumps({"base": base}))
    found = adapter_metadata.of(None, tmp_path, name="x", kind="lora")
    record = json.loads(found["sd_atelier"])
    names = (found["ss_sd_model_name"], record["config"]["model"]["path"])
    assert {*names, record["manifest"]["base"]["path"]} == {name}


# Without a run


def test_nothing_is_read_of_the_folder_it_is_run_in(tmp_path, monkeypatch):
    (tmp_path / "full" / "scheduler").mkdir(parents=True)
    file = tmp_path / "full" / "scheduler" / "scheduler_config.json"
    file.write_text('{"prediction_type": "v_prediction"}')
    monkeypatch.chdir(tmp_path)
    assert adapter_metadata.About.of(None, None, "x", "model").prediction is None
    assert adapter_metadata.of(None, None, name="x", kind="model")["modelspec.title"] == "x"


def test_a_file_keeps_what_it_says_of_itself(run, tmp_path):
    before = written(run, tmp_path / "a.safetensors")
    after = adapter_metadata.of(tmp_path / "a.safetensors", None, name="mine", kind="lora")
    new = {key for key in before if after.get(key) != before[key]}
    assert new == {
        *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),  # of the new file
        *("ss_output_name", "modelspec.title"),
    }
    assert after["modelspec.title"] == after["ss_output_name"] == "mine"


def bare(tmp_path, width, **metadata) -> Path:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_"
    state = {f"{layer}A.weight": torch.zeros(2, width), f"{layer}B.weight": torch.zeros(64, 2)}
    save_file(state, tmp_path / "bare.safetensors", metadata or None)
    return tmp_path / "bare.safetensors"


def test_of_a_bare_file_the_family_is_told_and_nothing_invented(tmp_path):
    first = adapter_metadata.of(bare(tmp_path, 768), None, name="x", kind="lora")
    assert (first["ss_v2"], first["ss_base_model_version"]) == ("False", "sd_v1")
    assert first["modelspec.architecture"] == "stable-diffusion-v1/lora"
    second = adapter_metadata.of(bare(tmp_path, 1024), None, name="x", kind="lora")
    assert second["ss_v2"] == "True" and second["ss_network_dim"] == "2"
    assert not {"ss_base_model_version", "modelspec.architecture", "ss_steps"} & second.keys()
    known = bare(tmp_path, 1024, ss_base_model_version="sd_v2_v")
    third = adapter_metadata.of(known, None, name="x", kind="lora")
    assert third["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"


def test_an_embedding_has_its_word(tmp_path):
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"<owl>": torch.ones(2, 768)}, file)
    about = adapter_metadata.of(file, None, name="owl", kind="textual-inversion")
    kohya.write_embedding(file, tmp_path / "owl.safetensors", metadata=about, dtype=torch.float32)
    _, found = kohya_by_hand.read(tmp_path / "owl.safetensors")
    assert found["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert found["modelspec.trigger_phrase"] == "<owl>"
    assert found["sshs_model_hash"] == kohya_by_hand.model_hash(tmp_path / "owl.safetensors")


# What readers of ours make of it


def test_the_scheduler_it_was_trained_for_travels_in_the_file(run, tmp_path):
    """Without a scheduler/ beside it."""
    pipeline = tiny_pipeline()
    pipeline.base_scheduler = pipeline.scheduler
    pipeline.scheduler = reschedule(pipeline.scheduler, DiffusionConfig(zero_terminal_snr=True))
    export.save_scheduler(pipeline, run / "adapter")
    written(run, tmp_path / "a.safetensors")
    one = [Adapter(tmp_path / "a.safetensors", 1.0)]
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert adapter_file.trained_with(one) == told
    adapter_file.check_prediction(one, "v_prediction")
    with pytest.raises(UserError, match="a.safetensors was trained on a base that predicts v_pred"):
        adapter_file.check_prediction(one, "epsilon")


@pytest.mark.parametrize("record", ["[]", "{", '{"scheduler": {"prediction_type": "evil"}}'])
def test_somebody_else_s_record_is_nothing(tmp_path, record):
    file = bare(tmp_path, 1024, sd_atelier=record)
    assert not adapter_file.trained_with([Adapter(file, 1.0)])


def test_kohya_s_word_on_what_a_base_predicts_is_passed_on(tmp_path, capsys):
    one = [Adapter(bare(tmp_path, 1024, ss_base_model_version="sd_v2_v"), 1.0)]
    adapter_file.check_prediction(one, "v_prediction")
    assert not capsys.readouterr().out
    adapter_file.check_prediction(one, "epsilon")
    assert "says that its base predicts v_prediction (sd_v2_v)" in capsys.readouterr().out


def test_tags_are_counted_and_the_rare_ones_left_out_where_they_are_too_many():
    source = SourceConfig(path="x")
    captions = [["a Cat, red"], ["a cat ,blue, "], ["a cat", "red"]]
    assert training.counted(captions, source, 99) == {"a cat": 3, "red": 2, "blue": 1}
    assert training.counted(captions, source, 35) == {"a cat": 3, "red": 2}


def test_tags_are_bounded_by_the_bytes_that_they_take():
    tags = [f'{i}猫\\"😀' for i in range(1000)]
    counts = training.counted([[tag] for tag in tags], SourceConfig(path="x"), 10_000)
    inner = json.dumps({"ss_tag_frequency": json.dumps({"x": counts})}, ensure_ascii=False)
    assert 0 < len(counts) < 1000 and 9_900 < len(inner.encode()) <= 10_100


def test_a_header_can_always_be_read_back(tmp_path):
    large = {"ss_seed": "1", "ss_tag_frequency": "\\" * (MAX_HEADER_BYTES // 2)}
    file = tmp_path / "a.safetensors"
    (said,) = adapter_metadata.write(file, {"a": torch.ones(2)}, large)
    assert "ss_tag_frequency is left out" in said
    found = read_header(file).metadata
    assert found["ss_seed"] == "1" and "ss_tag_frequency" not in found
    with pytest.raises(UserError, match="b.safetensors: its metadata would be over 10 MB"):
        huge = {"sd_atelier": "x" * MAX_HEADER_BYTES}
        adapter_metadata.write(tmp_path / "b.safetensors", {"a": torch.ones(2)}, huge)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_model_s_file_has_kohya_s_hash_beside_kohya_s_entries(tmp_path):
    stored = {"a": stored_tensors.of_tensor(torch.arange(3.0))}
    for entries in ({"ss_steps": "1"}, {}):
        stored_tensors.write(tmp_path / "a", stored, entries, hashed="modelspec.hash_sha256")
        found = read_header(tmp_path / "a").metadata
        told = kohya_by_hand.model_hash(tmp_path / "a")
        assert found["modelspec.hash_sha256"] == f"0x{told}"
        assert found.get("sshs_model_hash") == (told if entries else None)

"""Case 27: an adapter of SD 1, of SDXL or of another rank, to go on from or to generate with -> an
error that says so, before the base is loaded; nothing is applied and nothing is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.hostile import all_refused
from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.runs import arguments
from tests.tiny import tiny_pipeline
from train import adapters, export
from train.config import LoraConfig

FILE = "pytorch_lora_weights.safetensors"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
NEVER_LOADED = [Fault(at="train.models:load_pipeline", do="exit:77")]
WITHOUT = [
    Removal(
        "the family of an adapter is told from its header",
        "train/adapter_file.py",
        "    _check_family(file, layers, base)\n",
        "",
        "go_on",
    ),
    Removal(
        "what is to be generated with is checked before the base is loaded",
        "scripts/generation/pipelines.py",
        "    if folder.is_dir():\n",
        "    if False:\n",
        "generated",
    ),
    Removal(
        "every layer of an adapter must be one of the base's",
        "train/adapter_file.py",
        "if shape is None or inputs",
        "if False and inputs",
        "go_on",
    ),
    Removal(
        "the rank must be the run's",
        "train/start_from.py",
        "if found.rank != wanted.rank:",
        "if False:",
        "go_on",
    ),
    Removal(
        "an embedding must be as wide as the base's",
        "train/adapter_file.py",
        "    if shape[-1] != width:",
        "    if False:",
        "generated",
    ),
]


def sd1(state):
    return {k: torch.zeros(2, 768) if "attn2.to_k.lora_A" in k else v for k, v in state.items()}


def sdxl(state):
    return {k: torch.zeros(2, 2048) if "attn2.to_k.lora_A" in k else v for k, v in state.items()}


def sdxl_in_kohya_s_spelling(state):
    text = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    return {
        f"{text}.lora_down.weight": torch.zeros(2, 9),
        f"{text}.lora_up.weight": torch.zeros(9, 2),
    }


def deeper(state):
    return state | {k.replace("mid_block", "mid_block_2"): v for k, v in state.items()}


def other_rank(state):
    return {k: torch.zeros(4, v.shape[1]) if "_A" in k else torch.zeros(v.shape[0], 4)
            for k, v in state.items()}  # fmt: skip


FOREIGN = [
    (sd1, "is an adapter of Stable Diffusion 1"),
    (sdxl, "is an adapter of Stable Diffusion XL"),
    (sdxl_in_kohya_s_spelling, "is an adapter of Stable Diffusion XL"),
    (deeper, "the base has no such layer"),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An adapter of the world's base, of rank 2."""
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = tiny_pipeline()
    adapters.attach(pipeline, LoraConfig(rank=2, alpha=4), seed=0)
    export.save_lora(pipeline, folder)
    return folder / FILE


@pytest.fixture
def foreign(own, tmp_path):
    """Files of FOREIGN with what is to be said of each."""
    found = []
    for make, words in FOREIGN:
        state = {k: v.clone() for k, v in make(load_file(own)).items()}
        save_file(state, tmp_path / f"{make.__name__}.safetensors")
        found.append((tmp_path / f"{make.__name__}.safetensors", words))
    return found


def test_a_run_does_not_go_on_from_one(starter, world, own, foreign, tmp_path):
    save_file(other_rank(load_file(own)), tmp_path / "rank.safetensors")
    files = [*foreign, (tmp_path / "rank.safetensors", "has rank 4, and lora.rank or lora.blocks")]
    commands = [
        arguments(world, tmp_path / f"run-{file.stem}", f"lora.start_from={file}")
        for file, _ in files
    ]
    outputs = all_refused(starter, "train/lora.py", commands, faults=NEVER_LOADED)
    for (file, words), said in zip(files, outputs, strict=True):
        assert f"error: lora.start_from={file} " in said and words in said, said
    assert not list(tmp_path.glob("run-*"))


def test_nothing_is_generated_with_one(starter, world, own, foreign, tmp_path):
    save_file({"<owl>": torch.zeros(1, 768)}, tmp_path / "word.safetensors")
    files = [*foreign, (tmp_path / "word.safetensors", "an embedding of Stable Diffusion 1")]
    base = [f"model={world / 'base'}", f"output={tmp_path / 'out'}", "prompt=a cat"]
    commands = [[*base, f"adapters=[{own}, {file}]"] for file, _ in files]
    outputs = all_refused(starter, "scripts/generate.py", commands, faults=NEVER_LOADED)
    for (file, words), said in zip(files, outputs, strict=True):
        assert f"error: {file} " in said and words in said, said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_that_fits_is_taken(starter, world, own, tmp_path):
    how = ("train.steps=2", "preview.every=0", "validation.every=0")
    run = arguments(world, tmp_path / "run", f"lora.start_from={own}", *how)
    starter.finish("train/lora.py", *run)
    assert (tmp_path / "run" / "adapter" / FILE).is_file()

"""Case 26: textual inversion of a word that the base has, or whose second embedding's name it has
-> refused; of a new one, all its n embeddings change, and every other row of the table and every
file of the base stay as they are, to the bit."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.runs import arguments
from train import models

ENTRY = "train/textual_inversion.py"
WITHOUT = [
    Removal(
        "a word that the base has is refused",
        "train/new_tokens.py",
        'if name in words or f"{name}{_END}" in words:',
        "if False:",
        "base_has",
    ),
    Removal(
        "the name of the second embedding is looked for too",
        "train/new_tokens.py",
        "for name in embedding_names(token, 2):",
        "for name in embedding_names(token, 1):",
        "second",
    ),
    Removal(
        "every embedding of the word is trained",
        "train/embeddings.py",
        "return self.rows * (",
        "return torch.cat([self.rows[:1], self.rows[1:].detach()]) * (",
        "change",
    ),
    Removal(
        "the rest of the table is frozen",
        "train/embeddings.py",
        "table.weight.requires_grad_(False)",
        "table.weight.requires_grad_(True)",
        "change",
    ),
]


def words(token="<owl>", vectors=3):
    tokens = [{"token": token, "initial": "owl", "vectors": vectors}]
    return f"textual_inversion.tokens={json.dumps(tokens)}"


def settings(world, output, *more):
    prompts = "preview.prompts=[a small <owl>]"
    return arguments(world, output, "lora=null", words(), prompts, *more)


def hashes(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


NEVER_LOADED = [Fault(at="train.models:load_pipeline", do="exit:77")]


@pytest.mark.parametrize("token", ["a", "!"])
def test_a_word_that_the_base_has_is_refused_before_it_is_loaded(starter, world, tmp_path, token):
    run = settings(world, tmp_path / "run", words(token))
    said = starter.finish(ENTRY, *run, code=2, faults=NEVER_LOADED)
    assert f"token={token} is not new" in said and not (tmp_path / "run").exists()


def test_so_is_one_whose_second_embedding_has_a_name_that_is_there(starter, world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    tokenizer = models.load_pipeline(str(base)).tokenizer
    tokenizer.add_tokens(["<owl>_1"])
    tokenizer.save_pretrained(base / "tokenizer")
    run = settings(world, tmp_path / "run", f"model.path={base}")
    said = starter.finish(ENTRY, *run, code=2, faults=NEVER_LOADED)
    assert "token=<owl> is not new, the base's vocabulary has <owl>_1" in said
    two = [{"token": token, "initial": "owl"} for token in ("<owl>", "<owl>_1")]
    both = settings(world, tmp_path / "run", f"textual_inversion.tokens={json.dumps(two)}")
    assert "part of another" in starter.finish(ENTRY, *both, code=2, faults=NEVER_LOADED)


@pytest.mark.slow
def test_all_embeddings_of_a_word_change_and_nothing_else_does(starter, world, tmp_path):
    before = hashes(world / "base")
    run = tmp_path / "run"
    starter.finish(ENTRY, *settings(world, run))
    assert hashes(world / "base") == before

    base = models.load_pipeline(str(world / "base"))
    table = base.text_encoder.get_input_embeddings().weight.detach().clone()
    ids = base.tokenizer("owl", add_special_tokens=False).input_ids
    ((name, learned),) = load_file(run / "adapter" / "learned_embeds.safetensors").items()
    assert name == "<owl>" and learned.shape == (3, table.shape[1]) and len(ids) == 3
    assert (learned != table[ids]).any(dim=1).all()
    saved = load_file(run / "checkpoints" / "step-00000006" / "model.safetensors")
    assert [tuple(value.shape) for value in saved.values()] == [(3, table.shape[1])]

    base.load_textual_inversion(str(run / "adapter"), weight_name="learned_embeds.safetensors")
    after = base.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(after[: len(table)], table)
    new = base.tokenizer.convert_tokens_to_ids(["<owl>", "<owl>_1", "<owl>_2"])
    assert torch.equal(after[new], learned) and min(new) >= len(table)

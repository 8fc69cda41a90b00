"""Case 28: an adapter or a base that is a pickle with a payload, under its own name or another's,
or that brings code of its own -> refused, or read without it; the payload never runs."""

import json
import pickle
import shutil

import pytest

from tests.faults.hostile import all_refused, pickled
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "adapters are safetensors by name",
        "train/adapter_file.py",
        '    if path.suffix != ".safetensors":',
        "    if False:",
        "adapters",
    ),
    Removal(
        "a file that is called safetensors is read as nothing else",
        "train/adapter_file.py",
        "    return {name: entry.shape for name, entry in read_header(file).tensors.items()}",
        "    import pickle\n\n    return pickle.loads(file.read_bytes())",
        "adapters",
    ),
    Removal(
        "bases are safetensors by name",
        "train/inspection.py",
        '    if path.is_file() or path.suffix in (".ckpt", ".pt", ".bin", ".pth"):',
        "    if False:",
        "bases",
    ),
    Removal(
        "every part of a base must have safetensors",
        "train/inspection.py",
        '    raise UserError(f"model.path={path}: {part}/ has no {name}.safetensors; {remedy}")',
        "    return 0",
        "bases",
    ),
    Removal(
        "a base's parts are of known classes",
        "train/inspection.py",
        "    _check_classes(str(path), index)\n",
        "",
        "own_code",
    ),
]
CODE = (
    "import os\nos.mkdir({!r})\nclass Evil:\n    from_pretrained = classmethod(lambda *a, **k: 0)\n"
)


@pytest.fixture
def canary(tmp_path):
    """A folder that a payload would make."""
    control = tmp_path / "control"
    pickle.loads(pickled(control))
    assert control.is_dir()
    return tmp_path / "canary"


def adapters(folder, canary):
    content = pickled(canary)
    names = ["a.bin", "a.pt", "a.ckpt", "renamed.safetensors", "a.pkl"]
    for name in names:
        (folder / name).write_bytes(content)
    for name in ("pytorch_lora_weights.bin", "learned_embeds.bin", "pytorch_lora_weights.pt"):
        (folder / name.replace(".", "-")).mkdir()
        (folder / name.replace(".", "-") / name).write_bytes(content)
    inner = folder / "inner"
    inner.mkdir()
    (inner / "pytorch_lora_weights.safetensors").write_bytes(content)
    return [path for path in sorted(folder.iterdir()) if path.name not in ("control", "canary")]


@pytest.mark.slow
def test_adapters_that_are_pickles_are_refused(starter, world, canary, tmp_path):
    files = adapters(tmp_path, canary)
    assert len(files) == 9
    starts = [
        arguments(world, tmp_path / f"run-{number}", f"lora.start_from={file}")
        for number, file in enumerate(files)
    ]
    said = all_refused(starter, "train/lora.py", starts)
    base = [f"model={world / 'base'}", f"output={tmp_path / 'out'}", "prompt=a cat"]
    said += all_refused(starter, "scripts/generate.py", [[*base, f"adapters={f}"] for f in files])
    assert not canary.exists() and not list(tmp_path.glob("run-*"))
    for file, text in zip([*files, *files], said, strict=True):
        if file.is_dir() and file.name != "inner":
            assert f"{file} has no pytorch_lora_weights.safetensors" in text
        elif file.suffix == ".safetensors" or file.name == "inner":
            assert "cannot be read as safetensors" in text
        else:
            assert f"{file} is not a .safetensors file. Pickles can run code" in text


def copied(world, folder):
    shutil.copytree(world / "base", folder)
    return folder


def test_bases_that_are_pickles_are_refused(starter, world, canary, tmp_path):
    content = pickled(canary)
    for name in ("sd.ckpt", "sd.bin", "sd.safetensors"):
        (tmp_path / name).write_bytes(content)
    expected = {
        tmp_path / "sd.ckpt": "Pickled checkpoints can run code",
        tmp_path / "sd.bin": "Pickled checkpoints can run code",
        tmp_path / "sd.safetensors": "cannot be read as safetensors",
    }
    parts = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, name in parts.items():
        base = copied(world, tmp_path / f"base-{part}")
        (base / part / f"{name}.safetensors").unlink()
        (base / part / f"{name.replace('model', 'pytorch_model') if part != 'unet' else name}.bin"
         ).write_bytes(content)  # fmt: skip
        expected[base] = f"{part}/ has no {name}.safetensors; only the pickle"
    renamed = copied(world, tmp_path / "renamed")
    (renamed / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    expected[renamed] = "cannot be read as safetensors"
    refused_bases(starter, world, expected, tmp_path)
    assert not canary.exists()


def refused_bases(starter, world, expected, folder):
    """Runs on each of the bases, which must be refused with the words that are expected."""
    runs = [
        arguments(world, folder / f"run-{number}", f"model.path={path}")
        for number, path in enumerate(expected)
    ]
    outputs = all_refused(starter, "train/lora.py", runs)
    for words, said in zip(expected.values(), outputs, strict=True):
        assert words in said


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_parts_of_a_base_s_own_code_are_refused(starter, world, canary, tmp_path):
    expected = {}
    for name, part, said in (
        ("own", "unet", ["evil", "Evil"]),
        ("any", "tokenizer", ["transformers", "AutoTokenizer"]),
        ("call", "vae", ["os", "system"]),
        ("text", "scheduler", "x"),
    ):
        base = copied(world, tmp_path / name)
        (base / part / "evil.py").write_text(CODE.format(str(canary)))
        edit(base / "model_index.json", **{part: said})
        expected[base] = f"model_index.json makes {part} of {said!r}"
    base = copied(world, tmp_path / "pipeline")
    (base / "pipeline.py").write_text(CODE.format(str(canary)))
    edit(base / "model_index.json", _class_name=["pipeline", "Evil"])
    expected[base] = f"model.path={base} is a ['pipeline', 'Evil']"
    refused_bases(starter, world, expected, tmp_path)
    assert not canary.exists()


def test_code_beside_a_base_s_parts_is_not_run(starter, world, canary, tmp_path):
    base = copied(world, tmp_path / "base")
    mapped = {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoTokenizer": ["evil.Evil"] * 2,
    }
    for part, file in (
        ("tokenizer", "tokenizer_config.json"),
        ("text_encoder", "config.json"),
        ("unet", "config.json"),
        ("scheduler", "scheduler_config.json"),
    ):
        (base / part / "evil.py").write_text(CODE.format(str(canary)))
        edit(base / part / file, auto_map=mapped)
    args = [f"model={base}", f"output={tmp_path / 'out'}", "prompt=a cat", "steps=1"]
    starter.finish("scripts/generate.py", *args, "width=64", "height=64")
    assert (tmp_path / "out" / "00000.png").is_file()
    assert not canary.exists()

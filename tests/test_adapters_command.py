"""scripts/adapters.py, against changes that PEFT multiplies out and models that were fine-tuned."""

import hashlib
import json
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import adapters as command
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import trained
from train import adapter_factors, adapter_math, adapter_tables, export, kohya
from train.adapter_file import BASE_PREDICTION
from train.config import ROOT, LoraConfig, TextLoraConfig, UserError

FILE = "pytorch_lora_weights.safetensors"
ALL = ["attention", "proj", "feed_forward", "convolution"]
TEXT = TextLoraConfig(rank=3, alpha=5.0, targets=["attention", "feed_forward"])
EVERYWHERE = LoraConfig(rank=4, alpha=6.0, targets=ALL, text_encoder=TEXT, blocks={"mid_block": 2})


def adapter(folder, config: LoraConfig, seed: int) -> dict[str, torch.Tensor]:
    """Writes an adapter without zeros; returns what PEFT makes of it, by layer."""
    pipeline = trained(config, seed)
    export.save_lora(pipeline, folder)
    export.save_scheduler(pipeline, folder)
    return changes_of(pipeline)


def changes_of(pipeline) -> dict[str, torch.Tensor]:
    parts = {"unet": pipeline.unet, "text_encoder.text_model": pipeline.text_encoder}
    return {
        f"{part}.{name}": module.get_delta_weight("default").detach().double()
        for part, model in parts.items()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A base, two adapters, a DoRA, and a fine-tune of the base."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_pipeline().save_pretrained(folder / "base")
    adapter(folder / "dora", LoraConfig(rank=2, dora=True), seed=3)
    tuned = tiny_pipeline()
    torch.manual_seed(4)
    for model in (tuned.unet, tuned.text_encoder):
        for name, parameter in model.named_parameters():
            if parameter.ndim in (2, 4) and "embedding" not in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(folder / "tuned")
    return folder


@pytest.fixture(scope="module")
def one(there):
    return adapter(there / "one", EVERYWHERE, seed=1)


@pytest.fixture(scope="module")
def other(there):
    return adapter(there / "other", LoraConfig(rank=3, targets=["attention"]), seed=2)


def run(capsys, *arguments) -> str:
    command.main(list(map(str, arguments)))
    return capsys.readouterr().out


def read(path) -> dict[str, torch.Tensor]:
    file = path if path.is_file() else path / FILE
    return {name: adapter_math.delta(f) for name, f in adapter_factors.read(file).items()}


def same(found, expected, tolerance=1e-6) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name] - expected[name].reshape(found[name].shape)).abs().max() < tolerance
        for name in found
    )


def norm(changes) -> float:
    return torch.cat([change.flatten() for change in changes.values()]).norm().item()


# Reading


def test_inspect_gives_the_norms_of_the_changes_and_what_the_file_is(there, one, capsys):
    found = json.loads(run(capsys, "inspect", there / "one", "format=json"))
    assert found["norm"] == pytest.approx(norm(one), rel=1e-6)
    assert {row["layer"]: row["norm"] for row in found["layers"]} == pytest.approx(
        {name: change.norm().item() for name, change in one.items()}, rel=1e-6
    )
    assert (found["count"], found["format"]) == (len(one), "diffusers")
    assert set(found["ranks"]) == {"2", "3", "4"} and set(found["alphas"]) == {"3.0", "5.0", "6.0"}
    assert {"attention", "convolution", "text_encoder feed_forward"} <= set(found["targets"])
    assert "other" not in found["targets"] and not found["not_finite"] and not found["dora"]
    blocks = [row["block"] for row in found["blocks"]]
    assert blocks[0] == "unet down_blocks.0" and blocks[-1] == "text_encoder layers.1"
    assert blocks == sorted(blocks, key=lambda name: name.startswith("text_encoder"))
    content = (there / "one" / FILE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert found["hashes"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["hashes"]["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert all(1 <= row["effective_rank"] <= row["rank"] for row in found["layers"])


def test_inspect_with_its_base_gives_shares_and_doras_own_change(there, one, capsys):
    base = f"base={there / 'base'}"
    text = run(capsys, "inspect", there / "one", base)
    assert "of base's" in text and "unet up_blocks.1" in text and "lora_adapter_metadata" in text
    alone = json.loads(run(capsys, "inspect", there / "dora", "format=json"))
    found = json.loads(run(capsys, "inspect", there / "dora", base, "format=json"))
    assert found["dora"] and found["norm"] != pytest.approx(alone["norm"])
    assert 0 < found["relative_norm"]
    assert "DoRA: norms are of its factors' product" in run(capsys, "inspect", there / "dora")


def test_inspect_names_what_is_not_finite(there, one, tmp_path, capsys):
    tensors = load_file(there / "one" / FILE)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "broken.safetensors")
    text = run(capsys, "inspect", tmp_path / "broken.safetensors")
    assert "NOT FINITE: 1 layers" in text
    with pytest.raises(UserError, match="not finite.*had diverged"):
        command.main(["resize", str(tmp_path / "broken.safetensors"), "rank=1", "output=x"])


def test_compare(there, one, other, capsys):
    a, b = there / "one", there / "other"
    alike = json.loads(run(capsys, "compare", a, f"{a}:0.5", "format=json"))
    assert alike["cosine"] == pytest.approx(1) and alike["distance"] == pytest.approx(0.5)
    found = json.loads(run(capsys, "compare", a, b, "format=json"))
    inner = sum((one[name] * other[name]).sum().item() for name in other)
    apart = norm({n: c - other[n] if n in other else c for n, c in one.items()})
    assert found["cosine"] == pytest.approx(inner / norm(one) / norm(other), rel=1e-5)
    assert found["distance"] == pytest.approx(apart / norm(one), rel=1e-5)
    assert set(found["only_first"]) == one.keys() - other.keys() and not found["only_second"]
    assert f"only {a / FILE} changes" in run(capsys, "compare", a, b)


# Writing


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_merging_is_the_weighted_sum(there, one, other, tmp_path, capsys, format):
    output = tmp_path / ("both.safetensors" if format == "kohya" else "both")
    sources = (f"{there / 'one'}:0.7", f"{there / 'other'}:-0.5")
    text = run(capsys, "merge", *sources, f"output={output}", f"format={format}")
    none = torch.zeros(())
    expected = {n: 0.7 * c - 0.5 * other.get(n, none) for n, c in one.items()}
    assert same(read(output), expected)
    assert "it is" in text and "up_blocks.1" in text
    if format == "diffusers":
        assert (output / "scheduler" / "scheduler_config.json").is_file()


def test_a_merged_adapter_is_what_diffusers_applies(there, one, other, tmp_path, capsys):
    run(capsys, "merge", there / "one", there / "other", f"output={tmp_path / 'both'}")
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(str(tmp_path / "both"))
    loaded = {
        name: module.get_delta_weight("default_0")
        for name, module in pipeline.unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(loaded) == sum(name.startswith("unet.") for name in one)
    for name, change in loaded.items():
        expected = one[f"unet.{name}"] + other.get(f"unet.{name}", torch.zeros(()))
        assert (change - expected).abs().max() < 1e-5


def error_said(text: str) -> float:
    return float(text.rpartition("it is ")[2].split()[0])


def test_merging_to_a_rank_and_resizing_say_the_true_error(there, one, other, tmp_path, capsys):
    sources = (there / "one", there / "other")
    text = run(capsys, "merge", *sources, "rank=3", f"output={tmp_path / 'a'}", "precision=fp16")
    expected = {n: c + other.get(n, torch.zeros(())) for n, c in one.items()}
    found = read(tmp_path / "a")
    true = norm({n: found[n] - c for n, c in expected.items()}) / norm(expected)
    assert error_said(text) == pytest.approx(true, rel=0.01) and true > 0.1
    text = run(capsys, "resize", there / "one", "rank=2", f"output={tmp_path / 'b'}")
    found = read(tmp_path / "b")
    least = sum(torch.linalg.svdvals(c.flatten(1))[2:].square().sum() for c in one.values())
    true = norm({n: found[n] - c for n, c in one.items()})
    assert true == pytest.approx(least.sqrt().item(), rel=1e-4)
    assert error_said(text) == pytest.approx(true / norm(one), rel=0.01)
    text = run(capsys, "resize", there / "one", "energy=0.9", f"output={tmp_path / 'c'}")
    assert 0 < error_said(text) < 0.1**0.5


def test_dora_is_resized_with_its_base(there, tmp_path, capsys):
    with pytest.raises(UserError, match="is a DoRA.*give base="):
        command.main(["resize", str(there / "dora"), "rank=4", f"output={tmp_path / 'a'}"])
    base = f"base={there / 'base'}"
    text = run(capsys, "resize", there / "dora", base, "rank=99", f"output={tmp_path / 'a'}")
    assert error_said(text) < 1e-6
    tuned, whole = tiny_pipeline(), tiny_pipeline()
    whole.load_lora_weights(str(there / "dora"))
    whole.fuse_lora()
    weights = dict(tuned.unet.named_parameters())
    for name, change in read(tmp_path / "a").items():
        path = name.removeprefix("unet.")
        fused = whole.unet.get_submodule(path).weight
        assert (weights[f"{path}.weight"] + change - fused).abs().max() < 1e-5


def test_extracting_with_full_rank_is_the_fine_tune(there, tmp_path, capsys):
    keys = (f"tuned={there / 'tuned'}", f"base={there / 'base'}", f"output={tmp_path / 'whole'}")
    text = run(capsys, "extract", *keys, "rank=100000")
    assert error_said(text) < 1e-6
    base, tuned = tiny_pipeline(), load(there / "tuned")
    base.load_lora_weights(str(tmp_path / "whole"))
    for part in ("unet", "text_encoder"):
        model = getattr(base, part)
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                weight = module.get_base_layer().weight + module.get_delta_weight("default_0")
                expected = getattr(tuned, part).get_submodule(name).weight
                assert (weight - expected).abs().max() < 1e-5, name
    assert (picture(base) - picture(tuned)).abs().max() < 1e-3


def load(folder):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline) -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    size = {"width": 64, "height": 64, "num_inference_steps": 2}
    return torch.as_tensor(pipeline("a cat", **size, generator=seed, output_type="np").images)


def test_extracting_to_a_size_and_from_single_files(there, tmp_path, capsys):
    from train import ldm

    keys = (f"tuned={there / 'tuned'}", f"base={there / 'base'}")
    text = run(capsys, "extract", *keys, "rank=4", "conv_rank=0", f"output={tmp_path / 'a'}")
    found = read(tmp_path / "a")
    assert "unet.conv_in" not in found and "unet.mid_block.resnets.0.conv1" not in found
    tuned, base = load(there / "tuned"), tiny_pipeline()
    rest = total = 0.0
    for part, within in (("unet", "unet."), ("text_encoder", "text_encoder.text_model.")):
        before = dict(getattr(base, part).named_parameters())
        for name, after in getattr(tuned, part).named_parameters():
            if after.ndim in (2, 4) and "embedding" not in name:
                change = (after - before[name]).double()
                made = found.get(f"{within}{name.removesuffix('.weight')}", torch.zeros(()))
                rest += (change - made).square().sum().item()
                total += change.square().sum().item()
    assert error_said(text) == pytest.approx((rest / total) ** 0.5, rel=0.01)

    for name in ("tuned", "base"):
        ldm.to_single_file(there / name, tmp_path / f"{name}.safetensors", dtype=torch.float32)
    files = [f"{name}={tmp_path / name}.safetensors" for name in ("tuned", "base")]
    described = f"base_config={there / 'base'}"
    sizes = ("rank=4", "conv_rank=0", f"output={tmp_path / 'b.safetensors'}", "format=kohya")
    run(capsys, "extract", *files, described, *sizes)
    assert same(read(tmp_path / "b.safetensors"), found)


def test_what_no_lora_holds_is_said(there, tmp_path, capsys):
    tuned = load(there / "tuned")
    tuned.unet.conv_in.bias.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    keys = (f"tuned={tmp_path / 'tuned'}", f"base={there / 'base'}", "rank=1", "parts=[unet]")
    text = run(capsys, "extract", *keys, f"output={tmp_path / 'a'}")
    assert "the change of 1 biases, norms and embeddings" in text and "5.66" in text
    scheduler = json.loads((tmp_path / "a" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == scheduler[BASE_PREDICTION] == "v_prediction"


def test_what_a_file_says_of_itself_is_kept_where_it_holds(there, one, tmp_path, capsys):
    file, small = tmp_path / "a.safetensors", tmp_path / "small.safetensors"
    said = {"ss_base_model_version": "sd_v2_v", "ss_tag_frequency": '{"a": {"b": 1}}'}
    said |= {"ss_network_dim": "4", "sshs_model_hash": "old"}
    kohya.write(there / "one" / FILE, file, metadata=said, dtype=torch.float32)
    run(capsys, "resize", file, "rank=1", f"output={small}", "format=kohya", "precision=fp16")
    found = json.loads(run(capsys, "inspect", small, "format=json"))
    assert found["metadata"] | {"ss_network_dim": "1"} == found["metadata"]
    kept = ("ss_base_model_version", "ss_tag_frequency")
    assert all(found["metadata"][key] == said[key] for key in kept)
    assert found["hashes"]["as_said"] and found["format"] == "kohya" and found["version"]
    assert found["ranks"] == {"1": len(one)} and set(found["dtypes"]) == {"F16", "F32"}
    assert "(as its metadata says)" in run(capsys, "inspect", small)


def test_overwriting_replaces_a_lora_as_a_whole(there, one, tmp_path, capsys):
    output, bare = tmp_path / "out", tmp_path / "bare.safetensors"
    run(capsys, "resize", there / "dora", f"base={there / 'base'}", "rank=1", f"output={output}")
    assert (output / "scheduler").is_dir()
    bare.write_bytes((there / "one" / FILE).read_bytes())
    run(capsys, "resize", bare, "rank=1", f"output={output}", "overwrite=true")
    assert [path.name for path in output.iterdir()] == [FILE]  # the other's scheduler went too
    assert read(output).keys() == one.keys()
    text = run(capsys, "resize", output, "rank=1", f"output={output}", "overwrite=true")
    assert error_said(text) < 1e-5  # of itself too
    assert {path.name for path in tmp_path.iterdir()} == {"out", bare.name}


def test_overwriting_deletes_nothing_that_is_no_lora(there, tmp_path):
    output, model = tmp_path / "out", tmp_path / "model.safetensors"
    (output / "scheduler").mkdir(parents=True)
    for name in (FILE, "learned_embeds.safetensors", "README.md", "scheduler/notes.txt"):
        (output / name).write_text(name)
    save_file({"weight": torch.ones(2)}, model)
    said = model.read_bytes()
    resize = ("resize", str(there / "one"), "rank=1", "overwrite=true")
    named = "README.md, learned_embeds.safetensors, scheduler/notes.txt, which overwrite=true would"
    with pytest.raises(UserError, match=named):
        command.main([*resize, f"output={output}"])
    with pytest.raises(UserError, match="is no LoRA, and is not overwritten"):
        command.main([*resize, f"output={model}", "format=kohya"])
    assert not list(tmp_path.glob(".writing-*"))
    assert (output / "README.md").read_text() == "README.md" and model.read_bytes() == said


def test_doras_changes_are_of_one_layer_at_a_time(there, tmp_path, capsys, monkeypatch):
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = []

    def on_base(factors, weight):
        made = adapter_math.on_base(factors, weight)
        alive.update((made.down, made.up))
        most.append(len(alive))
        return made

    monkeypatch.setattr(adapter_factors, "on_base", on_base)
    base, dora = f"base={there / 'base'}", there / "dora"
    run(capsys, "resize", dora, base, "rank=2", f"output={tmp_path / 'a'}")
    run(capsys, "merge", dora, f"{dora}:0.5", base, "rank=2", f"output={tmp_path / 'b'}")
    found = json.loads(run(capsys, "compare", dora, f"{dora}:0.5", base, "format=json"))
    assert found["distance"] == pytest.approx(0.5) and len(found["layers"]) > 4
    assert len(most) > len(found["layers"]) and max(most) <= 4  # two factors of each of two files


def test_texts_of_a_file_move_no_cursor(there, one, tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    keys = ("ss_base_model_version", "modelspec.prediction_type", "ss_training_comment")
    said = {key: f"{key}\x1b[2J\x07\x9b1m" for key in keys}
    save_file(load_file(there / "one" / FILE), file, metadata=said)
    text = run(capsys, "inspect", file)
    assert "\\x1b[2J" in text and all(key in text for key in keys)
    assert all(line.isprintable() for line in text.splitlines())
    found = {"only_first": ["unet.\x1b[2J"], "only_second": [], "files": ["a\x1b", "b"]}
    row = {"count": 1, "common": 0, "norms": [1.0, 0.0], "cosine": None, "distance": 1.0}
    text = adapter_tables.compared({**found, **row, "blocks": [{"block": "\x1b other", **row}]})
    assert all(line.isprintable() for line in text.splitlines())


# Mistakes


def test_mistakes_are_named_with_their_remedy(there, one, other, tmp_path):
    tiny_pipeline(width=64).save_pretrained(tmp_path / "wide")
    a, output = str(there / "one"), f"output={tmp_path / 'out'}"
    (tmp_path / "full").mkdir()
    layer, wide = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", tmp_path / "w"
    factors = {"lora_A.weight": torch.ones(2, 99), "lora_B.weight": torch.ones(64, 2)}
    save_file({f"{layer}.{k}": v for k, v in factors.items()}, f"{wide}.safetensors")
    kernel = {"lora_A.weight": torch.ones(1, 4, 3, 3), "lora_B.weight": torch.ones(32, 1, 1, 1)}
    conv = f"{tmp_path / 'conv'}.safetensors"
    save_file({f"unet.conv_in.{k}": v for k, v in kernel.items()}, conv)
    large = f"{tmp_path / 'large'}.safetensors"
    save_file({f"unet.conv_in.{k}": v * 1e6 for k, v in kernel.items()}, large)
    tuned = f"tuned={there / 'tuned'}"
    for arguments, part in {
        ("merg",): "did you mean 'merge'",
        ("inspect", a, "bse=x"): "unknown key 'bse'; did you mean 'base'",
        ("inspect", a, f"base={tmp_path / 'wide'}"): "does not fit base=.*Give the base",
        ("inspect", a, a): "one adapter at a time",
        ("inspect", a, "base=me/model"): "base=me/model: no such folder or file",
        ("compare", a): "give two to compare",
        ("compare", a, f"{wide}.safetensors"): "are of different bases: they change unet.mid_block",
        ("resize", a, output): "give rank=, energy= or both",
        ("resize", a, "rank=2", f"output={tmp_path / 'full'}"): "is there already.*overwrite=true",
        ("resize", a, "rank=2", output, "format=kohya"): "is a file, NAME.safetensors",
        ("merge", a, "conv_rank=2", output): "conv_rank= needs rank=",
        ("merge", conv, "rank=1", "conv_rank=0", output): "conv_rank=0 leaves out all layers",
        ("resize", conv, "rank=1", "conv_rank=0", output): "conv_rank=0 leaves out all layers",
        ("resize", large, "rank=1", output, "precision=fp16"): "^[^ ]*out: .* and float16 only to",
        ("merge", a, str(there / "dora"), output): "of full rank.*give rank= or energy=",
        ("extract", tuned, f"base={tmp_path / 'wide'}", "rank=2", output): "not a fine-tune of",
        ("extract", tuned, f"base={there / 'tuned'}", "rank=2", output): "do not differ",
    }.items():
        with pytest.raises((UserError, SystemExit), match=part):
            command.main(list(arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["resize", "--help"], ["inspect", "adaptr=x"]])
def test_help_and_a_mistyped_key_are_answered_without_torch(arguments):
    script = f"""
import runpy, sys
sys.argv = ["scripts/adapters.py", *{arguments}]
try:
    runpy.run_path("scripts/adapters.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert "share of the squared" in done.stdout.lower() or "did you mean 'adapter'" in done.stderr

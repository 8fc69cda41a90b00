"""train/textual_inversion.py end to end on a tiny base: what moves, what resumes, what loads
elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from eval import generating
from eval.generation import to_uint8
from eval.inputs import find_result, read_run
from scripts import generate
from tests.runs import arguments, drawn, finish, launch, make_world
from train import models, textual_inversion
from train.config import UserError

STEPS = 6
LORA_FILE = "pytorch_lora_weights.safetensors"
ROWS = "text_encoder.embeddings.token_embedding.rows"
PROMPTS = ["a large red circle", "a small <owl> on grey"]
LORA = ("lora.rank=2", "lora.alpha=4", "lora.dropout=0")
TEXT_LORA = ("lora.text_encoder.rank=2", "lora.text_encoder.targets=[attention,feed_forward]")
# As in tests/test_lora.py: an epsilon so large that the rounding of tiny gradients decides nothing.
COMPARABLE = ("optim.learning_rate=1e-3", "optim.eps=1e-6")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def told(vectors=3, **values):
    token = {"token": "<owl>", "initial": "owl", "vectors": vectors} | values
    return "textual_inversion.tokens=" + json.dumps([token])


def settings(world, output, *overrides):
    """The arguments of a tiny run of one token, without the LoRA of tests/tiny.yaml."""
    file, *rest = arguments(world, output, told(), f"preview.prompts={json.dumps(PROMPTS)}")
    values = yaml.safe_load(Path(file.removeprefix("--config=")).read_text(encoding="utf-8"))
    del values["lora"]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return [f"--config={output.with_suffix('.yaml')}", *rest, *overrides]


def train(world, output, *overrides):
    textual_inversion.main(settings(world, output, *overrides))
    return output


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """One finished, uninterrupted run of three vectors."""
    return train(world, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def pivotal(world, tmp_path_factory):
    """The same with adapters on the UNet and the text encoder."""
    return train(world, tmp_path_factory.mktemp("runs") / "pivotal", *LORA, *TEXT_LORA)


def embeds(output, name="learned_embeds.safetensors"):
    ((_, rows),) = load_file(output / "adapter" / name).items()
    return rows


def saved(output, step=STEPS, name="model"):
    return load_file(output / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def started(world, *ids):
    """Rows of the base's table."""
    pipeline = models.load_pipeline(str(world / "base"))
    words = pipeline.tokenizer("owl", add_special_tokens=False).input_ids
    assert len(words) == 3
    return pipeline.text_encoder.get_input_embeddings().weight.detach()[words]


@pytest.fixture
def watched(monkeypatch):
    """The methods that are made, each with its state when it was."""
    seen = []
    original = textual_inversion.TextualInversion

    def watching(*args, **options):
        method = original(*args, **options)
        state = method.model.state_dict() | {
            "vae." + k: v for k, v in args[0].vae.state_dict().items()
        }
        seen.append((method, args[0], {name: value.clone() for name, value in state.items()}))
        return method

    monkeypatch.setattr(textual_inversion, "TextualInversion", watching)
    return seen


def changed(watched):
    """Names of all tensors that are not as they were, of the last method that was made."""
    method, pipeline, before = watched[-1]
    after = method.model.state_dict() | {
        "vae." + k: v for k, v in pipeline.vae.state_dict().items()
    }
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# What moves


def test_all_vectors_of_the_token_move_and_every_other_tensor_is_as_it_was(
    world, tmp_path, watched
):
    output = train(world, tmp_path / "run", "preview.every=0")
    assert changed(watched) == {ROWS}
    rows, start = embeds(output), started(world)
    assert rows.shape == (3, 32) and rows.dtype == torch.float32
    assert (rows != start).any(dim=1).all()
    assert (saved(output)[ROWS] != start).any(dim=1).all() and len(saved(output)) == 1
    assert {tuple(value.shape) for value in saved(output, name="optimizer").values()} == {
        (3, 32),
        (),
    }


def test_pivotal_tuning_moves_the_rows_and_the_adapters_alone(world, tmp_path, watched):
    train(world, tmp_path / "run", *LORA, *TEXT_LORA, "preview.every=0")
    trained = {name for name in watched[-1][2] if ".lora_" in name} | {ROWS}
    assert changed(watched) == trained == saved(tmp_path / "run").keys()
    assert len(trained) == 1 + 2 * (4 * 2 * 4) + 2 * 2 * 6


def test_each_part_has_its_own_rate(world, tmp_path, watched):
    overrides = (*LORA, *TEXT_LORA, "optim.tokens.learning_rate=3e-3", "optim.learning_rate=2e-3")
    config = textual_inversion.load(
        textual_inversion.TextualInversionRun, settings(world, tmp_path / "run", *overrides)
    )
    train(world, tmp_path / "run", *overrides, "train.steps=2", "preview.every=0")
    groups = watched[-1][0].parameter_groups(config.optim)
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates == {"tokens": 3e-3, "unet": 2e-3, "text_encoder": 2e-3}
    assert [g["weight_decay"] for g in groups if g["part"] == "tokens"] == [0.0]
    assert sum(len(group["params"]) for group in groups) == len(saved(tmp_path / "run", 2))


def test_tokens_of_two_sources_are_learned_from_their_own_pictures(world, tmp_path):
    tokens = [
        {"token": "<owl>", "initial": "owl", "source": "pictures"},
        {"token": "<cat>", "initial": "cat", "source": "large", "vectors": 1},
    ]
    sources = [{"path": str(world / name)} for name in ("pictures", "large")]
    output = train(
        world,
        tmp_path / "run",
        f"textual_inversion.tokens={json.dumps(tokens)}",
        "data.path=null",
        f"data.sources={json.dumps(sources)}",
        "preview.prompts=[an <owl> and a <cat>]",
    )
    rows = {name: embeds(output, f"learned_embeds-{name}.safetensors") for name in ("owl", "cat")}
    assert {name: value.shape for name, value in rows.items()} == {"owl": (3, 32), "cat": (1, 32)}
    assert (rows["owl"] != started(world)).any(dim=1).all()
    assert np.array_equal(
        preview(output, 0), drawn(untouched(world, output), "an <owl> and a <cat>", 0)
    )


# Precision and resuming


def interrupted(output, step):
    """As a run that was killed after this step."""
    for later in (output / "checkpoints").iterdir():
        if later.name > f"step-{step:08d}":
            shutil.rmtree(later)
    shutil.rmtree(output / "adapter")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_in_the_same_bits_with_fp32_rows(world, tmp_path, watched, precision):
    overrides = (f"train.mixed_precision={precision}", *LORA, *TEXT_LORA, "preview.every=0")
    output = train(world, tmp_path / "run", *overrides)
    whole, adapters = embeds(output), load_file(output / "adapter" / LORA_FILE)
    interrupted(output, 4)
    train(world, output, *overrides)
    assert torch.equal(embeds(output), whole)
    again = load_file(output / "adapter" / LORA_FILE)
    assert all(torch.equal(again[name], adapters[name]) for name in adapters)
    for method, pipeline, _ in watched:
        trained = [p for p in method.model.parameters() if p.requires_grad]
        assert len(watched) == 2 and {p.dtype for p in trained} == {torch.float32}
        assert pipeline.unet.dtype == models.dtype_of(precision)


def test_gradient_checkpointing_changes_nothing(world, run, tmp_path):
    output = train(world, tmp_path / "run", "train.gradient_checkpointing=true", "preview.every=0")
    torch.testing.assert_close(embeds(output), embeds(run), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_learn_the_same_rows(world, tmp_path):
    args = (*COMPARABLE, *LORA, "preview.every=0")
    one = train(world, tmp_path / "one", *args)
    two = tmp_path / "two"
    finish(launch("train/textual_inversion.py", *settings(world, two, *args), processes=2))
    assert (embeds(one) - embeds(two)).abs().max() < 1e-5
    assert (embeds(one) - started(world)).abs().max() > 1e-3


# Elsewhere


def untouched(world, output):
    """diffusers' own pipeline with what the run left."""
    pipeline = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for file in sorted((output / "adapter").glob("learned_embeds*.safetensors")):
        pipeline.load_textual_inversion(str(output / "adapter"), weight_name=file.name)
    if (output / "adapter" / LORA_FILE).exists():
        pipeline.load_lora_weights(str(output / "adapter"), weight_name=LORA_FILE)
    return pipeline


def preview(output, k):
    return np.asarray(Image.open(output / "previews" / f"step-{STEPS:08d}" / f"{k:02d}.png"))


@pytest.mark.parametrize("kind", ["run", "one", "pivotal"])
def test_an_untouched_pipeline_gives_the_previews_pixels(world, request, tmp_path, kind):
    if kind == "one":
        output = train(world, tmp_path / "run", told(1))
    else:
        output = request.getfixturevalue(kind)
    pipeline = untouched(world, output)
    for k, prompt in enumerate(PROMPTS):
        assert np.array_equal(drawn(pipeline, prompt, k), preview(output, k))
    base = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    assert not np.array_equal(drawn(base, PROMPTS[1], 1), preview(output, 1))


def test_generate_takes_the_adapter_folder(world, pivotal, tmp_path):
    generate.main(
        [
            f"model={world / 'base'}",
            f"adapters={pivotal / 'adapter'}",
            f"output={tmp_path / 'out'}",
            f"prompt={PROMPTS[1]}",
            "seed=1",
            *("steps=2", "guidance=2", "width=64", "height=64"),
        ]
    )
    made = np.asarray(Image.open(tmp_path / "out" / "00000.png"))
    expected = drawn(untouched(world, pivotal), PROMPTS[1], 1, "np")
    assert np.array_equal(made, to_uint8(expected))


def test_an_evaluation_reads_the_run_and_takes_its_adapter(world, pivotal):
    config = read_run(pivotal, [])
    assert isinstance(config, textual_inversion.TextualInversionRun)
    finetuned = generating.apply(find_result(pivotal), models.load_pipeline(str(world / "base")))
    assert np.array_equal(drawn(finetuned, PROMPTS[1], 1), preview(pivotal, 1))


def test_the_scheduler_that_was_trained_for_goes_with_the_adapter(world, tmp_path):
    output = train(
        world,
        tmp_path / "run",
        "diffusion.zero_terminal_snr=true",
        "train.steps=2",
        "checkpoint.every=1",
        "preview.every=0",
    )
    scheduler = json.loads((output / "adapter/scheduler/scheduler_config.json").read_text())
    assert scheduler["rescale_betas_zero_snr"] and scheduler["prediction_type"] == "v_prediction"


# Mistakes


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", lambda *a, **k: pytest.fail("loaded weights"))


@pytest.mark.parametrize("token", ["a", "!"])
def test_a_token_of_the_base_is_refused_before_weights_are_loaded(world, tmp_path, unloaded, token):
    with pytest.raises(UserError, match=f"token={token} is not new"):
        train(world, tmp_path / "run", told(token=token))
    assert not (tmp_path / "run").exists()


def test_adapters_that_the_base_cannot_have_are_refused_before_weights_are_loaded(
    world, tmp_path, unloaded
):
    with pytest.raises(UserError, match="lora.blocks"):
        train(world, tmp_path / "run", *LORA, "lora.blocks={nowhere.*: 2}")


def test_own_captions_without_the_token_are_refused_before_weights_are_loaded(
    world, tmp_path, unloaded, capsys
):
    own = "textual_inversion.captions=own"
    with pytest.raises(UserError, match="no caption holds <owl>"):
        train(world, tmp_path / "run", own)
    train(world, tmp_path / "run", own, "data.captions.trigger=<owl>", "dry_run=true")
    assert "learns   <owl> from 'owl' (vectors: 3), at 0.01" in capsys.readouterr().out

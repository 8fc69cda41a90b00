"""Case 14: a loss, a gradient or a latent that is not finite, in one process of several or all ->
all of them leave out the step, the samples named; too many in a row end the run; the weights stay
as if the step had not been, and what is not finite is never saved or published."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.chains import METHODS, command, metrics, newest
from tests.faults.endings import SPARSE, steps
from tests.faults.injected import Fault, record, recorded
from tests.faults.removals import Removal
from tests.faults.spoiled import spoiled
from tests.runs import arguments

WITHOUT = [
    Removal(
        "the step is left out",
        "train/guards.py",
        "        return not self._agreement.most(not sound)[0]",
        "        return bool(self._agreement.most(not sound))",
        "by_both",
    ),
    Removal(
        "by all processes",
        "train/guards.py",
        "        return not self._agreement.most(not sound)[0]",
        "        return sound",
        "by_both",
    ),
    Removal(
        "gradients are looked at",
        "train/guards.py",
        "        sound = bool(seen.loss.isfinite()) and (gradient or left_to_scaler)",
        "        sound = bool(seen.loss.isfinite())",
        "by_both",
    ),
    Removal(
        "losses are looked at",
        "train/guards.py",
        "        sound = bool(seen.loss.isfinite()) and (gradient or left_to_scaler)",
        "        sound = gradient or left_to_scaler",
        "by_both",
    ),
    Removal(
        "the samples are named",
        "train/guards.py",
        "        if not finite\n",
        "        if finite\n",
        "by_both",
    ),
    Removal(
        "too many end the run",
        "train/guards.py",
        "        if self._in_a_row > self._allowed:",
        "        if False:",
        "too_many",
    ),
    Removal(
        "a resumed run remembers them",
        "train/loop.py",
        'before=facts.get("guard")',
        "before=None",
        "too_many",
    ),
    Removal(
        "latents are looked at before they are cached",
        "data/cache.py",
        "        check_finite(latents, job.record)\n",
        "",
        "cached",
    ),
    Removal(
        "weights are looked at before they are saved",
        "train/checkpoint.py",
        '        self._refuse_non_finite(step, files["model"])\n',
        "",
        "never_saved",
    ),
    Removal(
        "an adapter is looked at before it is published",
        "train/export.py",
        '    _refuse_non_finite(state, "the adapter")\n',
        "",
        "published and lora",
    ),
    Removal(
        "new words are",
        "train/embeddings.py",
        "        if not rows.isfinite().all():",
        "        if False:",
        "textual",
    ),
    Removal(
        "a whole model is",
        "train/export.py",
        '        _refuse_non_finite(getattr(pipeline, part).state_dict(), f"the {part}")\n',
        "        pass\n",
        "full",
    ),
]

FORWARD = "train.denoiser:Denoiser.forward"
# One size for all pictures: batches of 4, 4 and 1, and again.
ALIKE = (*SPARSE, "data.bucket_step=64")
ONE_BY_ONE = (*ALIKE, "train.micro_batch_size=1")


def tensors(output):
    """Of the result and the last checkpoint."""
    files = [*output.glob("adapter/*.safetensors"), *output.glob("checkpoints/*/*.safetensors")]
    assert len(files) == 3
    return {f"{file.parent.name}: {k}": v for file in files for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def without(starter, world, tmp_path_factory):
    """What two processes end in that never make the second step's update."""
    output = tmp_path_factory.mktemp("case-14") / "run"
    entry = ["train/lora.py", *arguments(world, output, *ONE_BY_ONE)]
    starter.finish(*spoiled("update", 2), *entry, processes=2)
    return tensors(output)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_is_left_out_by_both_processes_as_if_it_had_not_been(
    starter, world, without, tmp_path, what
):
    """Of the two micro-batches of one sample that the second process has, the first is bad."""
    output, seen = tmp_path / "run", tmp_path / "seen"
    entry = ["train/lora.py", *arguments(world, output, *ONE_BY_ONE)]
    bad = spoiled(what, call=3, rank=1)
    said = starter.finish(*bad, *entry, processes=2, faults=[record(seen, FORWARD)])
    name = {(one["rank"], one["call"]): one["given"][1]["ids"][0] for one in recorded(seen)}
    (warning,) = [line for line in said.splitlines() if "left out" in line]
    if what == "loss":
        assert warning == f"warning: step 2 is left out: the loss is not finite for {name[1, 3]}"
    else:
        names = ", ".join(name[at] for at in ((0, 3), (0, 4), (1, 3), (1, 4)))
        reason = f"the gradient is not finite; the step has {names}"
        assert warning == f"warning: step 2 is left out: {reason}"
    found = tensors(output)
    assert found.keys() == without.keys()
    assert all(torch.equal(found[name], without[name]) for name in without)
    lines = metrics(output)
    assert [line["loss"] is None for line in lines] == [step == 1 for step in range(6)]
    assert [line.get("left_out", 0) for line in lines] == [0, 1, 1, 1, 1, 1]


def test_too_many_in_a_row_end_the_run_that_remembers_them(starter, world, tmp_path):
    """The second and the third step, with a kill between them: a latent, and then a loss."""
    output, seen = tmp_path / "run", tmp_path / "seen"
    own = ("train.micro_batch_size=4", "train.skip_non_finite=1", "checkpoint.asynchronous=false")
    entry = ["train/lora.py", *arguments(world, output, *ALIKE, *own, "checkpoint.every=1")]
    latent = Fault(at="data.loader:TrainingSet._drawn", call=6, do="nan", after=True)
    kill = Fault(at="train.loop:accumulate", call=3, do="kill")
    run = starter.start(*entry, faults=[record(seen, FORWARD), latent, kill])
    assert run.wait() == [-9]
    name = recorded(seen)[1]["given"][1]["ids"][1]
    assert f"warning: step 2 is left out: the loss is not finite for {name}\n" in run.output
    said = starter.finish(*entry, code=1, faults=[Fault(at=FORWARD, do="nan", after=True)])
    assert "error: step 3: the loss is not finite for " in said and "Traceback" not in said
    assert "it is number 2 in a row (train.skip_non_finite=1)" in said
    assert newest(output) == 2 and not (output / "adapter").exists()
    starter.finish(*entry)
    assert [line.get("left_out", 0) for line in metrics(output)] == [0, 1, 1, 1, 1, 1]


def test_a_latent_that_is_not_finite_is_never_cached(starter, world, tmp_path):
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(world / "base", base)
    (file,) = base.glob("vae/*.safetensors")
    weights = load_file(file)
    weights["encoder.conv_in.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    own = (f"model.path={base}", f"data.cache={tmp_path / 'cache'}")
    said = starter.finish("train/lora.py", *arguments(world, output, *own), code=2)
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert ".png: its latents are not finite" in error
    assert not (output / "checkpoints").exists() and not (output / "adapter").exists()


def test_weights_that_are_not_finite_are_never_saved(starter, world, tmp_path):
    output = tmp_path / "run"
    own = ("preview.every=0", "checkpoint.every=2", "checkpoint.keep=99")
    entry = ["train/lora.py", *arguments(world, output, *own)]
    said = starter.finish(*spoiled("weights", 4), *entry, code=1)
    assert "training diverged before step 4" in said and "Traceback" not in said
    assert steps(output) == [2] and not (output / "adapter").exists()
    assert json.loads((output / "checkpoints/step-00000002/manifest.json").read_text())


@pytest.mark.parametrize(
    "method",
    [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_result_that_is_not_finite_is_never_published(starter, world, tmp_path, method):
    output = tmp_path / "run"
    entry = command(method, world, output, "train.steps=2", "checkpoint.every=2")
    said = starter.finish(*spoiled("result"), *entry, code=2)
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "not finite" in error and "training diverged" in error and "Traceback" not in said
    assert not (output / "adapter").exists() and not (output / "full").exists()

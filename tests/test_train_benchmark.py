"""scripts/benchmark.py train: every method is measured, and what cannot be compared is refused."""

import json

import pytest

from scripts import benchmark
from train.config import UserError

TINY = ("model=toy", "resolution=64", "micro_batch=1", "steps=1", "rounds=1")


def measured(tmp_path, *overrides):
    output = tmp_path / "benchmark.json"
    benchmark.main(["train", *TINY, f"output={output}", f"scratch={tmp_path}", *overrides])
    return json.loads(output.read_text())["results"]


@pytest.mark.slow
def test_the_loop_is_held_against_its_computation_the_recipe_and_another_setting(tmp_path, capsys):
    found = measured(tmp_path, "parts=[speed, reference]", "against={rank: 2}", "micro_batches=2")
    assert found["setting"]["rank"] == 8 and found["against"]["rank"] == 2
    assert found["ratios"].keys() == {"bare", "reference", "against"}
    assert all(0 < one["median"] < 100 for one in found["ratios"].values())
    assert found["encode_to_forward"]["median"] > 0
    assert 0 <= found["data_wait"]["median"] < 1 and 0 < found["share_of_matmul"] < 1.5
    table = capsys.readouterr().out.rpartition("| what |")[2]
    assert "times as fast as the published recipe" in table


@pytest.mark.slow
@pytest.mark.parametrize("method", ["textual_inversion", "full"])
def test_other_methods_are_measured_too(tmp_path, method):
    found = measured(tmp_path, "parts=[speed, memory]", f"method={method}", "precision=bf16")
    assert found["ratios"].keys() == {"bare"} and found["memory"]["peak_mib"] > 300


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=textual_inversion",), "reference is the published recipe"),
        (("compile=blocks",), "reference is the published recipe"),
        (("precision=fp16",), "no gradient scaler"),
        (("parts=[speed]", "against={rnk: 2}"), "'rnk' is no setting"),
        (("parts=[speed]", "against={precision: bf16}"), "a whole process's"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        measured(tmp_path, *overrides)
    assert not list(tmp_path.iterdir())

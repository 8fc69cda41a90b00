import numpy as np
import pytest
from PIL import Image

from eval.presentation import console, method, present, score_table


@pytest.fixture
def metrics(tmp_path):
    samples = []
    for k in range(40):
        for model in ("base", "finetuned"):
            (tmp_path / model).mkdir(exist_ok=True)
            Image.new("RGB", (16, 16)).save(tmp_path / model / f"{k}.png")
        samples.append(
            {
                "prompt": f"prompt {k % 20}",
                "seed": 100 + k,
                "size": (16, 16),
                "base": {"file": f"base/{k}.png", "cosine": 0.3},
                "finetuned": {"file": f"finetuned/{k}.png", "cosine": 0.1 if k == 33 else 0.31},
                "nearest": {"id": "a.png", "cosine": 0.9},
            }
        )
    clip = {"mean": 30.0, "low": 29.0, "high": 31.0, "n": 40, "groups": 20}
    fid = {"value": 12.5, "low": 10.0, "high": 15.0}
    return {
        "verdict": "It works.",
        "fid": {"base": fid | {"value": 25.0}, "finetuned": fid, "dimension": 8}
        | {"change": {"value": -12.5, "low": -14.0, "high": -11.0}, "bias_estimate": 1.25}
        | {"pictures": 40, "references": 30, "interval": "bootstrap", "resamples": 100},
        "clip_score": {"base": clip, "finetuned": clip | {"mean": 29.4}, "interval": "bootstrap"}
        | {"change": clip | {"mean": -0.6, "low": -0.9, "high": 0.2}},
        "warnings": ["Mind the size."],
        "extractor": {"name": "clips/mine", "sha256": "ab" * 32, "resize": "clean bicubic"},
        "reference": {"pictures": 30, "sha256": "cd" * 32},
        "settings": {"steps": 25, "guidance": 3.0, "dtype": "float32", "device": "cpu"}
        | {"scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}},
        "samples": samples,
    }


def test_table_is_aligned_and_holds_the_change(metrics):
    lines = console(score_table(metrics)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["base", "fine-tuned", "change"]
    assert lines[1].index("30.00") == lines[2].index("29.40") == lines[3].index("−0.600")
    assert "−12.50 (−50.0 %)  [−14.00 to −11.00]" in lines[3] and "(−2.0 %)" in lines[3]


def test_method_names_everything_a_repetition_needs(metrics):
    text = " ".join(sentence for _, sentence in method(metrics))
    for needed in ("ab" * 32, "cd" * 32, "clean bicubic", "25 steps", "guidance 3", "16x16"):
        assert needed in text
    for needed in ("DDIMScheduler (v_prediction)", "seeds 100 to 139", "40 generated", "1.25"):
        assert needed in text


def test_report_shows_each_prompt_once_and_the_falls(metrics, tmp_path):
    shown = []

    def nearest(sample):
        shown.append((sample["prompt"], sample["seed"]))
        return np.zeros((16, 16, 3), np.uint8)

    present(metrics, tmp_path, nearest)
    evenly, fallen = shown[:12], shown[12:]
    assert len({prompt for prompt, _ in evenly}) == 12
    assert fallen == [("prompt 13", 133)]
    page = (tmp_path / "report.html").read_text()
    assert "It works." in page and "Mind the size." in page and page.count("<img") == 3 * 13

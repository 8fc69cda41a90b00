import csv

from eval.tables import write_csv
from tests.evaluation_fixture import folders, subject_run


def _rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_have_a_row_for_each_arm_and_the_change_with_all_digits(tmp_path):
    metrics = subject_run(tmp_path, prompts=2, per_prompt=1, side=32)
    write_csv(metrics, tmp_path)
    rows = _rows(tmp_path / "scores.csv")
    assert list(rows[0]) == ["metric", "arm", "value", "low", "high", "n", "better"]
    dino = {row["arm"]: row for row in rows if row["metric"] == "dino"}
    assert list(dino) == ["base", "base_class", "finetuned", "real", "training", "change"]
    change = metrics["scores"]["dino"]["change"]
    assert [float(dino["change"][key]) for key in ("value", "low", "high")] == [
        change[key] for key in ("value", "low", "high")
    ]
    assert dino["change"]["n"] == "" and dino["base"]["n"] == "48"
    assert {row["better"] for row in rows if row["metric"] == "forgetting"} == {"less"}
    assert len(rows) == sum(
        len(score["values"]) + bool(score["change"]) for score in metrics["scores"].values()
    )


def test_samples_have_a_row_for_each_prompt_and_seed(tmp_path):
    metrics = subject_run(tmp_path, prompts=2, per_prompt=2, side=32)
    metrics["samples"][0]["prompt"] = 'a "cat", said\nsomeone'
    metrics["samples"][1]["nearest_training"] = None
    write_csv(metrics, tmp_path)
    rows = _rows(tmp_path / "samples.csv")
    assert [row["prompt"] for row in rows] == [s["prompt"] for s in metrics["samples"]]
    assert rows[1]["seed"] == "1000001" and (rows[1]["width"], rows[1]["height"]) == ("32", "32")
    assert (tmp_path / rows[3]["finetuned_file"]).is_file()
    scores = metrics["samples"][3]["scores"]["dino"]
    assert float(rows[3]["dino_finetuned"]) == scores["finetuned"]
    assert rows[1]["nearest_training"] == rows[1]["nearest_training_similarity"] == ""
    assert rows[0]["nearest_held_out"] == "0.png"


def test_what_a_comparison_of_folders_lacks_is_empty(tmp_path):
    write_csv(folders(tmp_path, images=2), tmp_path)
    rows = _rows(tmp_path / "samples.csv")
    assert [row["finetuned_file"] for row in rows] == [f"finetuned/0000{k}.png" for k in range(2)]
    assert {row["prompt"] for row in rows} == {""}
    assert [row["arm"] for row in _rows(tmp_path / "scores.csv")] == ["finetuned"]


def test_without_samples_there_is_an_empty_table(tmp_path):
    write_csv(folders(tmp_path) | {"samples": []}, tmp_path)
    assert (tmp_path / "samples.csv").read_text().strip() == ""

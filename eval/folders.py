"""Any two folders of pictures, measured against each other without a run or a base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import field_validator, model_validator

from train.config import EvaluationConfig, Section, UserError, load

if TYPE_CHECKING:
    import numpy as np

    from eval.features import Extractor
    from eval.moments import Moments
    from eval.scores import Score

STATISTICS = ".safetensors"
TOY_CLIP = "data/assets/toy-clip"
_TOY = (
    "Measured by the toy CLIP, which has seen nothing but the toy world: for other pictures give "
    "evaluation.features=, an Inception file or the folder or hub id of a CLIP or DINO."
)


class FoldersConfig(Section):
    """Measures one folder of pictures against another (eval/evaluate.py images=DIR
    reference=DIR)."""

    images: Path
    """Folder of pictures to judge, with those in folders below it."""
    reference: Path
    """Folder of real pictures, or a .safetensors file that save_reference wrote."""
    output: Path | None = None
    """Folder of metrics.json, scores.csv and report.html; default: eval beside `images`."""
    save_reference: Path | None = None
    """A .safetensors file to keep the reference's statistics in."""
    cache: Path = Path("runs/cache")
    """Folder of pictures' features."""
    evaluation: EvaluationConfig = EvaluationConfig(clip=TOY_CLIP)
    """What looks at the pictures, evaluation.features or evaluation.clip; default: the toy CLIP."""

    @model_validator(mode="after")
    def _nothing_to_save(self) -> Self:
        if self.save_reference is not None and self.reference.suffix == STATISTICS:
            raise ValueError(
                f"save_reference={self.save_reference}: reference={self.reference} holds "
                "statistics already; leave it out, or give a folder of pictures"
            )
        return self

    @field_validator("save_reference")
    @classmethod
    def _safetensors(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != STATISTICS:
            raise ValueError(f"save_reference={value} must end in {STATISTICS}")
        return value


def compare_folders(arguments: Sequence[str]) -> None:
    """The command. Raises UserError for what cannot be compared, before anything is loaded."""
    config = load(FoldersConfig, list(arguments))
    from eval.features import find_extractor

    settings = config.evaluation
    path = settings.features or settings.clip
    find_extractor(path)
    images = pictures_in("images", config.images)
    kept = config.reference.suffix == STATISTICS
    reference = [] if kept else pictures_in("reference", config.reference)

    from eval.outputs import writing_to

    folder = config.output or config.images.absolute().parent / f"{config.images.name}-eval"
    with writing_to(folder, "output"):
        _measure(config, path, images, reference, folder)


def _measure(
    config: FoldersConfig, path: str, images: list[Path], reference: list[Path], folder: Path
) -> None:
    from eval import processes, reference_file
    from eval.features import extract, load_extractor

    processes.quieten()
    state = processes.join()
    processes.one_thread(state.device)
    extractor = load_extractor(path, device=state.device, resize=config.evaluation.resize)
    how: dict[str, Any] = {
        "cache": config.cache / "features",
        "rank": state.process_index,
        "world": state.num_processes,
        "gather": processes.gather,
    }
    kept = None if reference else reference_file.load(config.reference, extractor.describe())
    made = extract(extractor, images, **how)
    real = kept or extract(extractor, reference, **how)
    if state.is_main_process:
        _finish(config, extractor, made, real, folder)
    state.destroy_process_group()


def pictures_in(key: str, folder: Path) -> list[Path]:
    """Every picture below the folder, by path. Raises UserError where there are fewer than two."""
    from data.images import EXTENSIONS

    if not folder.is_dir():
        raise UserError(f"{key}={folder} is not a folder")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if len(found) < 2:
        raise UserError(
            f"{key}={folder} holds {len(found)} picture{'s' * (not found)}; at least 2 are needed"
        )
    return found


def _finish(
    config: FoldersConfig,
    extractor: Extractor,
    made: np.ndarray,
    real: np.ndarray | Moments,
    folder: Path,
) -> None:
    from data.files import write_atomically
    from eval.figures import settled
    from eval.moments import Moments
    from eval.presentation import console, present
    from eval.tables import write_csv

    if isinstance(real, Moments):
        scores = _of_statistics(made, real)
    else:
        scores = _scores(made, real, extractor)
        if config.save_reference is not None:
            _save(config.save_reference, real, extractor, config.reference)
    metrics = settled(_metrics(config, scores, extractor))
    content = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "metrics.json", content.encode("utf-8"))
    write_csv(metrics, folder)
    present(metrics, folder, lambda kind, id: None)
    notes = "".join(f"\nnote: {text}" for text in metrics["warnings"])
    print(f"\n{console(metrics)}\n\n{metrics['verdict']}{notes}\n\n{folder / 'report.html'}")


def _save(path: Path, real: np.ndarray, extractor: Extractor, reference: Path) -> None:
    from eval import reference_file
    from eval.moments import Moments
    from eval.outputs import writing_to

    with writing_to(path.parent, "save_reference"):
        reference_file.save(path, Moments.of(real), extractor.describe(), folder=reference.name)


def _scores(made: np.ndarray, real: np.ndarray, extractor: Extractor) -> dict[str, Score]:
    from eval import distance_scores

    rows = list(range(len(made) + len(real)))
    seen = distance_scores.Features(real, {"finetuned": made}, extractor.describe())
    return distance_scores.scores(
        seen.reference,
        seen.arms,
        groups=rows[: len(made)],
        of_reference=rows[len(made) :],
        extractor=seen.extractor,
        clip=seen if hasattr(extractor, "texts") else None,  # else it is no CLIP
    )


def _of_statistics(made: np.ndarray, reference: Moments) -> dict[str, Score]:
    """What can be had from moments alone: the FID, without an interval."""
    from eval.frechet import frechet_distance, small_sample_warning
    from eval.moments import Moments
    from eval.scores import Score, Value

    value = frechet_distance(Moments.of(made), reference)
    return {
        "fid": Score(
            title="FID",
            better="less",
            values={"finetuned": Value(value, n=len(made))},
            how=f"Fréchet distance in float64 (Heusel et al. 2017) to kept statistics of "
            f"{reference.n} pictures.",
            warning=small_sample_warning(made.shape[1], len(made), reference.n) or "",
            facts={"pictures": len(made), "references": reference.n, "dimension": made.shape[1]},
        )
    }


def _metrics(
    config: FoldersConfig, scores: dict[str, Score], extractor: Extractor
) -> dict[str, Any]:
    from eval.figures import number
    from eval.scores import FORMAT

    leading = next(iter(scores.values()))
    found = leading.values["finetuned"]
    said = f"{leading.title} {number(found.value)}"
    if found.low is not None and found.high is not None:
        said += f" ({number(found.low)} to {number(found.high)})"
    unbiased = "; two sets of one kind have 0 on average" if leading.title != "FID" else ""
    return {
        "format": FORMAT,
        "kind": "folders",
        "title": f"{config.images.name} against {config.reference.name}",
        "keep": None,
        "verdict": f"{said} between {config.images.name} and {config.reference.name}{unbiased}.",
        "warnings": [_TOY] if extractor.name == TOY_CLIP else [],
        "arms": {"finetuned": config.images.name},
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "power": [],
        "samples": [],
        "general": [],
        "prior": [],
        "memorisation": None,
        "curves": {"checkpoints": [], "scales": []},
        "extractors": {"features": extractor.describe()},
        "reference": None,
        "training": None,
        "settings": {"resize": config.evaluation.resize},
    }

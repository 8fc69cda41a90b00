"""The speed and memory of the distances between sets of features, each in a process of its own and
on one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from scripts.benchmarks.measuring import fresh, seconds, spread

HERE = __name__
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
BATCH = 256  # pictures an extractor gives at once

Results = dict[str, dict[str, Any]]


class Scale(NamedTuple):
    """How much of everything: dimension and pictures of Inception, pictures for the distances that
    take all pairs, pictures and dimension of CLIP."""

    dimension: int
    pictures: int
    pairs: int
    few: int
    clip: int
    rounds: int


FULL = Scale(2048, 50_000, 5_000, 256, 768, 3)
QUICK = Scale(512, 4_000, 1_000, 64, 256, 2)


def measure(parts: Sequence[str], scale: Scale) -> Results:
    """The results of each part by its name."""
    with _one_thread():
        return {part: fresh(f"{HERE}:{part}", scale=list(scale)) for part in parts}


def table(results: Results) -> str:
    """The results as Markdown."""
    rows = [("what", "measured", "target"), ("---", "---", "---")]
    rows += [row for part, result in results.items() for row in ROWS[part](result)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For the processes started meanwhile: numpy reads it when it is imported."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def streaming(scale: list[int]) -> dict[str, Any]:
    """Features, made batch by batch, to their moments."""
    from eval.moments import Moments

    size, moments = Scale(*scale), Moments(Scale(*scale).dimension)

    def stream() -> None:
        random = np.random.default_rng(0)
        for start in range(0, size.pictures, BATCH):
            shape = (min(BATCH, size.pictures - start), size.dimension)
            moments.update(random.standard_normal(shape, dtype=np.float32))

    taken = seconds(stream)
    assert moments.n == size.pictures
    return {"pictures": size.pictures, "dimension": size.dimension, "seconds": round(taken, 2)}


def frechet(scale: list[int]) -> dict[str, Any]:
    """One distance: of full rank, and of so few pictures on one side and on both."""
    from eval.frechet import frechet_distance, frechet_from_features
    from eval.moments import Moments

    size = Scale(*scale)
    real, generated = (_features(seed, 2 * size.dimension, size.dimension) for seed in (0, 1))
    reference, other = Moments.of(real), Moments.of(generated)
    few = _features(2, size.few, size.dimension)
    routes: dict[str, Callable[[], object]] = {
        "full_rank": partial(frechet_distance, other, reference),
        "few_to_moments": partial(frechet_from_features, few, reference),
        "few_to_features": partial(frechet_from_features, few, real),
        "few_to_few": partial(frechet_from_features, few, real[: size.few]),
    }
    figures = {name: _repeated(work, size.rounds) for name, work in routes.items()}
    return {"dimension": size.dimension, "few": size.few, "many": len(real), "seconds": figures}


def intervals(scale: list[int]) -> dict[str, Any]:
    """How sure an evaluation is: the jackknife of two arms, CLIP's features."""
    from eval.frechet_jackknife import jackknife

    size = Scale(*scale)
    sets = [_features(seed, size.few, size.clip) for seed in range(3)]
    figures = _repeated(partial(jackknife, *sets), size.rounds)
    return {"pictures": size.few, "dimension": size.clip, "seconds": figures}


def pairs(scale: list[int]) -> dict[str, Any]:
    """What looks at all pairs of pictures, with as many on either side."""
    from eval.coverage import coverage
    from eval.kernel_distances import cmmd, kid
    from eval.variety import vendi_score

    size = Scale(*scale)
    real, generated = (_features(seed, size.pairs, size.dimension) for seed in (0, 1))
    works: dict[str, Callable[[], object]] = {
        "KID": partial(kid, generated, real),
        "CMMD": partial(cmmd, generated, real),
        "precision, recall, density, coverage": partial(coverage, real, generated),
        "Vendi score": partial(vendi_score, generated),
    }
    figures = {name: _repeated(work, size.rounds) for name, work in works.items()}
    return {"pictures": size.pairs, "dimension": size.dimension, "seconds": figures}


def _features(seed: int, n: int, dimension: int) -> np.ndarray:
    """Features whose variances fall as those of real ones do."""
    random = np.random.default_rng(seed)
    return random.normal(size=(n, dimension)) * np.geomspace(1, 0.01, dimension)


def _repeated(work: Callable[[], object], rounds: int) -> dict[str, float]:
    return spread([seconds(work) for _ in range(rounds)])


# The table


def _span(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f} to {values['max']:.2f})"


def _streaming_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    what = f"moments of {result['pictures']:,} x {result['dimension']:,} features by {BATCH}"
    yield f"{what}, peak MiB", f"{result['peak_mib']:,.0f}", "under 1,024"
    yield f"{what}, seconds", f"{result['seconds']:.1f}", ""


def _frechet_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    times, few, many = result["seconds"], result["few"], f"{result['many']:,}"
    what = f"Fréchet distance in {result['dimension']:,} dimensions, one thread, seconds"
    yield what, _span(times["full_rank"]), "at most 5"
    yield f"the same of {few} pictures to moments", _span(times["few_to_moments"]), ""
    yield f"the same of {few} pictures to {many}", _span(times["few_to_features"]), ""
    yield f"the same of {few} pictures to {few}", _span(times["few_to_few"]), ""


def _interval_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    size = f"{result['pictures']} pictures in {result['dimension']} dimensions"
    yield f"intervals of two FIDs, {size}, seconds", _span(result["seconds"]), ""


def _pairs_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, times in result["seconds"].items():
        yield f"{name} of {result['pictures']:,} pictures a side, seconds", _span(times), ""
    yield "peak MiB of these", f"{result['peak_mib']:,.0f}", ""


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str, str]]]] = {
    "streaming": _streaming_rows,
    "frechet": _frechet_rows,
    "intervals": _interval_rows,
    "pairs": _pairs_rows,
}

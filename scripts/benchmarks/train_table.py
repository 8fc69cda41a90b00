"""The training benchmark's figures as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.benchmarks.measuring import span


def table(results: dict[str, Any]) -> str:
    lines = ["| what | measured | target |", "| --- | --- | --- |"]
    lines += [f"| {what} | {value} | {target} |" for what, value, target in _rows(results)]
    return "\n".join(lines)


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if "seconds" in results:
        yield from _speed_rows(results)
    if "memory" in results:
        memory = results["memory"]
        yield "peak resident memory, MiB", f"{memory['peak_mib']:,.0f}", ""
        if memory["device_peak_gib"] is not None:
            yield "peak of the device's allocator, GiB", f"{memory['device_peak_gib']:.2f}", ""
    if "python" in results:
        taken = span(results["python"]["milliseconds"], 3)
        yield "a step of a model of one number, milliseconds", taken, "at most 2"


def _speed_rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    seconds, ratios = results["seconds"], results["ratios"]
    yield "pictures per second", f"{results['images_per_second']:,.2f}", ""
    yield "a step, seconds", span(results["step"], 3), ""
    yield "waiting for data, share of it", span(results["data_wait"], 4), "at most 0.02"
    for name in ("forward", "backward", "optimizer"):
        yield f"{name} alone, seconds", span(seconds[name], 3), ""
    yield "the three together, seconds", span(seconds["bare"], 3), ""
    yield "the three together, share of the loop's step", span(ratios["bare"], 3), "at least 0.97"
    if "reference" in seconds:
        yield "a step of the published recipe, seconds", span(seconds["reference"], 3), ""
        taken = span(results["encode_to_forward"])
        yield "encoding its pictures, in forward passes of the UNet", taken, ""
        yield "times as fast as the published recipe", span(ratios["reference"], 3), "at least 1.6"
    if "against" in seconds:
        yield "in rounds: the other setting, seconds", span(seconds["against"], 3), ""
        yield "times as fast as the other setting", span(ratios["against"], 3), ""
    yield "TFLOP/s", f"{results['tflop_per_second']:,.3f}", ""
    yield "TFLOP/s of a matrix product here", f"{results['matmul_tflop_per_second']:,.3f}", ""
    yield "share of that", f"{results['share_of_matmul']:.1%}", ""
    if results["device_peak_gib"] is not None:
        yield "peak of the device's allocator, GiB", f"{results['device_peak_gib']:.2f}", ""

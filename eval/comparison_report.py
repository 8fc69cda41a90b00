"""What a comparison found: a sentence, a table for the terminal, compare.json and compare.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_atomically
from eval.comparing import CLASS, FORGETTING, Test, about, value
from eval.evaluated_runs import ARM, Side, matched
from eval.figures import number, signed
from eval.report import (
    Comparison,
    Panel,
    Section,
    Table,
    facts,
    heading,
    section_of,
    table_of,
    verdict_line,
    warning,
    write_page,
)
from eval.significance import probability

FORMAT = 1  # of compare.json
_SHOWN = 6  # prompts each way
# Of the second against the first, where it is better and where it is worse.
_WORDS = {
    "clip_score": ("follows the prompts better than", "follows the prompts less than"),
    "clip_t": ("follows the prompts better than", "follows the prompts less than"),
    "clip_i": ("looks more like the subject than", "looks less like the subject than"),
    "dino": ("looks more like the subject than", "looks less like the subject than"),
    CLASS: ("keeps the class apart better than", "turns the class into the subject more than"),
    FORGETTING: ("changes unrelated pictures less than", "changes unrelated pictures more than"),
}
_NOT_PAIRED = (
    "Scores of whole sets of pictures. Each interval is of one side alone: these are not paired, "
    "so two intervals that overlap a little may still be of different models."
)


@dataclass(frozen=True)
class Comparisons:
    """All that was found."""

    sides: Sequence[Side]
    tests: Sequence[Test]
    unpaired: Mapping[str, Sequence[Mapping[str, Any] | None]]
    notes: Sequence[str] = ()
    judgement: Mapping[str, Any] = field(default_factory=dict)
    """What people said (eval/votes.py); empty where nobody was asked."""

    @property
    def title(self) -> str:
        return " against ".join(side.name for side in self.sides)

    def of(self, second: Side) -> list[Test]:
        return [test for test in self.tests if test.second == second.name]


def verdict(found: Comparisons) -> str:
    """What differs clearly, in a sentence for each side but the first; and what people said."""
    said = [
        _sentence(found.of(second), found.sides[0].name, second.name) for second in found.sides[1:]
    ]
    return " ".join([*said, *filter(None, [found.judgement.get("said")])])


def table(tests: Sequence[Test]) -> Table:
    """A row for each score: both means and the difference with its interval."""
    first, second = tests[0].first, tests[0].second
    rows = [
        (
            f"{test.title}{_way(test.better)}",
            [
                (number(test.means[0]), ""),
                (number(test.means[1]), ""),
                (signed(test.change.difference), _ends(vars(test.change), signed)),
                (probability(test.p), _alone(test)),
                (signed(test.change.effect) if test.change.effect is not None else "", ""),
                (str(test.change.groups), f"{test.pictures} pictures"),
            ],
        )
        for test in tests
    ]
    return Table([first, second, "difference", "p", "effect", "prompts"], rows)


def table_unpaired(found: Comparisons) -> Table:
    """A row for each score of whole sets, a column for each side."""
    rows = []
    for name, values in found.unpaired.items():
        known = about(found.sides, name)
        cells = [(number(v["value"]), _ends(v, number)) if v else ("", "") for v in values]
        rows.append((f"{known['title']}{_way(known['better'])}", cells))
    return Table([side.name for side in found.sides], rows)


def console(found: Comparisons) -> str:
    """Tables, hints, notes and the verdict, for the terminal."""
    parts = [aligned(table(found.of(second))) for second in found.sides[1:] if found.of(second)]
    if found.unpaired:
        parts.append(f"{aligned(table_unpaired(found))}\n(not paired)")
    if found.judgement:
        voted = aligned(Table(found.judgement["columns"], found.judgement["rows"]))
        parts.append(f"{voted}\n{found.judgement['detail']}")
    hints = [f"{test.title}: {test.hint}" for test in _hinted(found)]
    return "\n\n".join([*parts, "\n".join([*hints, *found.notes]), verdict(found)])


def aligned(table: Table) -> str:
    """The table in columns of text, small print in brackets."""
    lines = [["", *table.columns]]
    lines += [
        [name, *(f"{text}  [{note}]" if note else text for text, note in cells)]
        for name, cells in table.rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write(found: Comparisons, folder: Path) -> Path:
    """compare.json and compare.html; the path of the latter."""
    content = {
        "format": FORMAT,
        "title": found.title,
        "verdict": verdict(found),
        "notes": list(found.notes),
        "sides": [{"name": side.name, "file": str(side.file)} for side in found.sides],
        "tests": [_as_dict(test) for test in found.tests],
        "unpaired": found.unpaired,
        "judgement": {k: v for k, v in found.judgement.items() if k not in ("rows", "columns")},
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "compare.json", text.encode("utf-8"))
    write_page(folder / "compare.html", title=found.title, pieces=list(_pieces(found)))
    return folder / "compare.html"


def _pieces(found: Comparisons) -> Iterator[str]:
    yield verdict_line(verdict(found))
    yield from map(warning, found.notes)
    for second in found.sides[1:]:
        if tests := found.of(second):
            yield table_of(table(tests))
    if found.unpaired:
        yield heading("Not paired", _NOT_PAIRED) + table_of(table_unpaired(found))
    if found.judgement:
        yield heading("What people said", found.judgement["detail"])
        yield table_of(Table(found.judgement["columns"], found.judgement["rows"]))
    for second in found.sides[1:]:
        yield from map(section_of, _pictures(found, second))
    yield facts("What could be seen", [(test.title, test.hint) for test in _hinted(found)])
    yield facts("How this was measured", list(_method(found)))


def _pictures(found: Comparisons, second: Side) -> Iterator[Section]:
    """Where the two differ most in the leading score, both ways; without one, some of all."""
    first = found.sides[0]
    tests = [test for test in found.of(second) if test.score not in (FORGETTING, CLASS)]
    pairs = [(one, two) for one, two in matched([first, second])]
    if not tests:
        count = min(2 * _SHOWN, len(pairs))
        some = [pairs[k * len(pairs) // count] for k in range(count)]
        yield _section(
            f"{first.name} and {second.name} side by side",
            f"{count} of {len(pairs)}, evenly spaced, not picked. Both got the same noise.",
            [_comparison(first, second, *pair, None) for pair in some],
        )
        return
    test = tests[0]
    pairs = [pair for pair in pairs if all(ARM in each["scores"][test.score] for each in pair)]
    less = -1 if test.better == "less" else 1
    gains = np.array([value(test.score, two) - value(test.score, one) for one, two in pairs])
    order = np.argsort(-less * gains, kind="stable")
    for name, chosen in ((second.name, order), (first.name, order[::-1])):
        sign = less if name == second.name else -less
        some = [pairs[k] for k in chosen[:_SHOWN] if sign * gains[k] > 0]
        yield _section(
            f"Where {name} does best",
            f"The {len(some)} largest differences in {test.title} in its favour, of {len(pairs)} "
            "pictures. Both got the same prompt and noise.",
            [_comparison(first, second, *pair, test) for pair in some],
        )


def _section(title: str, explanation: str, comparisons: Sequence[Comparison | None]) -> Section:
    return Section(title, explanation, [each for each in comparisons if each])


def _comparison(
    first: Side, second: Side, one: Mapping, two: Mapping, test: Test | None
) -> Comparison | None:
    """None where a picture is gone."""
    panels = []
    for side, sample in ((first, one), (second, two)):
        path = side.picture(sample)
        if path is None:
            return None
        note = f"{test.title} {number(value(test.score, sample))}" if test else ""
        panels.append(Panel(path, side.name, note))
    return Comparison(one["prompt"], panels)


def _method(found: Comparisons) -> Iterator[tuple[str, str]]:
    if found.tests:
        yield (
            "Pairing",
            "The same prompts, seeds and sizes on every side; each prompt counts once, by the mean "
            "of its pictures. The table says how many prompts and pictures have each score. "
            f"Differences are from {found.sides[0].name}.",
        )
        yield (
            "p",
            "Two-sided sign-flip test over prompts: how often models that are equal would differ "
            f"as much. Raised for the {len(found.tests)} tests made here (Holm); in small print "
            "that of the test alone.",
        )
        yield (
            "Interval",
            "95 %, bootstrap-t over prompts, no narrower than Student's t. Of each difference "
            "alone, so it may leave out 0 where p, which counts all tests, is above 0.05.",
        )
        yield "Effect", "Mean difference over its standard deviation between prompts (d_z)."
    for side in found.sides:
        yield side.name, str(side.file)


def _sentence(tests: Sequence[Test], first: str, second: str) -> str:
    if not tests:
        return f"{second} and {first} have no score of single pictures to compare."
    clear = [test for test in tests if test.clear]
    if not clear:
        lead = tests[0]
        return f"No score differs clearly between {first} and {second}. {lead.title}: {lead.hint}"
    by_words: dict[str, list[str]] = {}
    for test in clear:
        by_words.setdefault(_worded(test), []).append(f"{test.title} {_moved(test)}")
    said = [f"{words} ({'; '.join(moved)})" for words, moved in by_words.items()]
    rest = "; no other paired score differs clearly" if len(clear) < len(tests) else ""
    return f"{second} {' and '.join(said)}{rest}."


def _worded(test: Test) -> str:
    if test.score in _WORDS and test.improved:
        words = _WORDS[test.score][0 if test.improved > 0 else 1]
    else:
        words = "scores higher than" if test.change.difference > 0 else "scores lower than"
    return f"{words} {test.first}"


def _moved(test: Test) -> str:
    return f"{signed(test.change.difference)}, {probability(test.p, equals=True)}"


def _hinted(found: Comparisons) -> list[Test]:
    """The leading test against each side."""
    return [found.of(second)[0] for second in found.sides[1:] if found.of(second)]


def _alone(test: Test) -> str:
    return f"alone {probability(test.change.p)}" if test.p != test.change.p else ""


def _way(better: str | None) -> str:
    return f" ({better} is better)" if better else ""


def _ends(of: Mapping[str, Any], write: Any) -> str:
    if of.get("low") is None or of.get("high") is None:
        return ""
    return f"{write(of['low'])} to {write(of['high'])}"


def _as_dict(test: Test) -> dict[str, Any]:
    return {
        **vars(test),
        "change": test.change.as_dict(),
        "means": list(test.means),
        "prompts": test.change.groups,
        "clear": test.clear,
    }

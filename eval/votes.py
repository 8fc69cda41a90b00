"""What people said on a rating page: the files they saved, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from eval.evaluated_runs import Shape, parsed
from eval.figures import number, signed
from eval.rating_page import FORMAT
from eval.significance import Interval, holm, interval, paired, probability, share, sign_test
from train.config import UserError

_CHOICES = {"pair": ("left", "right", "equal"), "score": (1, 2, 3, 4, 5)}


class _Vote(Shape):
    item: int
    vote: str | int


class _Saved(Shape):
    """What the page's script saves."""

    format: int
    page: str
    kind: Literal["pair", "score"]
    rater: str = Field(max_length=60)
    votes: list[_Vote]


@dataclass(frozen=True)
class Ballot:
    """One person's votes by the item's place on the page."""

    rater: str
    votes: Mapping[int, str | int]


def read(files: Sequence[Path], key: Mapping[str, Any]) -> list[Ballot]:
    """The ballots of a page; UserError for those of another page, or of one person twice."""
    ballots = [_ballot(file, key) for file in files]
    seen: dict[str, Path] = {}
    for ballot, file in zip(ballots, files, strict=True):
        rater = ballot.rater.casefold()
        if rater in seen:
            raise UserError(
                f"votes: {seen[rater]} and {file} are both of {ballot.rater}; give one file for "
                "each person"
            )
        seen[rater] = file
    return ballots


def judgement(key: Mapping[str, Any], ballots: Sequence[Ballot]) -> dict[str, Any]:
    """What the ballots say: numbers, a sentence (`said`), who voted (`detail`), and `columns` and
    `rows` of a table."""
    if not any(ballot.votes for ballot in ballots):
        raise UserError("votes: none of the files holds a vote")
    found = _preferred(key, ballots) if key["kind"] == "pair" else _rated(key, ballots)
    detail = [f"{', '.join(f'{b.rater} ({len(b.votes)})' for b in ballots)} voted."]
    agree = agreement([_by_item(key, ballot) for ballot in ballots])
    if agree is not None:
        shown = f"{agree:.2f}".replace("-", "\N{MINUS SIGN}")
        detail.append(f"They agree to {shown} (Krippendorff's alpha): 1 is fully, 0 by chance.")
    raters = [{"rater": ballot.rater, "votes": len(ballot.votes)} for ballot in ballots]
    known = {"kind": key["kind"], "raters": raters, "agreement": agree}
    return {**known, **found, "detail": " ".join(detail)}


def agreement(ballots: Sequence[Mapping[int, float]]) -> float | None:
    """Krippendorff's alpha of raters' numbers by item, squared differences: 1 where all agree, 0
    where they do as if at random. None where no item has two votes, or all votes are the same.

    Hayes & Krippendorff, 2007, "Answering the call for a standard reliability measure".
    """
    items: dict[int, list[float]] = {}
    for ballot in ballots:
        for item, vote in ballot.items():
            items.setdefault(item, []).append(vote)
    shared = [np.array(votes) for votes in items.values() if len(votes) > 1]
    if not shared:
        return None
    # Of n numbers, ordered pairs differ squared by 2 n^2 times the variance.
    within = sum(2 * len(v) ** 2 * float(v.var()) / (len(v) - 1) for v in shared)
    pooled = np.concatenate(shared)
    between = 2 * len(pooled) ** 2 * float(pooled.var()) / (len(pooled) - 1)
    return 1 - within / between if between else None


def _preferred(key: Mapping[str, Any], ballots: Sequence[Ballot]) -> dict[str, Any]:
    """The share of votes for the second run, an equal counting half to each."""
    first, second = key["names"]
    votes = [_by_item(key, ballot) for ballot in ballots]  # -1 first, 0 equal, 1 second
    values = np.array([vote for of in votes for vote in of.values()])
    groups = np.array([key["items"][item]["prompt"] for of in votes for item in of])
    found = share((values + 1) / 2, groups)
    prompts = [values[groups == prompt].mean() for prompt in np.unique(groups)]
    p = sign_test(np.array(prompts))
    said = (
        f"People preferred {second} to {first} in {found.mean:.0%} of {found.n} votes"
        f"{_percent(found)}, {found.groups} prompts, {probability(p, equals=True)})."
    )
    rows = [("all", [_cell(found), (str(found.n), ""), (probability(p), "")])]
    if len(ballots) > 1:
        for ballot, of in zip(ballots, votes, strict=True):
            own = (np.array(list(of.values())) + 1) / 2
            mean = (f"{own.mean():.0%}", "") if len(own) else ("", "")
            rows.append((ballot.rater, [mean, (str(len(own)), ""), ("", "")]))
    columns = [f"votes for {second}", "votes", "p"]
    return {**_numbers(found), "p": p, "said": said, "columns": columns, "rows": rows}


def _rated(key: Mapping[str, Any], ballots: Sequence[Ballot]) -> dict[str, Any]:
    """Mean ratings, and each later run's difference to the first where a rater saw both."""
    names = key["names"]
    ratings = [_of_pictures(key, ballot) for ballot in ballots]
    means = [_mean(ratings, side) for side in range(len(names))]
    changes = [_change(ratings, side) for side in range(1, len(names))]
    for change, p in zip(filter(None, changes), _raised(changes), strict=True):
        change["p"] = p
    later = list(zip(names[1:], means[1:], changes, strict=True))
    said = [_rated_sentence(name, names[0], change) for name, _, change in later if change]
    rows = [(names[0], [_rating(means[0]), ("", ""), ("", "")])]
    rows += [(name, [_rating(mean), *_change_cells(change)]) for name, mean, change in later]
    return {
        "means": {
            name: mean.as_dict() if mean else None for name, mean in zip(names, means, strict=True)
        },
        "changes": {name: change for name, _, change in later},
        "said": " ".join(said) or "Nobody rated the same prompt of two runs.",
        "columns": ["mean rating", f"against {names[0]}", "p"],
        "rows": rows,
    }


def _raised(changes: Sequence[Mapping[str, Any] | None]) -> list[float]:
    return holm([change["p"] for change in changes if change])


def _rated_sentence(name: str, first: str, change: Mapping[str, Any]) -> str:
    between = f", 95 % interval {_ends(change)}" if _ends(change) else ""
    return (
        f"People rated {name} {signed(change['difference'])} against {first} (of 5{between}, "
        f"{change['groups']} prompts, {probability(change['p'], equals=True)})."
    )


def _change_cells(change: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if change is None:
        return [("", ""), ("", "")]
    return [(signed(change["difference"]), _ends(change)), (probability(change["p"]), "")]


Rating = dict[tuple[str, int], dict[int, float]]  # (prompt, seed) -> side -> rating


def _mean(ratings: Sequence[Rating], side: int) -> Interval | None:
    found = [
        (prompt, of[side]) for each in ratings for (prompt, _), of in each.items() if side in of
    ]
    if not found:
        return None
    return interval(np.array([v for _, v in found]), np.array([prompt for prompt, _ in found]))


def _change(ratings: Sequence[Rating], side: int) -> dict[str, Any] | None:
    both = [
        (prompt, of[0], of[side])
        for each in ratings
        for (prompt, _), of in each.items()
        if 0 in of and side in of
    ]
    if not both:
        return None
    prompts, first, second = zip(*both, strict=True)
    return paired(np.array(first), np.array(second), np.array(prompts)).as_dict()


def _of_pictures(key: Mapping[str, Any], ballot: Ballot) -> Rating:
    found: Rating = {}
    for place, vote in ballot.votes.items():
        item = key["items"][place]
        found.setdefault((item["prompt"], item["seed"]), {})[item["sides"][0]] = float(vote)
    return found


def _by_item(key: Mapping[str, Any], ballot: Ballot) -> dict[int, float]:
    """Votes as numbers: the rating; of a pair 1 for the second run, -1 for the first, 0 equal."""
    if key["kind"] == "score":
        return {item: float(vote) for item, vote in ballot.votes.items()}
    towards = {item: key["items"][item]["sides"] for item in ballot.votes}
    place = {"left": 0, "right": 1}
    return {
        item: 0.0 if vote == "equal" else 2.0 * towards[item][place[str(vote)]] - 1
        for item, vote in ballot.votes.items()
    }


def _ballot(file: Path, key: Mapping[str, Any]) -> Ballot:
    try:
        content = parsed(file, _Saved)
    except OSError as error:
        raise UserError(f"votes: {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(
            f"votes: {file} is not what a rating page saves ({error}); save it from the page again"
        ) from None
    if any(content[name] != key[name] for name in ("page", "kind")) or content["format"] != FORMAT:
        raise UserError(f"votes: {file} was saved from another page than the one rating= names")
    if not content["rater"].strip():
        raise UserError(f"votes: {file} does not say whose votes it holds; save it with a name")
    return Ballot(content["rater"].strip(), _votes(file, content, key))


def _votes(file: Path, content: Mapping[str, Any], key: Mapping[str, Any]) -> dict[int, str | int]:
    found: dict[int, str | int] = {}
    for each in content["votes"]:
        item, vote = each["item"], each["vote"]
        if vote not in _CHOICES[key["kind"]] or not 0 <= item < len(key["items"]):
            raise UserError(f"votes: {file} holds {vote!r} for item {item}, which cannot be")
        if item in found:
            raise UserError(f"votes: {file} holds two votes for item {item}; save it again")
        found[item] = vote
    return found


def _ends(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return ""
    return f"{signed(change['low'])} to {signed(change['high'])}"


def _percent(found: Interval) -> str:
    if found.low is None or found.high is None:
        return " ("
    return f" (95 % interval {found.low:.0%} to {found.high:.0%}"


def _cell(found: Interval) -> tuple[str, str]:
    ends = "" if found.low is None else f"{found.low:.0%} to {found.high:.0%}"
    return f"{found.mean:.0%}", ends


def _rating(found: Interval | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    if found.low is None or found.high is None:
        return number(found.mean), ""
    return number(found.mean), f"{number(found.low)} to {number(found.high)}"


def _numbers(found: Interval) -> dict[str, Any]:
    return {
        "share": found.mean,
        "low": found.low,
        "high": found.high,
        "votes": found.n,
        "prompts": found.groups,
    }

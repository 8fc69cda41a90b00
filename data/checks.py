"""What is worth a second look before training: what the captions say, and warnings with a remedy.

Nothing here reads pictures: it works on captions and counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data.listing import shown
from data.records import Record
from train.config import UserError

HEAVY_CROP = 0.25  # share of a picture's pixels
STRONG_ENLARGEMENT = 1.5
FEW_PICTURES = 10
FEW_HELD_OUT = 6  # as many captions as a test of significance needs, eval/significance.py
COMMON_CAPTION = 0.3  # share of the pictures
SHORT_BATCHES = 0.25  # share of an epoch's batches
SPOKEN = 3  # pictures named in a warning
NAMED = 100  # pictures named in the report for each finding; pictures.jsonl has them all
_AT_ONCE = 4096
_PIECES = re.compile(r"[^\W\d_]+|\d|_+|[^\w\s]+")
_PLAIN = set(
    "a an and are as at by for from has her his in into is it its of on or some that the their "
    "there this to two up very while with".split()
)


# Captions ------------------------------------------------------------------------------------

CountTokens = Callable[[list[str]], list[int]]


def token_counter(tokenizer: str | None) -> CountTokens:
    """Counts captions' tokens by CLIP's tokenizer in this folder or base model; without one, by
    words, digits and punctuation, of which each is one token at least."""
    if tokenizer is None:
        return lambda captions: [len(_PIECES.findall(caption)) for caption in captions]
    from transformers import CLIPTokenizer

    from data.tokens import count_tokens

    folder = Path(tokenizer)
    if (folder / "tokenizer").is_dir():
        folder /= "tokenizer"
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer={tokenizer} holds no vocab.json or tokenizer.json: give the folder of a "
            "tokenizer, or of a base model"
        )
    loaded = CLIPTokenizer.from_pretrained(folder)
    return lambda captions: count_tokens(loaded, captions)


def caption_statistics(
    records: Iterable[Record], count_tokens: CountTokens, *, max_tokens: int
) -> dict[str, Any]:
    """Lengths, the commonest words or tags, what is cut and what is said twice; in one pass."""
    rest = ((record.id, caption) for record in records for caption in record.captions)
    lengths: Counter[int] = Counter()
    words: Counter[str] = Counter()
    tags: Counter[str] = Counter()
    said: Counter[str] = Counter()
    cut: list[dict[str, Any]] = []
    tagged = 0
    while batch := list(islice(rest, _AT_ONCE)):
        counts = count_tokens([caption for _, caption in batch])
        for (name, caption), tokens in zip(batch, counts, strict=True):
            lengths[tokens] += 1
            said[caption] += 1
            own = {tag.strip().lower() for tag in caption.split(",")} - {""}
            tagged += len(own) >= 4
            tags.update(own)
            words.update({*re.findall(r"[^\W\d_]{2,}", caption.lower())} - _PLAIN)
            if tokens > max_tokens:
                cut.append({"id": name, "tokens": tokens, "caption": caption[:400]})
    total = lengths.total()
    by_tags = tagged > total / 2
    return {
        "captions": total,
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "cut": len(cut),
        "longest_cut": sorted(cut, key=lambda each: (-each["tokens"], each["id"]))[:NAMED],
        "unit": "tags" if by_tags else "words",
        "commonest": _most(tags if by_tags else words, 40),
        "repeated": [pair for pair in _most(said, 10) if pair[1] > 1],
        "different": len(said),
    }


def _most(counts: Counter[str], limit: int) -> list[list[Any]]:
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [[text[:200], count] for text, count in ranked[:limit]]


# Warnings ------------------------------------------------------------------------------------


def short_batches(buckets: Sequence[Mapping[str, Any]], batch_size: int) -> tuple[int, int]:
    """How many of an epoch's batches are not full, and how many there are: each bucket's last one
    holds what is left over."""
    counts = [bucket["images"] for bucket in buckets]
    return sum(n % batch_size > 0 for n in counts), sum(-(-n // batch_size) for n in counts)


def warnings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a person should look at, the most important first: {"key", "text"}, from report.json's
    other entries. Each text says what to do."""
    checks = (
        _nothing_left,
        _rejected,
        _leaks,
        _unread_held_out,
        _left_from_before,
        _few,
        _no_held_out,
        _few_held_out,
        _cut,
        _said_again,
        _duplicates,
        _other_captions,
        _cropped,
        _enlarged,
        _short,
    )
    found = ((check.__name__.strip("_"), check(report)) for check in checks)
    return [{"key": key, "text": text} for key, text in found if text]


def many(count: int, thing: str, verb: str = "") -> str:
    """ "1 picture is", "2,000 pictures are"."""
    plural = {"is": "are", "has": "have", "shares": "share", "shows": "show"}
    noun = thing if count == 1 else f"{thing}s"
    action = verb if count == 1 else plural.get(verb, verb)
    return f"{count:,} {noun} {action}".rstrip()


def _for_example(ids: Sequence[str], count: int) -> str:
    """ " (a.jpg, b.jpg, c.jpg and 4 more)"."""
    spoken = ", ".join(map(shown, ids[:SPOKEN]))
    more = f" and {count - SPOKEN:,} more" if count > SPOKEN else ""
    return f" ({spoken}{more})" if spoken else ""


def _nothing_left(report: Mapping[str, Any]) -> str:
    if report["counts"]["train"]:
        return ""
    return "No picture is left to train on: loosen the filters that left most out."


def _rejected(report: Mapping[str, Any]) -> str:
    count = report["counts"]["rejected"]
    if not count:
        return ""
    names = _for_example([bad["id"] for bad in report["rejected"]], count)
    return (
        f"{many(count, 'file')} cannot be used{names}. The report says why: mend them and run this "
        "again, or go on without them."
    )


def _leaks(report: Mapping[str, Any]) -> str:
    leaks = report["against"]["matches"] if report["against"] else []
    if not leaks or report["against"]["removed"]:
        return ""
    return (
        f"{many(len(leaks), 'picture', 'shows')} what a picture in {report['against']['path']} "
        "shows, so an evaluation there would flatter: set duplicates=remove."
    )


def _unread_held_out(report: Mapping[str, Any]) -> str:
    rejected = report["against"]["rejected"] if report["against"] else []
    if not rejected:
        return ""
    names = _for_example([bad["id"] for bad in rejected], len(rejected))
    return (
        f"{many(len(rejected), 'file')} in {report['against']['path']} cannot be read{names}, so "
        "pictures that show the same may be left in: mend or remove them and run this again."
    )


def _left_from_before(report: Mapping[str, Any]) -> str:
    count = report["left_from_before"]
    if not count:
        return ""
    return (
        f"files=none left the {many(count, 'file')} of an earlier run in "
        f"{report['settings']['output']} as they were, which this report does not describe: run "
        "again without files=none, or remove them."
    )


def _few(report: Mapping[str, Any]) -> str:
    count = report["counts"]["train"]
    if not 0 < count < FEW_PICTURES:
        return ""
    return (
        f"Only {many(count, 'picture', 'is')} left to train on. That can be enough for a subject, "
        "but not for a style."
    )


def _few_held_out(report: Mapping[str, Any]) -> str:
    count = report["counts"]["held_out"]
    if not 0 < count < FEW_HELD_OUT:
        return ""
    return (
        f"Only {many(count, 'picture', 'is')} held out. eval/evaluate.py can tell a change from "
        f"chance from {FEW_HELD_OUT} different captions on: give held_out={FEW_HELD_OUT} or more."
    )


def _no_held_out(report: Mapping[str, Any]) -> str:
    if not report["settings"]["held_out"] or report["counts"]["held_out"]:
        return ""
    return (
        f"held_out={report['settings']['held_out']:g} put no picture aside, as there are so few: "
        "give a number of pictures instead, such as held_out=2."
    )


def _cut(report: Mapping[str, Any]) -> str:
    captions, limit = report["captions"], report["settings"]["max_tokens"]
    if not captions["cut"]:
        return ""
    least = "" if captions["exact"] else "At least "
    most = max(cut["tokens"] for cut in captions["longest_cut"])
    enough = next((tokens for tokens in (150, 225) if tokens >= most), None)
    how = "all" if captions["exact"] else "more"
    longer = f", or read {how}: data.captions.max_tokens={enough}" if enough else ""
    names = _for_example([cut["id"] for cut in captions["longest_cut"]], captions["cut"])
    return (
        f"{least}{many(captions['cut'], 'caption', 'is')} longer than {limit} tokens{names}, and "
        f"what is beyond would not be read. Shorten them{longer}."
    )


def _said_again(report: Mapping[str, Any]) -> str:
    captions = report["captions"]
    if not captions["repeated"] or report["settings"]["caption"] is not None:
        return ""
    text, count = captions["repeated"][0]
    share = count / captions["captions"]
    if share < COMMON_CAPTION or count < 3:
        return ""
    return (
        f"{100 * share:.0f} % of the captions are the same: “{text}”. So what tells these pictures "
        "apart cannot be learnt: describe each one."
    )


def _duplicates(report: Mapping[str, Any]) -> str:
    duplicates = report["duplicates"]
    if not duplicates["copies"] or report["settings"]["duplicates"] != "report":
        return ""
    return (
        f"{many(duplicates['copies'], 'picture', 'shows')} the same as another and would count "
        "more than once: look at the pairs, and set duplicates=remove."
    )


def _other_captions(report: Mapping[str, Any]) -> str:
    count = report["duplicates"]["other_captions"]
    if not count:
        return ""
    return (
        f"{many(count, 'duplicate', 'has')} another caption than the picture kept for it: look "
        "in the report whether the better one was kept, and if not, move it in the source."
    )


def _cropped(report: Mapping[str, Any]) -> str:
    count = report["geometry"]["heavily_cropped"]
    if not count:
        return ""
    names = _for_example(report["geometry"]["most_cropped"], count)
    return (
        f"More than {100 * HEAVY_CROP:g} % is cut off from {many(count, 'picture')}{names}: see "
        "that nothing is lost that the caption names. A larger max_side, a focus point, or "
        "max_aspect helps."
    )


def _enlarged(report: Mapping[str, Any]) -> str:
    count = report["geometry"]["strongly_enlarged"]
    if not count:
        return ""
    names = _for_example(report["geometry"]["most_enlarged"], count)
    return (
        f"{many(count, 'picture', 'is')} enlarged more than {STRONG_ENLARGEMENT:g} times{names} "
        "and will teach blur: set smallest=, or upscale=false, or a lower resolution."
    )


def _short(report: Mapping[str, Any]) -> str:
    batch_size = report["settings"]["batch_size"]
    short, batches = short_batches(report["buckets"], batch_size)
    if not batches or short / batches <= SHORT_BATCHES or len(report["buckets"]) < 2:
        return ""
    return (
        f"{short:,} of {batches:,} batches of an epoch hold "
        f"fewer than {batch_size} pictures, because the pictures are spread over "
        f"{len(report['buckets'])} buckets: a larger bucket_step makes fewer buckets."
    )

"""The values that scripts/init.py writes, each with the reason that stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from scripts.initial.looking import Base, Pictures, spread

Method = Literal["lora", "dreambooth", "textual_inversion", "full"]
AT_ONCE = "train.micro_batch_size"
RARE = "zwx"  # a word that hardly stands for anything


class Setting(NamedTuple):
    """One key of a configuration with its value and the reason for it."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Answers:
    """All that the configuration is made of."""

    pictures: Pictures
    base: Base
    method: Method
    noun: str
    """What a subject is one of."""
    card: float | None
    """GiB; None: it trains on the CPU."""
    name: str
    """Of the run directory."""
    held_out: str | None = None
    """The folder of pictures that were held out."""


def method_for(found: Pictures) -> tuple[Method, str]:
    """What suits the pictures, and why."""
    if found.one_subject:
        what = "without captions" if not found.captioned else f"that share the word {found.trigger}"
        return "dreambooth", f"{found.count} pictures {what} look like one subject"
    if not found.captioned:
        return (
            "lora",
            f"{found.count} pictures without captions: a style sooner than a subject",
        )
    what = "with captions" if found.captioned == found.count else f"({found.captioned} captioned)"
    return "lora", f"{found.count} pictures {what}: a style or a domain"


def settings(a: Answers) -> Iterator[Setting]:
    """All keys but those that depend on the card's memory (`fitting`), in the order of the file."""
    yield Setting("output", f"runs/{a.name}", "the results; the same command resumes")
    yield Setting("model.path", a.base.path, f"trained at {a.base.side} px")
    yield from _data(a)
    yield from _of_method(a)
    yield from _course(a)
    yield from _previews(a)


def _data(a: Answers) -> Iterator[Setting]:
    found = a.pictures
    yield Setting("data.path", found.path, str(found.recognised))
    side, why = resolution(found, a.base)
    yield Setting("data.resolution", side, why)
    if a.base.toy:
        yield Setting("data.bucket_step", 32, "64 would leave few shapes at this size")
    if found.bad:
        many = f"{len(found.bad)} of {found.count + len(found.bad)} cannot be used: left out, named"
        yield Setting("data.on_bad_image", "report", many)
    if found.captioned < found.count and a.method != "textual_inversion":
        lack = found.count - found.captioned
        yield Setting("data.caption", caption(a), f"for the {lack} pictures without one")
    if a.method == "textual_inversion":
        yield Setting("data.caption_dropout", 0, "nothing is learned without the token")
    elif a.method == "dreambooth":
        yield Setting("data.caption_dropout", 0, "no caption should not come to mean the subject")
    if found.long_captions:
        long = f"{found.long_captions} captions are longer than the 75 tokens that CLIP reads"
        yield Setting("data.captions.max_tokens", 150, long)


def caption(a: Answers) -> str:
    """For pictures without one."""
    if a.method == "dreambooth":
        return f"a photo of {RARE} {a.noun}"
    return f"a picture in the style of {RARE}"


def resolution(found: Pictures, base: Base) -> tuple[int, str]:
    """The area budget in pixels' side, and why."""
    if found.side >= 0.8 * base.side:
        return base.side, f"what the base was trained at; the pictures have about {found.side} px"
    side = max(found.side // 64 * 64, base.side // 2)
    return side, f"the pictures have about {found.side} px: more would be enlarged, not sharper"


def _of_method(a: Answers) -> Iterator[Setting]:
    if a.method == "dreambooth":
        yield from _dreambooth(a)
    elif a.method == "textual_inversion":
        token = {"token": f"<{a.name}>", "initial": a.noun, "vectors": 2}
        yield Setting("textual_inversion.tokens", [token], "the new word; initial: the nearest one")
        kind = "object" if a.pictures.one_subject else "style"
        yield Setting("textual_inversion.captions", kind, "sentences around the word")
    elif a.method == "full":
        yield Setting(
            "full.text_encoder", False, "true only with a ten times lower rate of its own"
        )
    else:
        yield Setting("lora.rank", 16 if a.base.toy else 8, "4 to 16 for a style; more holds more")
        yield Setting("lora.alpha", 16 if a.base.toy else 8, "as the rank: a strength of 1")
        targets = ["attention", "proj", "feed_forward"]
        yield Setting("lora.targets", targets, "all that draws surfaces; [attention] is subtler")


def _dreambooth(a: Answers) -> Iterator[Setting]:
    yield Setting("dreambooth.class_prompt", f"a photo of a {a.noun}", "what it is one of")
    prior, why = "images", "the base draws 200 of the class once, so that it keeps it"
    if a.base.toy:
        prior, why = "prediction", "the base's own prediction keeps the class; nothing to draw"
    yield Setting("dreambooth.prior", prior, why)
    yield Setting("lora.rank", 16, "enough for one subject")
    yield Setting("lora.alpha", 16, "as the rank: a strength of 1")
    text = {"rank": 8, "alpha": 8}
    yield Setting("lora.text_encoder", text, "lets the rare word be learned; null saves memory")


def batch_size(a: Answers) -> int:
    """Images per optimizer step."""
    return {"lora": 8, "dreambooth": 4, "textual_inversion": 4, "full": 16}[a.method]


def steps(a: Answers) -> tuple[int, str]:
    """How many optimizer steps, and why."""
    count, batch = a.pictures.count, batch_size(a)
    wanted = {
        "lora": max(min(100 * count, 2000), 10 * count // batch),
        "dreambooth": min(max(100 * count, 400), 1200),
        "textual_inversion": 3000,
        "full": max(min(100 * count, 5000), 10 * count // batch),
    }[a.method]
    if a.base.toy:
        wanted = min(wanted, 400)
    wanted = max(-(-wanted // 50) * 50, 100)
    return wanted, f"for {count} pictures; too many show in the previews"


def _course(a: Answers) -> Iterator[Setting]:
    many, why = steps(a)
    yield Setting("train.steps", many, why)
    whole = "half of them of the class" if a.method == "dreambooth" else "over all GPUs"
    yield Setting("train.batch_size", batch_size(a), f"images per step, {whole}")
    rate = {"lora": 1e-4, "dreambooth": 1e-4, "textual_inversion": 1e-4, "full": 1e-5}[a.method]
    if a.base.toy:
        rate = {"full": 2e-4}.get(a.method, 1e-3)
    yield Setting("optim.learning_rate", rate, "usual for this method; half if pictures burn")
    yield Setting("optim.final_learning_rate", rate / 100, "where its cosine ends")
    yield Setting("optim.warmup_steps", min(many // 20, 100))
    if a.method == "dreambooth":
        yield Setting("optim.text_encoder.learning_rate", rate / 5, "it forgets sooner")
    if a.method == "textual_inversion":
        yield Setting("optim.tokens.learning_rate", 5e-3, "of the new word alone")
    yield Setting("diffusion.timesteps", "stratified", "less noise in the loss, at no cost")
    yield Setting("checkpoint.every", max(many // 4, 50))
    # Where only a new word trains, a loss on captions without it would say nothing.
    if a.held_out and a.method != "textual_inversion":
        yield Setting("validation.every", validated_every(a), "its loss on them, ten times in all")
        yield Setting("evaluation.path", a.held_out, "held out: pictures that it never trains on")
    if a.base.toy:
        yield Setting(
            "evaluation.clip", "data/assets/toy-clip", "what scores: of the toy world too"
        )


def validated_every(a: Answers) -> int:
    """Steps between two held-out losses: a tenth of them all."""
    return steps(a)[0] // 10


def _previews(a: Answers) -> Iterator[Setting]:
    yield Setting("preview.every", max(many_previews(a), 50), "pictures to watch it learn")
    if a.base.toy:
        yield Setting("preview.steps", 15)
        yield Setting("preview.guidance", 2)
    prompts = spread(a.pictures.captions, 3)
    if a.method == "textual_inversion":
        prompts = [f"a photo of a <{a.name}> on a beach", f"an oil painting of a <{a.name}>"]
    elif a.method == "dreambooth" and not prompts:
        prompts = [caption(a), f"{caption(a)} on a beach", f"a photo of a {a.noun}"]
    elif not prompts:
        prompts = [f"{caption(a)}, a lighthouse at dusk", f"{caption(a)}, an old fisherman"]
    own = prompts and prompts[0] in a.pictures.captions
    why = "captions of yours" if own else "add what you will want to see"
    yield Setting("preview.prompts", prompts, why)


def many_previews(a: Answers) -> int:
    """Steps between them: four times in a run."""
    return steps(a)[0] // 4


def ladder(a: Answers) -> list[list[Setting]]:
    """Ways to fit into a card's memory, the quickest first, each one smaller than the one before;
    without a card there is one."""
    if a.card is None or a.base.toy:
        why = "a CPU computes in fp32" if a.card is None else "the toy base fits anywhere"
        return [[Setting("train.mixed_precision", "no", why)]]
    bf16 = Setting("train.mixed_precision", "bf16", "half the memory; fp16 overflows in SD 2.1")
    again = Setting(
        "train.gradient_checkpointing", True, "a third slower; without it one is too many"
    )
    few = [Setting("data.cache_batch_size", 1, "less memory while latents are made")]
    if a.method == "dreambooth":
        few.append(
            Setting("dreambooth.class_batch_size", 1, "less memory while the class is drawn")
        )
    eight = Setting("optim.name", "adamw8bit", "moments in 8 bits")
    four = Setting("train.quantize", "nf4", "the frozen UNet in 4 bits, a little slower")

    batch = batch_size(a)
    ways = [[bf16, _at_once(micro)] for micro in _halves(batch) if micro > 1]
    ways += [[bf16, _at_once(micro), *few] for micro in (2, 1)]
    # Of more at once with checkpointing than these, the memory is that of 1 without, or more.
    ways += [[bf16, again, _at_once(micro), *few] for micro in _halves(min(batch // 2, 4))]
    ways.append([*ways[-1], eight])
    return ways if a.method == "full" else [*ways, [*ways[-1], four]]


def _halves(count: int) -> Iterator[int]:
    """count, its half and so on, down to 1."""
    while count:
        yield count
        count //= 2


def _at_once(micro: int) -> Setting:
    return Setting(AT_ONCE, micro, "images at once")

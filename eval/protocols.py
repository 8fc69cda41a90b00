"""What is prompted for when a subject or a style is judged."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, field_validator

from eval.forgetting import GENERAL
from eval.prompts import LIVING, OBJECTS, STYLE, STYLED
from train.config import (
    DreamBoothRun,
    RunConfig,
    Section,
    TextualInversionRun,
    UserError,
    read_yaml,
    validate,
)

STYLE_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_PRIOR = ("a {}", "a photo of a {}")


_ARTICLES = ("a", "an", "the")
_MEDIA = {"photo", "photograph", "picture", "image", "painting", "drawing", "sketch", "portrait"}
_MEDIA |= {"illustration", "rendering", "rendition", "shot", "snapshot", "view"}
_PREPOSITIONS = {"in", "on", "at", "with", "by", "under", "over", "near", "against", "wearing"}
_PREPOSITIONS |= {"sitting", "standing", "lying"}


@dataclass(frozen=True)
class Prompt:
    """One prompt, in the words that each arm and each score needs."""

    text: str
    """With the subject's name: what the fine-tuned model is given, and the base beside it."""
    class_text: str
    """With the noun instead: what the base is given that does not know the name."""
    described: str
    """What the picture should show, without any invented word: what CLIP-T compares with."""


@dataclass(frozen=True)
class Protocol:
    """Everything that is prompted for."""

    name: str
    prompts: tuple[Prompt, ...]
    prior_prompts: tuple[str, ...]
    """Of the class without the subject, for prior preservation; may be empty."""
    general: tuple[str, ...]
    """Of neither, for what was forgotten."""
    scales: tuple[float, ...] = ()
    """Adapter scales of its sweep, where it has one."""


_KNOWN = {"objects": OBJECTS, "living": LIVING, "style": STYLE}


class PromptFile(Section):
    """A protocol of one's own, as YAML."""

    prompts: list[str] = Field(min_length=1)
    """Sentences with {} where the subject is named."""
    prior_prompts: list[str] = []
    """Sentences of the class, {} for its noun; default: `a {}` and `a photo of a {}`."""
    general: list[str] = []
    """Sentences of neither; default: everyday scenes."""

    @field_validator("prompts")
    @classmethod
    def _subject_is_named(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if prompt.count("{}") != 1:
                raise ValueError(
                    f"prompts: {prompt!r} has {prompt.count('{}') or 'no'} {{}}; write {{}} once, "
                    'where the subject is named, as in "a {} in the snow"'
                )
        return prompts

    @field_validator("prompts", "prior_prompts", "general")
    @classmethod
    def _once(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("an empty prompt is in the list: remove it")
            if prompts.count(prompt) > 1:
                raise ValueError(f"{prompt!r} is in the list twice: remove one")
        return prompts


def load(name: str, *, subject: str, noun: str) -> Protocol:
    """The protocol `objects`, `living` or `style`, or that of a YAML file (`PromptFile`).

    subject: as prompts name it, like `zwx dog`; noun: what it is one of, like `dog`. For a style
    the noun may be empty: its class is then the content without any style. Raises UserError for an
    unknown name, a file that cannot be read and what `PromptFile` refuses.
    """
    if name in _KNOWN:
        prompts = tuple(_prompt(text, subject, noun) for text in _KNOWN[name])
        prior = () if name == "style" else tuple(text.format(noun) for text in _PRIOR)
        scales = STYLE_SCALES if name == "style" else ()
        return Protocol(name, prompts, prior, GENERAL, scales)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name, [*_KNOWN, "held_out"], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"evaluation.protocol={name}: give held_out, {', '.join(_KNOWN)} or a .yaml file{meant}"
        )
    content = _read(path)
    return Protocol(
        path.stem,
        tuple(_prompt(text, subject, noun) for text in content.prompts),
        tuple(text.replace("{}", noun) for text in content.prior_prompts or _PRIOR),
        tuple(content.general) or GENERAL,
    )


def _prompt(template: str, subject: str, noun: str) -> Prompt:
    def filled(words: str) -> str:
        return template.replace("{}", words)

    if template.endswith(STYLED):
        content = template.removesuffix(STYLED)
        return Prompt(filled(subject), filled(noun) if noun else content, content)
    return Prompt(filled(subject), filled(noun), filled(noun))


def _read(path: Path) -> PromptFile:
    where = f"evaluation.protocol={path}"
    try:
        values = read_yaml(path)
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{where} has no keys: write `prompts:` and below it `- a {{}} in the snow` and so on"
        )
    return validate(PromptFile, values, where=where)


def names_of(config: RunConfig) -> tuple[str, str]:
    """(subject, noun), like ("zwx dog", "dog"): what evaluation.subject and evaluation.noun say, or
    what the run's class prompt and caption, or its first token, do; of several sources the first.

    A style is one of nothing: with protocol=style the noun may be "". Raises UserError for what
    neither tells.
    """
    said, of_class = _inferred(config)
    settings = config.evaluation
    noun = settings.noun or of_class
    # Without a word of its own it is the class that the caption names.
    subject = settings.subject or (said if _own(said, noun) else None)
    if settings.protocol == "style":
        noun = noun or ""
    if not subject or noun is None:
        missing = [] if subject else ['evaluation.subject="zwx dog"']
        missing += [] if noun is not None else ['evaluation.noun="dog"']
        raise UserError(
            "the run's captions do not tell what its subject is called and what it is one of: "
            f"give {' and '.join(missing)}"
        )
    return subject, noun


def _inferred(config: RunConfig) -> tuple[str | None, str | None]:
    if isinstance(config, TextualInversionRun):
        first = config.textual_inversion.tokens[0]
        return first.token, first.initial
    if isinstance(config, DreamBoothRun):
        source, (class_prompt, _) = config.data.named_sources()[0], config.classes()[0]
        said, of_class = _parted(_words(source.common_caption), _words(class_prompt))
        return " ".join(said) or None, " ".join(of_class) or None
    return None, None


def _words(text: str | None) -> list[str]:
    """The words that follow "a photo of", without articles; wildcards tell nothing."""
    if not text or "{" in text:
        return []
    words = [word for word in text.rstrip(". ").split() if word.lower() not in _ARTICLES]
    for k, (word, after) in enumerate(zip(words, words[1:], strict=False)):
        if word.endswith(",") or word.lower() in _PREPOSITIONS:
            break
        if word.lower() in _MEDIA and after.lower() == "of":
            return words[k + 2 :]
    return words


def _parted(said: list[str], of_class: list[str]) -> tuple[list[str], list[str]]:
    """What names the subject and what its class, of caption and class prompt: without the words up
    to a preposition that both begin with, and without where it is."""
    front = 0
    for k, (one, other) in enumerate(zip(said, of_class, strict=False), 1):
        if one.lower() != other.lower():
            break
        if one.lower() in _PREPOSITIONS | {"of"}:
            front = k
    return _phrase(said[front:]), _phrase(of_class[front:])


def _phrase(words: list[str]) -> list[str]:
    """Up to a comma or a preposition."""
    for k, word in enumerate(words):
        if word.endswith(","):
            return [*words[:k], word.strip(",")]
        if k and word.lower() in _PREPOSITIONS:
            return words[:k]
    return words


def _own(subject: str | None, noun: str | None) -> bool:
    return bool(set((subject or "").lower().split()) - set((noun or "").lower().split()))

"""What to do with a run, as lines to copy: how its result is used in three places, and what comes
next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from train.run_record import Run, read_json
from train.tracking import method_of

_PROMPT = "what it should show"
_LORA = "pytorch_lora_weights.safetensors"
_ADAPTER = (
    "Put {name}.safetensors into models/Lora (AUTOMATIC1111, Forge) and write <lora:{name}:1> into "
    "the prompt, or into models/loras (ComfyUI)."
)
_WORDS = (
    "Put a file of words into embeddings (AUTOMATIC1111, Forge) and write its name into the "
    "prompt, or into models/embeddings (ComfyUI) and write embedding: before its name."
)


@dataclass(frozen=True)
class Way:
    """A command or a few lines of Python, and what is to be known beside it."""

    title: str
    lines: str
    note: str = ""


def method(run: Run) -> str:
    """The entry's name, from what only its configuration has; "" where nothing tells."""
    return method_of(run.settings if isinstance(run.settings, dict) else {}) or ""


def result(run: Run) -> Path:
    """The folder that the run ends in."""
    whole = method(run) == "full" or (method(run) == "dreambooth" and not run.setting("lora"))
    return run.folder / ("full" if whole else "adapter")


def ways(run: Run) -> list[Way]:
    """How the result of a finished run is used."""
    return [*_here(run), *_with_diffusers(run), *_elsewhere(run)] if method(run) else []


def continued(run: Run) -> Way | None:
    """The command that goes on with a run, as its own does."""
    entry = run.manifest.get("entry") or (method(run) and f"train/{method(run)}.py")
    if not isinstance(entry, str) or not entry:
        return None
    return Way(
        "To go on with it",
        f"accelerate launch {quote(entry)} --config {quote(str(run.folder / 'config.yaml'))}",
        "It goes on from the newest checkpoint. The command that it was begun with does the same.",
    )


def measured(run: Run) -> Way:
    """The command that tells how good the result is."""
    held_out = run.setting("evaluation.path")
    other = quote(str(run.setting("validation.path") or "my/held-out"))
    more = "" if held_out else f" evaluation.path={other}"
    note = "" if held_out else "evaluation.path is a folder of pictures that it has not seen."
    command = f"accelerate launch eval/evaluate.py run={_folder(run)}{more}"
    return Way("To see how good it is", command, note)


def _here(run: Run) -> Iterator[Way]:
    base, folder = _base(run), quote(str(result(run)))
    if result(run).name == "full":
        given = f"model={folder}"
    else:
        given = f"model={base}{_of_what_kind(run)} adapters={folder}"
    given += " image=my/room.png" if run.setting("data.depth") else ""
    yield Way(
        "Here",
        f"python scripts/generate.py {given} prompt={quote(_prompt(run))} output=pictures",
    )


def _with_diffusers(run: Run) -> Iterator[Way]:
    folder, pipeline = _text(str(result(run))), "DiffusionPipeline"
    scheduler = "" if _whole(run) else _scheduler(run)
    source = f"from_pretrained({folder})"
    if not _whole(run):
        pipeline, source = _loaded_base(run)
    device = '.to("cuda")' if run.manifest.get("gpus") else ""
    named = sorted({pipeline, *([scheduler] if scheduler else [])})
    lines = [
        f"from diffusers import {', '.join(named)}",
        f"pipeline = {pipeline}.{source}{device}",
    ]
    if scheduler:  # the base's own may predict something else, or leave some noise at the end
        its = f'{scheduler}.from_pretrained({folder}, subfolder="scheduler")'
        lines.append(f"pipeline.scheduler = {its}")
    if _has_lora(run):
        lines.append(f"pipeline.load_lora_weights({folder})")
    if method(run) == "textual_inversion":
        lines += [
            f'pipeline.load_textual_inversion({folder}, weight_name="{file}")'
            for file in _embeddings(run)
        ]
    if not _needs_a_picture(run):
        lines.append(f'pipeline({_text(_prompt(run))}).images[0].save("picture.png")')
    yield Way("With diffusers", "\n".join(lines))


def _loaded_base(run: Run) -> tuple[str, str]:
    """The pipeline of an adapter's base, and the call that loads it."""
    base = str(run.setting("model.path"))
    revision, config = run.setting("model.revision"), run.setting("model.config")
    if base.endswith(".safetensors"):
        described = f", config={_text(str(config))}" if config else ""
        return "StableDiffusionPipeline", f"from_single_file({_text(base)}{described})"
    pinned = f", revision={_text(str(revision))}" if revision else ""
    return "DiffusionPipeline", f"from_pretrained({_text(base)}{pinned})"


def _scheduler(run: Run) -> str:
    """The class of the scheduler beside an adapter, which need not be its base's; "" where there is
    none. A run says how it is used before it has written its result: DDIM reads the settings of
    all that it may write."""
    if not result(run).is_dir():
        return "DDIMScheduler"
    settings = read_json(result(run) / "scheduler" / "scheduler_config.json")
    name = settings.get("_class_name")
    return name if isinstance(name, str) and name.isidentifier() else ""


def _needs_a_picture(run: Run) -> bool:
    """Whether its model makes no pictures from text alone."""
    base = run.manifest.get("base")
    family = str(base.get("family")) if isinstance(base, dict) else ""
    return bool(run.setting("data.depth")) or family.endswith(("depth", "inpainting"))


def _elsewhere(run: Run) -> Iterator[Way]:
    name, program = run.folder.absolute().name, "In AUTOMATIC1111, Forge or ComfyUI"
    export = "python scripts/export.py"
    if _whole(run):
        note = (
            f"Put {name}.safetensors, and {name}.yaml if there is one, into models/Stable-diffusion"
            " (AUTOMATIC1111, Forge) or models/checkpoints (ComfyUI)."
        )
        line = f"{export} run={_folder(run)} format=single_file output={quote(name)}.safetensors"
        yield Way(program, line, note)
        return
    files = _exported(run)
    notes = [_WORDS] if list(files) != [_LORA] else []
    notes += [_ADAPTER.format(name=name)] if _LORA in files else []
    if len(files) == 1:
        lines = [f"{export} run={_folder(run)} format=kohya output={quote(name)}.safetensors"]
    else:
        lines = [
            f"{export} adapter={quote(str(result(run) / file))} format=kohya output="
            f"{quote(stem)}.safetensors"
            for file, stem in files.items()
        ]
    yield Way(program, "\n".join(lines), " ".join(notes))


def _exported(run: Run) -> dict[str, str]:
    """The files of an adapter, and what each is called in other programs: a LoRA as its run, a word
    as itself, but never as the LoRA."""
    name = run.folder.absolute().name
    files = _embeddings(run) if method(run) == "textual_inversion" else []
    stems = {file: Path(file).stem.partition("-")[2] or _word(run) for file in files}
    if not _has_lora(run):
        return stems
    taken = name.lower()  # also where letters are not told apart by their size
    own = {file: f"{stem}-word" if stem.lower() == taken else stem for file, stem in stems.items()}
    return {**own, _LORA: name}


def _word(run: Run) -> str:
    """The letters of the only new word, as a file is called."""
    tokens = run.setting("textual_inversion.tokens")
    first = tokens[0] if isinstance(tokens, list) and tokens else None
    token = first.get("token") if isinstance(first, dict) else first
    return re.sub(r"[^A-Za-z0-9_-]", "", str(token or "")) or "word"


def _whole(run: Run) -> bool:
    return result(run).name == "full"


def _prompt(run: Run) -> str:
    """One that the run has drawn, as far as it has."""
    prompts = run.setting("preview.prompts")
    return str(prompts[0]) if isinstance(prompts, list) and prompts else _PROMPT


def _base(run: Run) -> str:
    return quote(str(run.setting("model.path")))


def _of_what_kind(run: Run) -> str:
    """What has to be said of a base that is a single file."""
    known = run.setting("model.config")
    return f" model.config={quote(str(known))}" if known else ""


def _folder(run: Run) -> str:
    return quote(str(run.folder))


def _text(text: str) -> str:
    """As a text of Python."""
    return json.dumps(text, ensure_ascii=False)


def _has_lora(run: Run) -> bool:
    return not _whole(run) and (method(run) != "textual_inversion" or bool(run.setting("lora")))


def _embeddings(run: Run) -> list[str]:
    """The files of new words, of a run that may not have written them yet."""
    tokens = run.setting("textual_inversion.tokens")
    if not isinstance(tokens, list) or len(tokens) < 2:
        return ["learned_embeds.safetensors"]
    there = sorted(path.name for path in result(run).glob("learned_embeds-*.safetensors"))
    return there or ["learned_embeds-NAME.safetensors"]

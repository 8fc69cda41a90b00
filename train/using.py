"""What to do with a run, as lines to copy: how its result is used in three places, and what comes
next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from train.run_record import Run

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
    for name in ("textual_inversion", "dreambooth", "full", "lora"):
        if run.setting(name) is not None:
            return name
    return ""


def result(run: Run) -> Path:
    """The folder that the run ends in."""
    whole = method(run) == "full" or (method(run) == "dreambooth" and not run.setting("lora"))
    return run.folder / ("full" if whole else "adapter")


def ways(run: Run) -> list[Way]:
    """How the result of a finished run is used."""
    return [*_here(run), *_with_diffusers(run), *_elsewhere(run)] if method(run) else []


def continued(run: Run) -> Way | None:
    """The command that goes on with a run, as its own does."""
    if not method(run):
        return None
    command = f"accelerate launch train/{method(run)}.py"
    return Way(
        "To go on with it",
        f"{command} --config {quote(str(run.folder / 'config.yaml'))}",
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
    prompts = run.setting("preview.prompts")
    prompt = str(prompts[0]) if isinstance(prompts, list) and prompts else _PROMPT
    yield Way(
        "Here",
        f"python scripts/generate.py {given} prompt={quote(prompt)} output=pictures",
    )


def _with_diffusers(run: Run) -> Iterator[Way]:
    base, folder = str(run.setting("model.path")), result(run)
    single = base.endswith(".safetensors") and not _whole(run)
    load = "from_single_file" if single else "from_pretrained"
    known = run.setting("model.config")
    described = f", config={_text(str(known))}" if single and known else ""
    pipeline = "StableDiffusionPipeline" if single else "DiffusionPipeline"
    source = _text(str(folder) if _whole(run) else base)
    lines = [
        f"from diffusers import {pipeline}",
        "",
        f"pipeline = {pipeline}.{load}({source}{described})",
    ]
    if _has_lora(run):
        lines.append(f"pipeline.load_lora_weights({_text(str(folder))})")
    if method(run) == "textual_inversion":
        lines += [
            f'pipeline.load_textual_inversion({_text(str(folder))}, weight_name="{file}")'
            for file in _embeddings(run)
        ]
    yield Way("With diffusers", "\n".join(lines))


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
    files = _embeddings(run) if method(run) == "textual_inversion" else []
    if _has_lora(run):
        files.append(_LORA)
    notes = [_WORDS.format(name=name)] if files != [_LORA] else []
    notes += [_ADAPTER.format(name=name)] if _LORA in files else []
    if len(files) == 1:
        lines = [f"{export} run={_folder(run)} format=kohya output={quote(name)}.safetensors"]
    else:
        lines = [
            f"{export} adapter={quote(str(result(run) / file))} format=kohya output="
            f"{quote(name if file == _LORA else Path(file).stem.partition('-')[2])}.safetensors"
            for file in files
        ]
    yield Way(program, "\n".join(lines), " ".join(notes))


def _whole(run: Run) -> bool:
    return result(run).name == "full"


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
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _has_lora(run: Run) -> bool:
    return not _whole(run) and (method(run) != "textual_inversion" or bool(run.setting("lora")))


def _embeddings(run: Run) -> list[str]:
    """The files of new words, of a run that may not have written them yet."""
    tokens = run.setting("textual_inversion.tokens")
    if not isinstance(tokens, list) or len(tokens) < 2:
        return ["learned_embeds.safetensors"]
    there = sorted(path.name for path in result(run).glob("learned_embeds-*.safetensors"))
    return there or ["learned_embeds-NAME.safetensors"]

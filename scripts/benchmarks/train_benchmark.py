"""How fast the training loop is: against the bare computation, against a published recipe, against
another setting, and against what the device's matrix products reach."""

from __future__ import annotations

import itertools
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scripts.benchmarks import measuring, train_models
from scripts.benchmarks.measuring import spread
from scripts.benchmarks.train_python import one_parameter
from scripts.benchmarks.train_setting import TrainSetting
from scripts.benchmarks.train_watch import WARM, Timed, Turns
from train import adapters, fused_lora
from train.config import ROOT, FullRun, LoraRun, RunConfig, TextualInversionRun, UserError, load

if TYPE_CHECKING:
    from train.method import Method

Way = Literal["bare", "reference"]
_RUNS: dict[str, type[RunConfig]] = {
    "lora": LoraRun,
    "textual_inversion": TextualInversionRun,
    "full": FullRun,
}
_CUDA_SIDE, _CPU_SIDE = 8192, 2048  # of the matrices whose product is the peak


def measure(
    setting: TrainSetting,
    parts: Sequence[str],
    *,
    against: Mapping[str, Any] | None = None,
    steps: int,
    rounds: int,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """The figures of each part. against: what differs in another setting, measured in turns."""
    if "reference" in parts:
        _check_reference(setting)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
        where = Path(folder)
        results: dict[str, Any] = {
            "setting": setting.model_dump(),
            "steps": steps,
            "rounds": rounds,
        }
        if {"speed", "reference"} & set(parts):
            other = other_setting(setting, against) if against else None
            results |= speed(setting, other, where, steps, rounds, "reference" in parts)
        if "memory" in parts:
            alone = {"setting": setting.model_dump(), "folder": folder}
            results["memory"] = measuring.fresh(f"{__name__}:memory", **alone)
        if "python" in parts:
            results["python"] = one_parameter(where, rounds)
        return results


def _check_reference(setting: TrainSetting) -> None:
    if setting.method == "textual_inversion" or setting.compile != "none":
        raise UserError(
            "parts: reference is the published recipe of adapters and full training, uncompiled; "
            "leave it out with method=textual_inversion or compile=, like parts='[speed, memory]'"
        )
    if setting.precision == "fp16":
        raise UserError("parts: reference has no gradient scaler; use precision=bf16 or no")


def other_setting(setting: TrainSetting, against: Mapping[str, Any]) -> TrainSetting:
    """Raises UserError for what is no setting, or cannot be changed within one process."""
    unknown = against.keys() - setting.model_dump().keys()
    if unknown:
        known = ", ".join(setting.model_dump())
        raise UserError(f"against: {sorted(unknown)[0]!r} is no setting; choose among {known}")
    if "precision" in against or "tf32" in against:
        raise UserError("against: precision and tf32 are a whole process's; run it once for each")
    return TrainSetting(**setting.model_dump() | dict(against))


def speed(
    setting: TrainSetting,
    other: TrainSetting | None,
    folder: Path,
    steps: int,
    rounds: int,
    reference: bool,
) -> dict[str, Any]:
    """Seconds per step of the loop, undisturbed; and in turns with it, step by step, of its
    computation alone and of a published recipe, or in rounds of `steps` of another setting."""
    trainer = Trainer(setting, folder)
    beside = Trainer(other, folder, trainer.accelerator) if other else None
    loop, against = [], []
    for _ in range(rounds + 1):
        loop.append(trainer.fit(steps))
        against += [beside.fit(steps)] if beside else []
    loop, against = loop[1:], against[1:]
    # Apart, for what follows a longer step finds less of its own in the caches.
    ways: list[Way] = ["bare", "reference"] if reference else ["bare"]
    seconds: dict[str, list[float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for way in ways:
        turns = trainer.turns(steps * rounds, way)
        seconds |= {name: [turn[name] for turn in turns] for name in turns[0] if name != "loop"}
        ratios[way] = spread([turn[way] / turn["loop"] for turn in turns])
    if other:
        seconds["against"] = [one["step"] for one in against]
        pairs = zip(loop, against, strict=True)
        ratios["against"] = spread([other["step"] / one["step"] for one, other in pairs])
    step = spread([one["step"] for one in loop])
    results: dict[str, Any] = {
        "step": step,
        "data_wait": spread([one["waited"] / one["step"] for one in loop]),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": ratios,
        **({"against": other.model_dump()} if other else {}),
    }
    if reference:
        results["encode_to_forward"] = trainer.encode_to_forward()
    return results | _rates(trainer, step["median"])


def _rates(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """What a step of so many seconds means."""
    setting = trainer.setting
    peak = matmul_peak(trainer.accelerator, setting.precision)
    work = trainer.flops() * setting.batch
    return {
        "images_per_second": round(setting.batch / seconds, 3),
        "tflop_per_second": round(work / seconds / 1e12, 4),
        "matmul_tflop_per_second": round(peak / 1e12, 4),
        "share_of_matmul": round(work / seconds / peak, 4),
        "device_peak_gib": trainer.device_peak_gib(),
    }


class Trainer:
    """A setting that is ready to train."""

    def __init__(self, setting: TrainSetting, folder: Path, accelerator: Any = None) -> None:
        from train import feeding, models, new_tokens, pictures
        from train.launch import open_accelerator

        self.setting, self.folder = setting, folder
        self.config = configuration(setting, folder)
        self.accelerator = accelerator or open_accelerator(setting.precision, tf32=setting.tf32)
        self.pipeline = models.load_base(self.config, self.accelerator)
        tokens = []
        if isinstance(self.config, TextualInversionRun):
            wanted = self.config.textual_inversion.tokens
            tokens = new_tokens.add(self.pipeline.tokenizer, wanted)
        self.batches = feeding.batches(
            pictures.find(self.config.data),
            self.pipeline,
            self.config,
            self.accelerator,
            cache_captions=setting.method != "textual_inversion",
        )
        if setting.method != "full":
            models.store_in(self.pipeline, self.config.train)
        self.pipeline.unet.to(self.accelerator.device)
        self.method = self._method(tokens)
        self._outputs = (folder / f"run-{id(self)}-{number}" for number in itertools.count())

    def _method(self, tokens: Sequence[Any]) -> Method:
        from train.diffusion import Objective

        config, pipeline = self.config, self.pipeline
        objective = Objective.of(pipeline.scheduler, config.diffusion)
        # The command's own method: nothing may import a command.
        of = runpy.run_path(str(ROOT / f"train/{self.setting.method}.py"))
        if isinstance(config, LoraRun):
            return of["Lora"](pipeline, objective, config.lora, seed=0)
        if isinstance(config, TextualInversionRun):
            return of["TextualInversion"](pipeline, objective, tokens, config.lora, seed=0)
        assert isinstance(config, FullRun)
        return of["Full"](pipeline, objective, config.full)

    def fit(self, steps: int) -> dict[str, float]:
        """Seconds of a step of the project's loop, and of those waited for data."""
        timed = Timed(self._of(WARM + steps + 1), self._wait, steps)
        self._fit(timed)
        return {"step": timed.seconds / steps, "waited": timed.waited / steps}

    def turns(self, steps: int, way: Way) -> list[dict[str, float]]:
        """Seconds of a step of the loop and, after each, of its computation alone on a batch that
        is there already ("forward", "backward", "optimizer", "bare"), or of the published recipe
        ("reference")."""
        between = self._bare() if way == "bare" else self._plain()
        turns = Turns(self._of(WARM + steps + 1), self._now, between)
        self._fit(turns)
        return turns.taken[WARM : WARM + steps]

    def _of(self, steps: int) -> Any:
        return replace(self.batches, steps=steps)

    def _fit(self, batches: Any) -> None:
        from train.loop import fit

        steps = batches.steps
        config = self.config.model_copy(
            update={
                "output": next(self._outputs),
                "train": self.config.train.model_copy(update={"steps": steps}),
                "checkpoint": self.config.checkpoint.model_copy(update={"every": steps}),
            }
        )
        fit(self.method, batches, config, self.accelerator)
        # Accelerate keeps what it prepared. The model stays so, and is not prepared twice.
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()

    def _bare(self) -> Callable[[], dict[str, float]]:
        from train import optim

        groups = self.method.parameter_groups(self.config.optim)
        return partial(self._bare_step, optim.build(groups, self.config.optim))

    def _plain(self) -> Callable[[], dict[str, float]]:
        recipe, unet = self._plain_recipe(), self.pipeline.unet

        def step() -> dict[str, float]:
            fused_lora.undo(unet)  # adapters as everyone has them
            start = self._now()
            next(recipe)
            taken = {"reference": self._now() - start}
            fused_lora.fuse(unet, adapters.NAME)
            return taken

        return step

    def _bare_step(self, optimizer: Any) -> dict[str, float]:
        taken = {"forward": 0.0, "backward": 0.0}
        for batch in self._one_step():
            start = self._now()
            with self.accelerator.autocast():
                loss = (self.method.model(batch) * batch["weight"]).sum()
            middle = self._now()
            loss.backward()
            taken["forward"] += middle - start
            taken["backward"] += self._now() - middle
        start = self._now()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken["optimizer"] = self._now() - start
        return taken | {"bare": sum(taken.values())}

    def _one_step(self) -> list[dict[str, Any]]:
        if not hasattr(self, "_batch"):
            (given,) = replace(self.batches, steps=1, workers=0)(0)
            device = self.accelerator.device
            self._batch = [
                {k: v.to(device) if hasattr(v, "to") else v for k, v in one.items()}
                for one in given
            ]
        return self._batch

    def _plain_recipe(self) -> Iterator[float]:
        """Takes a step each time it is asked, on the same model."""
        from scripts.benchmarks import plain_recipe

        self.pipeline.to(self.accelerator.device)  # also the encoders, which had left it
        return plain_recipe.losses(
            self.pipeline,
            Path(self.config.data.path or ""),
            self.accelerator,
            [p for p in self.method.model.parameters() if p.requires_grad],
            batch=self.setting.batch,
            side=self.setting.resolution,
        )

    def encode_to_forward(self, rounds: int = 9) -> dict[str, float]:
        """How many forward passes of the frozen UNet a VAE's encode takes, in turns."""
        import torch

        (batch, *_), side = self._one_step(), self.setting.resolution
        vae, unet = self.pipeline.vae, self.pipeline.unet
        pixels = torch.zeros(self.setting.micro_batch, 3, side, side, device=vae.device)
        latents, text = batch["latents"].to(vae.dtype), batch["prompt_embeds"].to(vae.dtype)

        def forward() -> None:
            unet(latents, batch["timestep"], encoder_hidden_states=text)
            self._wait()

        def encode() -> None:
            vae.encode(pixels.to(vae.dtype))
            self._wait()

        with torch.no_grad(), adapters.switched_off(self.pipeline):
            return measuring.in_turns(forward, encode, rounds)["ratio"]

    def flops(self) -> float:
        """Of a picture, without what checkpointing does again."""
        from train import flops
        from train.architecture import Architecture

        side = self.setting.resolution
        work = flops.count(Architecture.of(self.config.model), (side, side))
        return flops.per_picture(self.config, work).model

    def device_peak_gib(self) -> float | None:
        """Of a GPU's allocator, since the process began."""
        import torch

        if self.accelerator.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def configuration(setting: TrainSetting, folder: Path) -> RunConfig:
    """The run of a setting, on pictures and a base that are made where they are not there."""
    base = train_models.base(setting.model, folder)
    side, count = setting.resolution, max(4 * setting.batch, 16)
    shown = train_models.pictures(folder / f"pictures-{side}", count, side)
    overrides = [
        f"output={folder / 'run'}",
        f"model.path={base}",
        f"data.path={shown}",
        f"data.cache={folder / 'cache'}",
        f"data.resolution={setting.resolution}",
        "data.bucket_step=8",
        f"data.workers={setting.workers}",
        f"train.batch_size={setting.batch}",
        f"train.micro_batch_size={setting.micro_batch}",
        f"train.mixed_precision={setting.precision}",
        f"train.compile={setting.compile}",
        f"train.gradient_checkpointing={str(setting.checkpointing).lower()}",
        f"train.quantize={setting.quantize}",
        f"train.channels_last={str(setting.channels_last).lower()}",
        f"train.tf32={str(setting.tf32).lower()}",
        f"optim.name={setting.optimizer}",
        "optim.warmup_steps=0",
        "preview.every=0",
        "validation.every=0",
        *_of_method(setting),
    ]
    return load(_RUNS[setting.method], overrides)


def _of_method(setting: TrainSetting) -> list[str]:
    if setting.method == "lora":
        return [f"lora.rank={setting.rank}", f"lora.alpha={setting.rank}"]
    if setting.method == "textual_inversion":
        return ["textual_inversion.tokens=[{token: <it>, initial: a}]"]
    return []


def matmul_peak(accelerator: Any, precision: str) -> float:
    """FLOP/s of the best of 7 products of large square matrices, in the precision of training."""
    import torch

    from train.models import dtype_of

    cuda = accelerator.device.type == "cuda"
    side = _CUDA_SIDE if cuda else _CPU_SIDE
    one = torch.randn(side, side, device=accelerator.device, dtype=dtype_of(precision))

    def product() -> None:
        for _ in range(20 if cuda else 1):
            torch.mm(one, one)
        if cuda:
            torch.cuda.synchronize()

    product()
    best = min(measuring.seconds(product) for _ in range(7))
    return 2 * side**3 * (20 if cuda else 1) / best


def memory(setting: dict[str, Any], folder: str) -> dict[str, Any]:
    """A few steps in a process of its own, whose peak is noted."""
    trainer = Trainer(TrainSetting(**setting), Path(folder))
    trainer.fit(2)
    return {"device_peak_gib": trainer.device_peak_gib()}

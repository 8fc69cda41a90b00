"""The peak memory of a run, predicted by rehearsing it: the run's own modules, adapters, optimizer
and checkpointing work on fake tensors, and what they would hold is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from train.config import DreamBoothRun, RunConfig, TextualInversionRun
from train.flops import PIXELS, WINDOW, trains_text, trains_weights, windows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from train.architecture import Architecture
    from train.averaging import Averages
    from train.live_memory import Live

Device = Literal["cpu", "cuda"]
Size = tuple[int, int]

LIBRARIES = 605 * 2**20
"""Resident memory of a process that has imported torch, diffusers, transformers and PEFT, and has
computed a little: torch 2.13 for CPUs, no CUDA."""
CONTEXT = 600 * 2**20
"""Assumed for what a GPU holds outside torch's allocator: CUDA's context and loaded kernels."""
HOLES = 0.115
"""What malloc on a CPU keeps unused between tensors, as a share of all that a micro-batch makes in
blocks below 32 MiB: small things that stay lie in between. Measured with the toy LoRA at batch 32;
with every block mapped by itself (MALLOC_MMAP_THRESHOLD_=65536) there is none."""
_CLOSED_FORM = {"adamw8bit": 2, "prodigy": 16}  # bytes of state for a number that trains
_EIGHT_BIT_LEAST = 4096  # numbers; of smaller tensors bitsandbytes keeps the moments in fp32
_STATES_BLOCK = 256  # numbers that share a scale, in bitsandbytes' optimizers


@dataclass(frozen=True)
class Phase:
    """One part of a run, and the most memory that it has in use."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a run takes, per process."""

    phases: list[Phase]
    """In their order."""
    trained: int
    """How many numbers train."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)


def predict(
    config: RunConfig,
    base: Architecture,
    *,
    size: Size,
    device: Device,
    processes: int = 1,
) -> Footprint:
    """The phases of a run with the peak memory of each.

    size: (width, height) of the largest bucket in pixels. device: on "cuda" what torch's allocator
    hands out; on "cpu" resident memory.
    """
    from train.live_memory import counting

    with counting(device) as live:
        rehearsal = Rehearsal(config, base, size, device, processes, live)
        fixed = LIBRARIES if device == "cpu" else CONTEXT
        phases = [Phase(phase.name, phase.bytes + fixed) for phase in rehearsal.phases()]
        return Footprint(phases, sum(p.numel() for p in rehearsal.trained))


class Rehearsal:
    """A run among fake tensors, phase after phase."""

    def __init__(
        self,
        config: RunConfig,
        base: Architecture,
        size: Size,
        device: Device,
        processes: int,
        live: Live,
    ) -> None:
        from train.averaging import Latest

        self.config, self.base, self.size, self.device = config, base, size, device
        self.processes, self.live = processes, live
        self.away = 0
        """Bytes of what is off the GPU for now."""
        self.averages: Averages = Latest()
        self.holes = 0
        """Bytes that malloc keeps between blocks: once made they stay."""
        self.mapped = 0
        """Bytes of weights that lie in their files, which are mapped."""
        self.copies = 0
        """Bytes of what is copied: the checkpoint, while it is written from the CPU's memory, and a
        frozen base beside one that trains."""

    def phases(self) -> Iterator[Phase]:
        yield self._loading()
        if isinstance(self.config, DreamBoothRun) and self.config.dreambooth.prior == "images":
            yield self._drawing("class pictures", self.config.dreambooth.class_batch_size)
        yield self._caching()
        yield self._storing()
        self._attach()
        yield self._training()
        yield self._checkpoint()
        if self.config.preview.every and self.config.preview.prompts:
            yield self._drawing("preview", 1, self.config.preview.resolution)
        if self.config.evaluation.every:
            yield self._drawing("evaluation", self.config.evaluation.batch_size)

    def _phase(self, name: str) -> Phase:
        held = self.live.peak - self.away + self.mapped + self.copies
        return Phase(name, held + (self.holes if self.device == "cpu" else 0))

    @contextmanager
    def _churning(self, staying: int = 0) -> Iterator[None]:
        """staying: bytes that are made within it and stay, as gradients do."""
        before = self.live.churned
        yield
        passing = self.live.churned - before - staying
        self.holes = max(self.holes, round(HOLES * max(passing, 0)))

    # Before training

    def _loading(self) -> Phase:
        """Part after part, in fp32. Files of another precision are mapped while they are read, and
        count as resident; files in fp32 are the weights themselves."""
        from train import recomputing

        most, parts = 0, {}
        for name in self.base.parts:
            parts[name], files = self._loaded(name)
            most = max(most, self.live.bytes + self.mapped + files)
        self.pipeline = SimpleNamespace(**parts, config={})
        recomputing.enable(self.pipeline, self.config.train.gradient_checkpointing)
        if self.device == "cuda":
            self.away = _bytes(self.pipeline.unet)
        return Phase("loading", most - self.away)

    def _loaded(self, name: str) -> tuple[nn.Module, int]:
        """A part, and the bytes of its files that are mapped while it is loaded."""
        self.live.away = True
        part = self.base.build(name)
        self.live.away = False
        width = self.base.widths[name]
        if self.device == "cuda" or width != 4:
            part._apply(lambda tensor: tensor.detach().clone())
            return part, 0 if self.device == "cuda" else _bytes(part) * width // 4
        self.mapped += _bytes(part)
        return part, 0

    def _caching(self) -> Phase:
        import torch

        from train import models

        self.live.mark()
        width, height = self.size
        data = self.config.data
        with torch.no_grad(), self._churning():
            encode = models.latent_encoder(self.pipeline.vae, data.cache_precision)
            encode(torch.empty(data.cache_batch_size, 3, height, width))
            if trains_text(self.config) is None:
                text = self.pipeline.text_encoder
                models.text_encoder_output(text, torch.zeros(8, WINDOW, dtype=torch.long))
        return self._phase("caching")

    def _storing(self) -> Phase:
        """Frozen weights in the precision of the forward pass. On a GPU the UNet comes, and goes
        what is needed no more."""
        import torch

        from train import models

        self.live.mark()
        phase = self._phase("storing")
        if not trains_weights(self.config):
            models.store_in(self.pipeline, self.config.train, torch.device("cpu"))
            phase = self._phase("storing")
            if self.config.train.mixed_precision != "no":
                self.mapped = 0
        if self.device == "cuda":
            gone = [self.pipeline.vae]
            gone += [self.pipeline.text_encoder] if trains_text(self.config) is None else []
            self.away = sum(map(_bytes, gone))
            self.live.mark()  # conversions are the CPU's
            phase = self._phase("storing")
        return phase

    # Training

    def _attach(self) -> None:
        from train import adapters, optim
        from train.averaging import averages_of
        from train.denoiser import Denoiser

        config, pipeline = self.config, self.pipeline
        named: dict[str, Any] = {}
        if lora := getattr(config, "lora", None):
            adapters.attach(pipeline, lora.model_copy(update={"start_from": None}), seed=0)
        if isinstance(config, TextualInversionRun):
            named["tokens"] = [("rows", self._new_words())]
        if trains_weights(config):
            pipeline.unet.requires_grad_(True)
            pipeline.text_encoder.requires_grad_(trains_text(config) == "weights")
        if isinstance(config, DreamBoothRun) and trains_weights(config):
            self.copies += self._prior()
        objective = _objective(self.base)
        self.model = Denoiser(pipeline.unet, objective, pipeline.text_encoder)
        parts = optim.parts_of if trains_weights(config) else adapters.named_parameters
        groups = optim.groups(named | parts(pipeline), config.optim)
        self.trained = [p for group in groups for p in group["params"]]
        if config.optim.name in _CLOSED_FORM:
            self.optimizer: Any = _StandIn(self.trained, config.optim.name)
        else:
            self.optimizer = optim.build(groups, config.optim)
        self.averages = averages_of(self.model, self.optimizer, config.train.ema_decay)

    def _prior(self) -> int:
        """Bytes of the frozen copy that predicts the class, in the forward pass's precision."""
        from train.models import dtype_of

        if self.config.dreambooth.prior != "prediction":  # type: ignore[attr-defined]
            return 0
        copied = [self.pipeline.unet]
        copied += [self.pipeline.text_encoder] if trains_text(self.config) == "weights" else []
        return sum(map(_bytes, copied)) * dtype_of(self.config.train.mixed_precision).itemsize // 4

    def _new_words(self) -> nn.Parameter:
        from train import embeddings
        from train.new_tokens import NewToken

        wanted = self.config.textual_inversion.tokens  # type: ignore[attr-defined]
        count = sum(token.vectors or 1 for token in wanted)
        rows = embeddings.attach(
            self.pipeline.text_encoder, [NewToken("<new>", list(range(count)), [0] * count)]
        )
        return rows.rows

    def _training(self) -> Phase:
        """Two steps: the second has the optimizer's state from the start."""
        self._step(0)
        self.live.mark()
        self._step(1)
        return self._phase("training")

    def _step(self, step: int) -> None:
        import torch

        config = self.config.train
        share = -(-config.batch_size // self.processes)
        micro = min(config.micro_batch_size or share, share)
        buckets = self._buckets()
        for _ in range(min(2, -(-share // micro))):
            with self._churning(staying=sum(map(_size, self.trained))):
                self._micro_batch(micro)
        torch.nn.utils.clip_grad_norm_(self.trained, config.clip_norm)
        self.optimizer.step()
        self.averages.update(step, torch.ones(()))
        self.optimizer.zero_grad(set_to_none=True)
        del buckets

    def _micro_batch(self, count: int) -> None:
        batch = self._batch(count)
        with self._autocast():
            losses = self.model(batch)
        (losses * batch["weight"]).sum().backward()

    def _buckets(self) -> list[Tensor]:
        """Where gradients meet other processes', beside the gradients themselves (DDP)."""
        import torch

        return [torch.empty_like(p) for p in self.trained if self.processes > 1]

    def _batch(self, count: int) -> dict[str, Tensor]:
        import torch

        width, height = self.size
        shape = count, self.base.latent_channels, height // PIXELS, width // PIXELS
        batch = {
            "latents": torch.empty(shape),
            "noise": torch.empty(shape),
            "timestep": torch.zeros(count, dtype=torch.long),
            "weight": torch.empty(count),
        }
        if beside := self.base.channels - self.base.latent_channels:
            batch["depth"] = torch.empty(count, beside, *shape[2:])
        tokens = WINDOW * windows(self.config)
        if trains_text(self.config) is None:
            batch["prompt_embeds"] = torch.empty(count, tokens, self.base.text_width)
        else:
            batch["input_ids"] = torch.zeros(count, tokens, dtype=torch.long)
        return batch

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        import torch

        from train.models import dtype_of

        precision = self.config.train.mixed_precision
        with torch.autocast("cpu", dtype_of(precision), enabled=precision != "no"):
            yield

    # Between steps

    def _checkpoint(self) -> Phase:
        """An asynchronous one is copied first, to the CPU, where the copy's memory is kept."""
        self.live.mark()
        if self.device == "cpu" and self.config.checkpoint.asynchronous:
            states = [v for state in self.optimizer.state.values() for v in state.values()]
            averages = list(self.averages.state().values())
            self.copies += sum(map(_size, [*self.trained, *states, *averages]))
        return self._phase("checkpoint")

    def _drawing(self, name: str, count: int, side: int | None = None) -> Phase:
        """`count` pictures at once; guidance doubles what the UNet sees."""
        import torch

        self.live.mark()
        away, self.away = self.away, 0  # all that is away comes back
        width, height = (side, side) if side else self.size
        latent = height // PIXELS, width // PIXELS
        pipeline, base = self.pipeline, self.base
        with self.averages.applied(), torch.no_grad(), self._autocast(), self._churning():
            ids = torch.zeros(2 * count, WINDOW, dtype=torch.long)
            text = pipeline.text_encoder(ids)[0]
            dtype = text.dtype
            latents = torch.empty(2 * count, base.channels, *latent, dtype=dtype)
            pipeline.unet(latents, torch.tensor(1), encoder_hidden_states=text)
            dtype = next(pipeline.vae.parameters()).dtype
            pipeline.vae.decode(torch.empty(count, base.latent_channels, *latent, dtype=dtype))
        phase, self.away = self._phase(name), away
        return phase


class _StandIn:
    """In place of an optimizer that cannot work on fake tensors: it has as large a state."""

    def __init__(self, trained: list[Any], name: str) -> None:
        self.trained, self.name = trained, name
        self.state: dict[Any, dict[str, Tensor]] = {}

    def step(self) -> None:
        import torch

        for p in self.trained:
            size = _CLOSED_FORM[self.name] * p.numel()
            if self.name == "adamw8bit":
                scales = 8 * -(-p.numel() // _STATES_BLOCK)
                size = size + scales if p.numel() >= _EIGHT_BIT_LEAST else 8 * p.numel()
            self.state.setdefault(p, {"all": torch.empty(size, dtype=torch.uint8)})

    def zero_grad(self, *, set_to_none: bool) -> None:
        assert set_to_none
        for p in self.trained:
            p.grad = None


def _objective(base: Architecture) -> Any:
    import torch

    from train.diffusion import Objective

    return Objective(torch.empty(1000), base.prediction_type)  # type: ignore[arg-type]


def _bytes(module: nn.Module) -> int:
    return sum(_size(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _size(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if hasattr(tensor, "numel") else 0

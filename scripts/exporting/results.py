"""What is exported: the result of a run, or an adapter that lies somewhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from train import adapter_file
from train.config import ModelConfig, UserError, read_yaml

FULL = "full"


@dataclass(frozen=True)
class Result:
    """A LoRA, embeddings, both, or a whole fine-tuned model."""

    name: str
    folder: Path
    """Of the model, or where the adapter lies."""
    lora: Path | None = None
    embeddings: tuple[Path, ...] = ()
    run: Path | None = None
    base: ModelConfig | None = None
    """What the run started from."""

    @property
    def is_model(self) -> bool:
        return self.lora is None and not self.embeddings

    @property
    def folders(self) -> list[Path]:
        """What an export may not be written into: the adapter or model, and its base."""
        base = Path(self.base.path) if self.base else None
        adapter = [self.folder] if self.run or self.is_model else []
        return [*adapter, *([base] if base and base.is_dir() else [])]

    @property
    def kind(self) -> str:
        if self.is_model:
            return "model"
        return "lora" if self.lora else "textual-inversion"

    def named(self, name: str | None) -> Result:
        return replace(self, name=name) if name else self

    def on(self, base: ModelConfig | None) -> Result:
        return replace(self, base=base) if base else self

    @property
    def adapters(self) -> list[str]:
        """As other commands take them in `adapters`."""
        return [str(file) for file in (*self.embeddings, *([self.lora] if self.lora else []))]


def of_run(run: Path) -> Result:
    """The finished result of a run directory. Raises UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"run={run}: no such folder; give the output= of a training run")
    base, name = _base(run), run.resolve().name
    if (run / FULL / "model_index.json").is_file():
        return Result(name, run / FULL, run=run, base=base)
    if not (run / "adapter").is_dir():
        raise UserError(
            f"run={run} holds no adapter/ and no full/: it is not finished, or is no run. The same "
            "training command goes on with it"
        )
    return _adapter(run / "adapter", name, run, base)


def of_adapter(path: str) -> Result:
    """An adapter's folder or file. Raises UserError."""
    name = Path(path).stem if Path(path).is_file() else Path(path).resolve().name
    return _adapter(Path(path), name, None, None)


def _adapter(path: Path, name: str, run: Path | None, base: ModelConfig | None) -> Result:
    found = adapter_file.find(str(path))
    if found.scale != 1:
        raise UserError(f"adapter={path}: give its scale as scale={found.scale:g}")
    folder = found.files[0].parent
    return Result(name, folder, found.file, found.embeddings, run, base)


def _base(run: Path) -> ModelConfig:
    file = run / "config.yaml"
    try:
        content = read_yaml(file)
        return ModelConfig(**content["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"run={run}: {file.name} does not tell its base ({error}); is it a run directory?"
        ) from None

"""What a run has saved, for tests of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import Checkpoints
from train.checkpoint_files import verify


def steps(checkpoints: Path) -> list[int]:
    """The steps of a folder of checkpoints, all of which are complete."""
    found = Checkpoints(checkpoints, keep=2, writes=False)
    for step in found.steps():
        verify(found.path(step))
    return found.steps()


def left(checkpoints: Path) -> str:
    """The other names in it, up to their step."""
    found = sorted(path.name for path in checkpoints.iterdir())
    return " ".join(name.partition("-")[0] for name in found if not name.startswith("step-"))


def content(run: Path) -> dict[str, bytes]:
    """The bytes of a run's tensors."""
    files = [*(run / "checkpoints").rglob("*.safetensors"), *(run / "adapter").rglob("*.*")]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def flip(file: Path) -> None:
    """Another last bit."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

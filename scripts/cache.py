"""Checks a cache of latents and caption embeddings, or clears it of what no run uses any more.

    python scripts/cache.py verify cache=runs/cache
    python scripts/cache.py verify cache=runs/cache repair=true
    python scripts/cache.py prune cache=runs/cache unused_days=30

`verify` reads every entry and names the damaged ones (exit code 1); with repair=true it takes them
out, and the next run encodes them anew. `prune` removes what no run has used for so many days, and
merges small files; it can be stopped at any time, and runs that read the cache meanwhile go on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from data.files import progress
from train import screens
from train.config import RunFailed, Section, UserError, command, load

if TYPE_CHECKING:
    from data.store import TensorStore

NAMED_AT_MOST = 20


class VerifyConfig(Section):
    """Reads every entry of a cache and names the damaged ones (scripts/cache.py verify)."""

    cache: Path = Path("runs/cache")
    """The cache, as data.cache."""
    repair: bool = False
    """Take what is damaged out of it; the next run encodes it anew."""


class PruneConfig(Section):
    """Removes from a cache what no run has used lately (scripts/cache.py prune)."""

    cache: Path = Path("runs/cache")
    """The cache, as data.cache."""
    unused_days: float = Field(30.0, ge=0)
    """Days since a run last used a file of the cache; with 0 all of it goes."""


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    if task in {"--help", "-h"}:
        print((__doc__ or "").strip())
    elif task == "verify":
        verify(load(VerifyConfig, rest))
    elif task == "prune":
        prune(load(PruneConfig, rest))
    else:
        raise UserError(f"say what to do, verify or prune, and not {task!r}: verify cache=FOLDER")


def verify(config: VerifyConfig) -> None:
    store = open_store(config.cache)
    damage = store.verify(repair=config.repair, progress=progress("verifying"))
    for found in damage[:NAMED_AT_MOST]:
        print(f"damaged  {found}")
    if len(damage) > NAMED_AT_MOST:
        print(f"         and {len(damage) - NAMED_AT_MOST} more")
    if not damage:
        count = sum(1 for _ in store.shards.glob("*.safetensors"))
        print(f"{config.cache} is sound: every entry of {count} files")
    elif config.repair:
        print(f"removed  all that was damaged ({len(damage)}); the next run encodes it anew")
    else:
        raise RunFailed(
            f"{config.cache} is damaged ({len(damage)} found): repair=true takes that out, and the "
            "next run encodes it anew"
        )
    screens.done(config.cache, removed=len(damage))


def prune(config: PruneConfig) -> None:
    store = open_store(config.cache)
    done = store.prune(unused_days=config.unused_days, progress=progress("pruning"))
    print(f"kept {done.kept} entries, removed {done.removed}, freed {done.freed / 2**20:.1f} MiB")
    screens.done(config.cache, kept=done.kept, removed=done.removed, freed=done.freed)


def open_store(folder: Path) -> TensorStore:
    from data.store import TensorStore

    store = TensorStore(folder)
    if not store.shards.is_dir():
        raise UserError(f"cache={folder} is no cache; give the folder that runs have as data.cache")
    return store


if __name__ == "__main__":
    command(main)

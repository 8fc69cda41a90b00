"""Who fills the cache with whom: all processes where they share one folder, those of each machine
among themselves where `data.cache` is a disk of its own there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from train.config import RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator


class Share(NamedTuple):
    """The number of a process among those that see its cache, and how many these are."""

    rank: int
    world: int


def share_of(folder: Path, accelerator: Accelerator) -> Share:
    """This process's part in filling the cache in `folder`. A place where all processes meet.

    Each leaves a mark in its own folder, and looks whose it finds. Where one cannot write, as a
    complete cache allows, the folder is taken for one that all share. Raises RunFailed where two
    processes do not agree on whether they see the same.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 1:
        return Share(0, 1)
    name = broadcast_object_list([f".seen-{uuid4().hex}"])[0]
    mark = folder / f"{name}-{rank}"
    written = _touched(mark)
    accelerator.wait_for_everyone()
    seen = [other for other in range(world) if (folder / f"{name}-{other}").exists()]
    told: list[tuple[bool, list[int]]] = gather_object([(written, seen)])  # all have looked then
    if written:
        mark.unlink()
    if not all(could for could, _ in told):
        return Share(rank, world)
    # By what all have told, so that all processes raise where one does.
    if any(told[other][1] != its for _, its in told for other in its):
        raise RunFailed(
            f"data.cache={folder} is shared by some processes and not yet seen by others: give the "
            "same command again, and if that does not help, a folder on another disk"
        )
    if rank == 0 and len(seen) < world:
        print(
            f"note     data.cache={folder} is not on a disk that all processes share: each machine "
            "fills its own",
            flush=True,
        )
    return Share(seen.index(rank), len(seen))


def _touched(mark: Path) -> bool:
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        return False
    return True

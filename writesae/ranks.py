"""Which process of several this one is, and its share of the work, for commands whose processes need not talk."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # mpirun
)


LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")  # among the processes of one machine


def add_ranks(parser: argparse._ActionsContainer) -> None:
    """Adds --rank, --world-size and --distributed, for `place(args)`."""
    add = parser.add_argument
    add("--rank", type=int, help="this process's number of several, from 0 (default: the only one)")
    add("--world-size", type=int, help="how many processes there are (default: 1)")
    add("--distributed", action="store_true", help="take both from the environment that torchrun, srun or mpirun made")


def place(args: argparse.Namespace) -> tuple[int, int]:
    """(rank, world size) of the arguments of `add_ranks`; (0, 1) without.

    Of several processes that a launcher started on a machine each takes a GPU of its own as "cuda", see `take_gpu`.

    Raises:
        ValueError: one without the other, both ways at once, none in the environment, or out of range.
    """
    if args.distributed:
        if (args.rank, args.world_size) != (None, None):
            raise ValueError("distributed: expected it, or --rank and --world-size, got both")
        rank, size = from_environment()
        if getattr(args, "device", "cpu") == "cuda":
            take_gpu()
    elif args.rank is None and args.world_size is None:
        return 0, 1
    elif args.rank is None or args.world_size is None:
        raise ValueError(f"rank, world_size: expected both or neither, got {args.rank} and {args.world_size}")
    else:
        rank, size = args.rank, args.world_size
    if not 0 <= rank < size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, got {rank} of {size}")
    return rank, size


def from_environment() -> tuple[int, int]:
    """(rank, world size) that a launcher gave this process.

    Raises:
        ValueError: none did, or not in numbers.
    """
    for names in LAUNCHERS:
        given = [os.environ.get(name) for name in names]
        if None not in given:
            try:
                return int(given[0] or ""), int(given[1] or "")
            except ValueError:
                raise ValueError(f"{', '.join(names)}: expected whole numbers, got {given}") from None
    expected = " or ".join(" and ".join(names) for names in LAUNCHERS)
    raise ValueError(f"distributed: expected {expected} in the environment, as torchrun, srun and mpirun set them")


def take_gpu() -> int | None:
    """Makes "cuda" the GPU of this process's number on its machine, of those that it sees; which, or None of none.

    srun can show a process its own GPU alone, and then this is that; torchrun shows each all of them.
    """
    import torch

    count = torch.cuda.device_count()
    number = next((os.environ[name] for name in LOCAL if os.environ.get(name, "").isdecimal()), None)
    if number is None or not count:
        return None
    torch.cuda.set_device(int(number) % count)
    return int(number) % count


def share(items: Sequence[T], rank: int, size: int) -> list[T]:
    """The items of one rank: neighbours stay together, numbers differ by one at most."""
    return list(items[len(items) * rank // size : len(items) * (rank + 1) // size])

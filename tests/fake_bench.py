"""Cases that `writesae bench` can run in a moment: one sound, one that disagrees, one without its peer, and worse."""

from __future__ import annotations

import os
import signal
import time

import torch

from writesae.bench.case import Case, Missing, Row, agree
from writesae.bench.timing import compare


def product(options):
    a = torch.ones(64, 64)

    def run():
        return a @ a

    agree("product", run(), a @ a, 1e-6)
    row = compare("a product", "the same product", "x time", run, run, options.rounds(), target=1e9, aim=1e8)
    yield row.does(2 * 64**3, "GFLOP/s", "float32")
    yield Row("an optimist's ratio", "a peer | with a bar", 3.0, "x faster", 5)


def wrong(options):
    yield Row("before the mistake", "", 1.0, "MB", 2)
    agree("wrong", torch.ones(3), torch.tensor([1.0, 1.0, 1.1]), 1e-4)
    raise AssertionError("a ratio after a disagreement")


def lonely(options):
    raise Missing("fast-peer is not installed")
    yield


def broken(options):
    raise RuntimeError("it broke\nbadly")
    yield


def killed(options):
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def interrupted(options):
    """Interrupts the command that runs it, once: the file named in the environment stands for the first time."""
    if os.environ.get("FAKE_BENCH_INTERRUPT") and os.path.exists(os.environ["FAKE_BENCH_INTERRUPT"]):
        os.unlink(os.environ["FAKE_BENCH_INTERRUPT"])
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    yield Row("after the interruption", "", 1.0, "MB")


CASES = [
    Case(name, f"the {name} case", measure, "a peer", ("float32",))
    for name, measure in (
        ("product", product), ("wrong", wrong), ("lonely", lonely), ("broken", broken), ("killed", killed),
        ("interrupted", interrupted),
    )
]  # fmt: skip

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
    """As from a terminal, whose Ctrl-C the command and this process both get: once, or twice in a row and then waits.

    Only where the file named in the environment still stands, which says how often.
    """
    file = os.environ.get("FAKE_BENCH_INTERRUPT", "")
    if os.path.exists(file):
        with open(file) as times:
            twice = times.read() == "2"
        os.unlink(file)
        for _ in range(1 + twice):
            os.kill(os.getppid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        if twice:
            time.sleep(60)
    yield Row("after the interruption", "", 1.0, "MB")


def later(options):
    yield Row("after all others", "", 1.0, "MB")


CASES = [
    # A ceiling takes seconds of products: one case's is enough.
    Case(name, f"the {name} case", measure, "a peer", ("float32",) if name == "product" else ())
    for name, measure in (
        ("product", product), ("wrong", wrong), ("lonely", lonely), ("broken", broken), ("killed", killed),
        ("interrupted", interrupted), ("later", later),
    )
]  # fmt: skip

"""Counts what a hooked model asks of a device, on a simulated one, and prints the table; no GPU needed.

    python scripts/device_counts.py [--layers 18] [--heads 16]

A tiny model with so many layers of the gated delta rule, a dictionary at every head. A launch is an operation on the
device, or a kernel of an operator of this package (their numbers stand in tests/device_counting.py); bytes are those of
a firing, with top-k dictionaries.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TOKENS, TOP = 8192, 32  # a batch of a collection, and what fires a token and head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18, help="layers with dictionaries, a multiple of 3")
    parser.add_argument("--heads", type=int, default=16, help="heads of each")
    given = parser.parse_args()
    if given.layers < 3 or given.layers % 3 or given.heads < 1:
        parser.error(f"layers: expected a multiple of 3, heads: at least 1; got {given.layers}, {given.heads}")
    warnings.filterwarnings("ignore")
    import device_counting as counting
    import torch

    torch.set_num_threads(1)  # more only get in each other's way

    with counting.simulated(given.layers, given.heads) as on:
        print(f"{given.layers} layers x {given.heads} heads; launches\n")
        print(
            f"{'':38}{'plain':>7}{'hooked':>8}{'beyond':>8}{'ours':>7}{'a layer':>9}{'without check':>15}{'waits':>7}"
        )
        cases = [
            ("forward pass", lambda: counting.forward(*on)),
            ("forward pass, packed", lambda: counting.forward(*on, activations="packed")),
            ("forward pass, in segments", lambda: counting.forward(*on, kind=counting.SEGMENTS)),
            ("forward pass, padded", lambda: counting.forward(*on, pads=4)),
            ("step of decoding", lambda: counting.decoding(*on)),
            ("step of decoding, beams reordered", lambda: counting.decoding(*on, beams=True)),
        ]
        for name, case in cases:
            plain, hooked, bare = case()
            waits = sum(hooked.waits.values())
            print(f"{name:38}{plain.total:7}{hooked.total:8}{hooked.total - plain.total:8}{hooked.ours:7}"
                  f"{hooked.ours / given.layers:9.1f}{bare.ours / given.layers:15.1f}{waits:7}")  # fmt: skip
        plain_step, hooked_step = counting.generated(*on)
        print(f"{'token of generate':38}{plain_step:7.0f}{hooked_step:8.0f}{hooked_step - plain_step:8.0f}")
        sites = given.layers * given.heads
        print(f"\nbytes to the host; {TOKENS} tokens x {sites} heads x {TOP}\n")
        print(f"{'':38}{'a firing':>10}{'batch':>10}{'copies':>8}{'waits':>7}")
        for activations in ("exact", "packed"):
            begun, ended, firings = counting.collected(*on, activations)
            each = begun.nbytes / firings
            waits = sum(begun.waits.values()) + sum(ended.waits.values())
            print(f"{'batch of a collection, ' + activations:38}{each:10.2f}"
                  f"{each * TOKENS * sites * TOP / 1e6:7.0f} MB{begun.copies:8}{waits:7}")  # fmt: skip


if __name__ == "__main__":
    main()

"""Training the dictionaries of twelve sites in one pass of the model against training them one by one.

Both train from start to end: the pass that prepares, then as many passes as the steps ask for, each of the lower layers
only. The dictionaries have to be equal, to rounding, before there is a ratio. What the ratio can be follows from what a
token costs: with m the model's share and s a site's, 12 (m + s) / (m + 12 s). On the embedded model, of 6 M parameters,
a site costs two thirds of the model; on a full-size one, here with random weights, a small part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..sae import ModelStream, Passages, TrainConfig, Trainer
from .bench_model import QWEN3_5
from .case import Case, Disagree, Options, Row
from .timing import interleaved, ratio_row

Sites = Sequence[tuple[int, int]]


def train(model: nn.Module, text: Passages, sites: Sites, config: TrainConfig) -> dict:
    """The dictionaries."""
    with ModelStream(model, text, sites) as stream:
        return Trainer(stream, sites, config, progress=False).run()


def compared(name: str, model: nn.Module, text: Passages, sites: Sites, config: TrainConfig, rounds: int) -> Row:
    """One pass against one a site.

    Raises:
        Disagree: other dictionaries.
    """
    found: dict[str, dict] = {}

    def together() -> None:
        found["together"] = train(model, text, sites, config)

    def alone() -> None:
        found["alone"] = {site: train(model, text, [site], config)[site] for site in sites}

    together_s, alone_s = interleaved([together, alone], rounds, warmup=0)
    for site in sites:
        for key, x in found["alone"][site].state_dict().items():
            off = float((found["together"][site].state_dict()[key] - x).abs().max())
            if not off <= 1e-4 * (1 + float(x.abs().max())):
                raise Disagree(f"site {site}: {key} of the dictionaries differs by {off:.1e}")
    row = ratio_row(f"training {len(sites)} sites, {name}", "one by one", "x faster", together_s, alone_s, target=4)
    tokens = config.steps * config.states
    row.note = f"F = {config.F:,}, k = {config.k}, {tokens:,} states a site, equal dictionaries"
    return row


def training_sites(options: Options) -> Iterator[Row]:
    from ..models import load

    if options.quick:
        from ..models.tiny import tiny_model, tokens

        text = Passages(tokens(16, 20))
        config = TrainConfig(F=16, k=2, steps=8, states=40, block=8, prepare=8)
        sites = [(layer, head) for layer in (0, 1, 3) for head in range(4)]
        yield compared("a tiny model", tiny_model(), text, sites, config, options.rounds(1))
        return
    draw = torch.Generator().manual_seed(0)
    model, _ = load("default")
    text = Passages(torch.randint(3, 4000, (128, 256), generator=draw))
    config = TrainConfig(F=1024, k=8, steps=128, block=64, prepare=32)
    sites = [(layer, head) for layer in (4, 5, 6) for head in range(4)]
    yield compared("three layers of the embedded model", model, text, sites, config, options.rounds(3))
    text = Passages(torch.randint(3, 4000, (8, 128), generator=draw))
    # Random atoms: of so few writes some would be the same, and which of two equal atoms fires is anyone's.
    config = TrainConfig(F=2048, k=32, steps=4, states=256, block=8, prepare=1, init="random")
    sites = [(layer, head) for layer in (8, 9) for head in range(6)]
    yield compared(f"two layers of {QWEN3_5.name}", QWEN3_5.random(torch.float32), text, sites, config,
                   options.rounds(1))  # fmt: skip


CASES = [Case("training-sites", "training twelve sites", training_sites, "twelve runs, a site each")]

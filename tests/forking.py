"""Forks beside whole forward passes: what the engine's tests and those of other libraries' models share."""

from __future__ import annotations

import torch
from tiny_models import tokens

import writesae
from writesae.edits import Edits
from writesae.experiments.engine import ForkEngine, Places, read, unread
from writesae.models import layers


def fork_changes(engine, clean, seed=0):
    """Deletion, a random replacement, the native write put back, and nothing."""
    generator = torch.Generator().manual_seed(seed)
    n = len(clean.places)
    left = torch.randn(n, clean.left.shape[1], generator=generator).to(clean.left)
    right = torch.randn(n, clean.right.shape[1], generator=generator).to(clean.left)
    native = read(clean, clean.left, clean.right)
    deltas = {
        "baseline": None,
        "delete": -native,
        "replace": read(clean, left, right) - native,
        "native": read(clean, clean.left, clean.right) - native,
    }
    return deltas, left, right


def plain(model, layer, passage, edits):
    """`[E, T, vocabulary]`: logits of a passage `[T]` under E edits (row i is edit i), by whole passes."""
    with torch.no_grad(), writesae.attach(model, {(layer, 0): None}, edits={layer: edits}):
        return model(passage.expand(len(edits), -1)).logits


def run_engine(model, layer, lengths, places, horizon, seed=0):
    engine = ForkEngine(model, layer, horizon)
    ids = tokens(len(lengths), max(lengths), seed=seed)
    row, position, head = (torch.tensor(x) for x in zip(*places, strict=True))
    clean = engine.clean(ids, torch.tensor(lengths), lambda writes: Places(row, position, head))
    deltas, left, right = fork_changes(engine, clean)
    return engine, clean, ids, engine.run(clean, deltas), left, right


def compare_with_whole_passes(model, layer):
    site = next(s for s in layers(model) if s.layer_index == layer)
    H = site.num_v_heads
    # First and last position, an end that cuts the horizon short, two heads of one key head, two places in a row.
    lengths, horizon = [23, 17], 4
    places = [(0, 0, 0), (0, 9, H - 1), (0, 10, max(H - 2, 0)), (0, 22, H // 2), (1, 3, 1 % H), (1, 14, 0)]
    engine, clean, ids, hidden, left, right = run_engine(model, layer, lengths, places, horizon)
    logits = {name: engine.logits(x) for name, x in hidden.items()}
    # A model of random weights passes rounding errors on enlarged: 2.3e-5 is the worst seen.
    close = dict(atol=1e-4, rtol=1e-4)
    for row, length in enumerate(lengths):
        mine = [i for i, place in enumerate(places) if place[0] == row]
        passage = ids[row, :length]
        clean_logits = model(passage[None]).logits[0]
        rows, at, heads = range(len(mine)), [places[i][1] for i in mine], [places[i][2] for i in mine]
        deleted = plain(model, layer, passage, Edits.delete(rows, at, heads, site.K, site.V))
        replaced = plain(model, layer, passage, Edits(rows, at, heads, left[mine], right[mine], "replace"))
        for j, i in enumerate(mine):
            t, stop = at[j], min(at[j] + horizon + 1, length)
            assert clean.valid[i].sum() == stop - t
            for name, expected in (("baseline", clean_logits), ("delete", deleted[j]), ("replace", replaced[j])):
                torch.testing.assert_close(logits[name][i, : stop - t], expected[t:stop], **close)
            assert (replaced[j][t:stop] - clean_logits[t:stop]).abs().max() > 1e-2  # the edit does something
    assert torch.equal(logits["native"], logits["baseline"])  # bit for bit


def compare_times_of_reading(model, layer):
    """Forks that begin after the token are the rest of those that begin at it."""
    H = next(s for s in layers(model) if s.layer_index == layer).num_v_heads
    lengths, places = [23, 17], [(0, 0, 0), (0, 9, H - 1), (0, 10, 0), (0, 22, H // 2), (1, 3, H - 1), (1, 14, 0)]
    ids = tokens(2, 23)
    row, position, head = (torch.tensor(x) for x in zip(*places, strict=True))
    found = []
    for read_ in ("before", "after"):
        engine = ForkEngine(model, layer, 4, read_)
        clean = engine.clean(ids, torch.tensor(lengths), lambda writes: Places(row, position, head))
        deltas, _, _ = fork_changes(engine, clean)
        deltas = {name: None if x is None else unread(clean, x) for name, x in deltas.items()}
        found.append((clean.valid, engine.run(clean, deltas)))
    (whole, at), (rest, after) = found
    assert torch.equal(whole[:, 1:], rest)
    for name in at:
        torch.testing.assert_close(after[name][rest], at[name][:, 1:][rest], atol=1e-4, rtol=1e-4)
    assert torch.equal(after["native"], after["baseline"])
    assert (after["delete"][0] - after["baseline"][0]).abs().max() > 1e-2

"""What a type checker sees of the public names, though they load late. `make lint` checks it; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from torch import Tensor, nn

import writesae
from writesae import SAE, Edits, Firings, Store, Writes

if TYPE_CHECKING:
    from typing_extensions import assert_type


def hooks(model: nn.Module) -> None:
    default = writesae.load_default()
    assert_type(default.saes, dict[tuple[int, int], SAE])
    with writesae.attach(model, default.saes, edits={5: Edits.delete(0, 5, 3, K=32, V=64)}) as tap:
        assert_type(tap, writesae.models.Tap)
    assert_type(tap.firings, Firings)
    assert_type(tap.writes[5], Writes)
    assert_type(tap.firings.activation, Tensor)
    assert_type(tap.writes[5].norms(), Tensor)


def operators(x: Tensor, writes: Writes, edits: Edits) -> None:
    out = writesae.ops.gated_delta_rule(x, x, x, x, x, edits=edits, return_writes=True)
    assert_type(out.o, Tensor)
    assert_type(writesae.ops.encode(writes, x, x, k=8), writesae.ops.Codes)
    assert_type(writes.native(0, 0, x), tuple[Tensor, Tensor])
    assert_type(writes.head(0).rank_one("here"), tuple[Tensor, Tensor])
    assert_type(writes.left_head(3), int)
    assert_type(writes.left_head(x), Tensor)


def files(folder: Path) -> None:
    sae = SAE.from_pretrained(folder)
    assert_type(sae, SAE)
    assert_type(sae.decode(sae.encode(sae.mean)), Tensor)
    store = Store(folder)
    assert_type(store, writesae.collect.Store)
    assert_type(store.top(5, 3, 1), pa.Table)
    assert_type(writesae.__version__, str)

"""`writesae collect --activations`: what rounding changes, what the folder says of it, and what is refused."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from test_collect_model import arguments, folder  # noqa: F401

from writesae.cli import main
from writesae.collect import Store, merge
from writesae.collect.command import _activations


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):  # noqa: F811
    """{activations: a finished collection}."""
    root = tmp_path_factory.mktemp("activations")
    for kind in ("exact", "packed"):
        assert main(arguments(folder, root / kind, "--activations", kind)) == 0
    return {kind: root / kind for kind in ("exact", "packed")}


def test_packed_is_rounded_by_so_much_at_most(made, capsys):
    exact, packed = (pa.concat_tables(Store(made[kind]).firings()) for kind in ("exact", "packed"))
    places = [name for name in exact.column_names if name != "activation"]
    assert exact.select(places).equals(packed.select(places)) and len(exact) > 1000
    a, b = (t["activation"].to_numpy().astype(np.float64) for t in (exact, packed))
    error = np.abs(b / a - 1).max()
    assert 0.5 < error * 2 ** (25 - 5) <= 1  # of 24 features
    assert not np.any(packed["activation"].to_numpy().view(np.uint32) & 0xF)  # 32 - 5 bits, the sign not among them
    assert [Store(made[kind]).activations for kind in ("exact", "packed")] == ["exact", "packed"]
    assert main(["verify", str(made["packed"])]) == 0
    assert "activations packed" in capsys.readouterr().out


def test_a_new_folder_is_packed_and_another_stays_as_it_is(made, folder, tmp_path, capsys):  # noqa: F811
    assert main(arguments(folder, tmp_path / "new")) == 0
    assert Store(tmp_path / "new").activations == "packed"
    assert main(arguments(folder, made["exact"])) == 0
    assert Store(made["exact"]).activations == "exact"
    capsys.readouterr()
    assert main(arguments(folder, made["exact"], "--activations", "packed")) == 2
    assert "source.activations is None there, 'packed' here" in capsys.readouterr().err


@pytest.mark.parametrize("features, expected", [(24, "packed"), (65_536, "packed"), (65_537, "exact")])
def test_what_cannot_be_packed_is_exact(tmp_path, features, expected):
    asked = argparse.Namespace(activations=None, out=str(tmp_path / "new"))
    assert _activations(asked, {(0, 0): SimpleNamespace(F=24), (0, 1): SimpleNamespace(F=features)}) == expected


def test_kinds_are_not_merged(made, tmp_path):
    with pytest.raises(ValueError, match="stores: expected the same activations in all, got exact in .* and packed in"):
        merge([made["exact"], made["packed"]], tmp_path / "both")
    assert not (tmp_path / "both").exists()

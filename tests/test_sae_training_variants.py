"""Several dictionaries a site in one pass, and sites over ranks and devices: each as if it were trained by itself."""

# ruff: noqa: F811 (fixtures of the other file)

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch
from test_sae_training import (  # noqa: F401
    SITE,
    SMALL,
    Planted,
    command,
    config,
    corpus,
    model,
    model_folder,
    passages,
)
from test_sae_training_sites import Counted

from writesae import ranks
from writesae.sae import SAE, ModelStream, Trainer
from writesae.sae.block import Block
from writesae.sae.evaluate import evaluate
from writesae.sae.output import joined
from writesae.sae.variants import check_variants, combined, named
from writesae.sae.watch import look

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFERENT = {
    "k3": config(), "few": config(k=1, F=9, seed=5), "random": config(seed=2, init="random"),
    "jump": config(sparsity="jumprelu"), "tied": config(kind="bilinear_tied", r=2),
}  # fmt: skip


def equal(a: SAE, b: SAE) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# ---- variants -------------------------------------------------------------------------------------------------------


def shared(**more):
    return {name: replace(c, text_seed=0, **more) for name, c in DIFFERENT.items()}


def test_variants_are_the_dictionaries_trained_alone(tmp_path):
    """Other sizes, seeds, kinds and sparsities from one pass over the text, to the bit, interrupted or not."""
    configs = shared()
    together = Counted(Planted())
    trainer = Trainer(together, [SITE], configs, progress=False)
    saes = trainer.run()
    for name, one in configs.items():
        alone = Counted(Planted())
        sae = Trainer(alone, [SITE], one, progress=False).run()[SITE]
        assert equal(saes[name][SITE], sae) and saes[name][SITE].training_record == sae.training_record, name
        assert alone.ran == together.ran
        history = [h for h in trainer.history if h["variant"] == name]
        assert history and {h["head"] for h in history} == {SITE[1]}
    Trainer(Planted(), [SITE], configs, tmp_path, progress=False).run(17)
    again = Trainer(Planted(), [SITE], configs, tmp_path, True, progress=False)
    assert again.done == 17
    resumed = again.run()
    assert all(equal(resumed[name][SITE], saes[name][SITE]) for name in configs)
    longer = Trainer(Planted(), [SITE], shared(steps=50), tmp_path, True, progress=False)
    assert longer.done == 40
    for other in ({**configs, "k3": configs["few"]}, dict(list(configs.items())[:2])):
        with pytest.raises(ValueError, match="another run: .*variants differs"):
            Trainer(Planted(), [SITE], other, tmp_path, True, progress=False)
    with pytest.raises(ValueError, match="trainers: expected one config, got k3, few"):
        trainer.trainers  # noqa: B018


def test_names_and_combinations():
    base = config()
    assert combined(base, {"k": [3], "F": [24]}) == {"": base}
    found = combined(base, {"k": [1, 2], "F": [16], "seed": [4, 7]})
    assert list(found) == ["k1-seed4", "k1-seed7", "k2-seed4", "k2-seed7"]
    assert (found["k2-seed7"].k, found["k2-seed7"].F, found["k2-seed7"].seed) == (2, 16, 7)
    assert {c.drawn_by for c in found.values()} == {4} and found["k1-seed4"].text_seed == 4
    found = named(base, ["k=1,F=16", "lr=1e-2, centred=false", "sparsity=gated"])
    assert list(found) == ["k1-F16", "lr0.01-centredFalse", "sparsity_gated"]
    assert not found["lr0.01-centredFalse"].centred and found["sparsity_gated"].sparsity == "gated"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: named(config(), ["k"]), "variant: expected NAME=VALUE,... of kind, F, k"),
        (lambda: named(config(), ["steps=3"]), "variant: expected NAME=VALUE,... of kind, F, k"),
        (lambda: named(config(), ["k=few"]), "variant: k: expected int, got 'few' in 'k=few'"),
        (lambda: named(config(), ["centred=1"]), "variant: centred: expected bool, got '1'"),
        (lambda: named(config(), ["k=2", "k=2"]), "variant: expected each once, got k2 twice"),
        (lambda: named(config(), ["k=99"]), "k: expected k <= F=24, got 99"),
        (lambda: combined(config(), {"k": [2, 2]}), "k: expected different values, got 2, 2"),
        (lambda: check_variants({}), "variants: expected at least one"),
        (lambda: check_variants({"../a": config()}), "variants: expected names of letters"),
        (
            lambda: check_variants({"a": config(), "b": config(steps=3)}),
            r"expected one steps for all, got 40 and 3 \(b",
        ),
        (lambda: check_variants({"a": config(), "b": config(seed=3)}), "text_seed: variants of several seeds see"),
    ],
)
def test_variants_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_command_with_variants(model_folder, corpus, tmp_path, capsys):
    """Folders by variant and site; each dictionary that of a run of its own."""
    import writesae.cli  # noqa: F401

    base = ["--model", model_folder, "--corpus", corpus, *SMALL, "--steps", 6, "--evaluate-every", 3]
    out = tmp_path / "out"
    assert command(*base, "-k", "1,3", "--seed", "0,1", "--site", "0:1", "--site", "3:2", "--out", out) == 0
    names = {"k1-seed0", "k1-seed1", "k3-seed0", "k3-seed1"}
    assert {p.name for p in out.iterdir() if p.is_dir()} == names
    assert (
        command(*base, "-k", 3, "--seed", 1, "--text-seed", 0, "--layer", 3, "--head", 2, "--out", tmp_path / "a") == 0
    )
    alone, sae = SAE.from_pretrained(tmp_path / "a"), SAE.from_pretrained(out / "k3-seed1", subfolder="L3H2")
    assert equal(alone, sae) and alone.metrics == sae.metrics
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["metrics"]) == {f"{name}/{site}" for name in names for site in ("L0H1", "L3H2")}
    assert metrics["metrics"]["k3-seed1/L3H2"] == sae.metrics and metrics["config"]["k1-seed0"]["k"] == 1
    assert command(*base, "--variant", "k=1,F=8", "--variant", "k=4", "--site", "0:1", "--out", tmp_path / "b") == 0
    assert (tmp_path / "b" / "k1-F8" / "cfg.json").is_file() and (tmp_path / "b" / "k4" / "cfg.json").is_file()
    capsys.readouterr()
    for more, message in (
        (["-k", "1,2", "--variant", "F=8"], "variant: expected it, or lists of -k, --features and --seed, got both"),
        (["--rank", 2], "rank: expected --world-size with it, got --rank alone; the rank of atoms is --atom-rank"),
    ):
        assert command(*base, *more, "--site", "0:1", "--out", tmp_path / "c") == 2
        assert message in capsys.readouterr().err


# ---- ranks and devices ----------------------------------------------------------------------------------------------


def test_rank_and_size_from_launchers(monkeypatch):
    for first, second in ranks.LAUNCHERS:
        with monkeypatch.context() as patch:
            for names in ranks.LAUNCHERS:
                for name in names:
                    patch.delenv(name, raising=False)
            with pytest.raises(ValueError, match="expected RANK and WORLD_SIZE or SLURM_PROCID and"):
                ranks.from_environment()
            patch.setenv(first, "3")
            patch.setenv(second, "8")
            assert ranks.from_environment() == (3, 8)
            patch.setenv(second, "eight")
            with pytest.raises(ValueError, match=f"{first}, {second}: expected whole numbers"):
                ranks.from_environment()


def test_share_and_place(monkeypatch):
    for n in (1, 5, 12, 13):
        parts = [ranks.share(range(n), r, 5) for r in range(5)]
        assert sum(parts, []) == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1
    parser = argparse.ArgumentParser()
    ranks.add_ranks(parser)

    def place(*given):
        return ranks.place(parser.parse_args(given))

    for names in ranks.LAUNCHERS:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert place() == (0, 1) and place("--rank", "2", "--world-size", "3") == (2, 3)
    for given, message in (
        (["--rank", "3", "--world-size", "3"], "rank: expected 0 <= rank < world_size, got 3 of 3"),
        (["--world-size", "3"], "rank, world_size: expected both or neither, got None and 3"),
        (["--distributed"], "distributed: expected RANK and WORLD_SIZE or SLURM_PROCID and SLURM_NTASKS"),
        (["--distributed", "--rank", "0"], "distributed: expected it, or --rank and --world-size, got both"),
    ):
        with pytest.raises(ValueError, match=message):
            place(*given)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert place("--distributed") == (1, 4) and place() == (0, 1)
    monkeypatch.setenv("SLURM_NTASKS", "four")
    with pytest.raises(ValueError, match="SLURM_PROCID, SLURM_NTASKS: expected whole numbers"):
        place("--distributed")


def test_ranks_leave_what_one_process_leaves(model_folder, corpus, tmp_path, capsys):
    import writesae.cli  # noqa: F401

    base = ["--model", model_folder, "--corpus", corpus, *SMALL, "--steps", 6, "--evaluate-every", 3, "--site", "*:1",
            "-k", "1,2"]  # fmt: skip
    assert command(*base, "--out", tmp_path / "one") == 0
    many, of = tmp_path / "many", ["--world-size", 2, "--out", tmp_path / "many"]
    assert command(*base, *of, "--rank", 1) == 0
    assert not (many / "metrics.json").exists()
    assert command(*base, *of, "--rank", 1) == 2
    assert "rank-1-of-2 already holds a run; add --resume" in capsys.readouterr().err
    assert command(*base, *of, "--rank", 0) == 0
    assert command(*base, *of, "--rank", 1, "--resume") == 0
    for path in (tmp_path / "one").glob("**/sae.safetensors"):
        assert path.read_bytes() == (many / path.relative_to(tmp_path / "one")).read_bytes()
    assert len(list(many.glob("**/sae.safetensors"))) == 6
    one, all_ranks = (json.loads((x / "metrics.json").read_text()) for x in (tmp_path / "one", many))
    assert {n: x for n, x in one.items() if n != "seconds"} == {n: x for n, x in all_ranks.items() if n != "seconds"}
    one, all_ranks = (json.loads((x / "training.json").read_text()) for x in (tmp_path / "one", many))

    def key(h):
        return json.dumps(h, sort_keys=True)

    assert sorted(map(key, one)) == sorted(map(key, all_ranks)) and joined([one]) == one
    capsys.readouterr()
    for more, message in (
        (["--world-size", 3, "--rank", 0, "--resume"], "holds a run of 2 ranks, and this is one of 3"),
        (["--resume"], "holds a run of 2 ranks, and this is one of 1"),
    ):
        assert command(*base, "--out", many, *more) == 2
        assert message in capsys.readouterr().err
    assert command(*base, "--out", tmp_path / "one", "--world-size", 2, "--rank", 0) == 2
    assert "holds a run of one process, and this is one of 2" in capsys.readouterr().err
    assert command(*base, "--out", tmp_path / "c", "--world-size", 4, "--rank", 0) == 2
    assert "world_size: expected a site a process at least, got 3 sites for 4" in capsys.readouterr().err


def test_sites_on_devices_train_as_where_the_model_is(model):
    """Here two names of one device, whose sites take their steps in threads of their own."""
    sites = [(0, 1), (1, 2), (3, 2)]

    def train(devices):
        with ModelStream(model, passages(32), sites) as stream:
            settings = config(F=16, steps=20, states=40, block=16)
            trainer = Trainer(stream, sites, settings, progress=False, devices=devices)
            return trainer, trainer.run()

    (plain, want), (spread, got) = train(None), train(["cpu", "cpu:0"])
    assert [str(x) for x in spread.devices.values()] == ["cpu", "cpu:0", "cpu"]
    assert all(equal(want[site], got[site]) for site in sites) and plain.history == spread.history


# ---- while it trains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bilinear", "flat"])
@pytest.mark.parametrize("through", [False, True])
def test_a_look_is_what_evaluation_finds(kind, through):
    """FVU and L0 as `evaluate` has them; and for how many writes the winner leaves less than deletion, one by one."""
    trainer = Trainer(Planted(noise=0.1), [SITE], config(kind=kind), progress=False)
    sae = trainer.run()[SITE]
    block = Block([Planted(noise=0.1)._writes(torch.arange(500, 504))], SITE[1])
    half = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    root = half @ half.T if through else None
    found, want = look(sae, block, root), evaluate(sae, block)
    assert found["held_out_fvu"] == pytest.approx(want["fvu"], rel=1e-6) and found["held_out_l0"] == want["l0"]
    better = 0
    for row in range(4):
        for position in range(48):
            at = torch.tensor([row]), torch.tensor([position])
            codes = sae.encode(block.states(*at))
            left, right = block.natives(*at)
            native = left[0].T @ right[0]
            size, i = codes.values[0].max(0)
            atom = codes.indices[0, i]
            A = sae.W_dec[atom].view(6, 9) if kind == "flat" else sae.v_dec[atom].T @ sae.w_dec[atom]
            R = torch.eye(6) if root is None else root
            better += bool(size > 0 and (R @ (native - size * A)).norm() < (R @ native).norm())
    assert 0 < better < 192 and found["beats_deletion"] == better / 192

"""Many sites from the same passes of a model, and what is seen of them while they train."""

# ruff: noqa: F811 (fixtures of the other file)

from __future__ import annotations

import json

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

from writesae.sae import SAE, ModelStream, Trainer, evaluate
from writesae.sae.block import Block

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted:
    """A stream that counts the passages a model is run over."""

    def __init__(self, stream):
        self.stream, self.length, self.ran = stream, stream.length, 0

    def __len__(self):
        return len(self.stream)

    def writes(self, rows):
        self.ran += len(rows)
        return self.stream.writes(rows)


def test_twelve_sites_in_one_pass_are_those_of_twelve(model):
    """Every head of three layers, together and alone: the same dictionaries, a twelfth of the passes of the model."""
    sites = [(layer, head) for layer in (0, 1, 3) for head in range(4)]
    settings = config(F=16, steps=20, states=40, block=16)

    def train(some):
        with ModelStream(model, passages(32), some) as stream:
            counted = Counted(stream)
            return Trainer(counted, some, settings, progress=False).run(), counted.ran

    together, ran = train(sites)
    alone = [train([site]) for site in sites]
    assert sum(n for _, n in alone) == 12 * ran
    for site, (saes, _) in zip(sites, alone, strict=True):
        for name, x in saes[site].state_dict().items():
            torch.testing.assert_close(together[site].state_dict()[name], x, rtol=1e-4, atol=1e-5)


def test_held_out_fvu_while_it_runs():
    """It is the FVU of the dictionary as it is then, on passages not trained on."""
    held_out = Block([Planted()._writes(torch.arange(500, 510))], SITE[1])
    heard: list[dict] = []
    run = Trainer(Planted(), [SITE], config(), progress=False, held_out={SITE: held_out}, log=heard.append)
    run.run(20, evaluate_every=10)
    want = evaluate(run.export()[SITE], held_out)["fvu"]
    run.run(evaluate_every=15)
    seen = [(h["step"], h["held_out_fvu"]["L2H3"]) for h in run.history if "held_out_fvu" in h]
    assert [step for step, _ in seen] == [10, 20, 30, 40]
    assert seen[1][1] == pytest.approx(want, rel=1e-6) and seen[3][1] < seen[0][1]
    assert heard == run.history
    blind = Trainer(Planted(), [SITE], config(), progress=False)
    blind.run()
    assert [h for h in run.history if "held_out_fvu" not in h] == blind.history  # looking changes nothing


def test_command_of_many_sites(model_folder, corpus, tmp_path, capsys):
    import writesae.cli  # noqa: F401

    base = ["--model", model_folder, "--corpus", corpus, *SMALL, "--steps", 6, "--evaluate-every", 3]
    out = tmp_path / "out"
    assert writesae.cli.main(["train", *map(str, base), "--site", "3:*", "--site", "*:1", "--out", str(out)]) == 0
    names = {"L3H0", "L3H1", "L3H2", "L3H3", "L0H1", "L1H1"}
    assert {p.name for p in out.iterdir() if p.is_dir()} == names
    said = capsys.readouterr().err
    assert "step 3: held-out FVU" in said and "over 6 sites" in said
    history = json.loads((out / "training.json").read_text())
    looks = [h for h in history if "held_out_fvu" in h]
    assert [h["step"] for h in looks] == [3, 6] and set(looks[0]["held_out_fvu"]) == names
    assert command(*base, "--site", "*:*", "--dtype", "bfloat16", "--watch-passages", 0, "--out", tmp_path / "all") == 0
    assert len(list((tmp_path / "all").glob("L*H*"))) == 12
    sae = SAE.from_pretrained(tmp_path / "all", subfolder="L1H2")
    assert sae.b_enc.dtype == torch.float32 and 0 < sae.metrics["fvu"] < 2
    assert not [h for h in json.loads((tmp_path / "all" / "training.json").read_text()) if "held_out_fvu" in h]

"""Published checkpoints: whose codes they give, where they lie, and how BatchTopK, without a threshold, is decided."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from writesae import ops
from writesae.cli import main
from writesae.options import dictionaries
from writesae.sae import SAE, estimate_threshold, load_published
from writesae.writes import Writes

K, V, F, TOP = 6, 9, 24, 3
TYPES = ("flat", "rank1", "bilinear", "bilinear_tied", "bilinear_flat", "bilinear_gated", "bilinear_jumprelu")
OURS = {"rank1": "matrix", "bilinear_gated": "bilinear", "bilinear_jumprelu": "bilinear"}
ON_WRITES = [name for name in TYPES if name.startswith("bilinear")]


def tensors(sae_type: str, layout: str = "rank1", seed: int = 0, K: int = K, V: int = V) -> dict:
    """`model_state_dict` of a published checkpoint; `layout` "old" has factors (F, d), "rank2" two a atom."""
    g, r = torch.Generator().manual_seed(seed), 2 if layout == "rank2" else 1

    def rand(*shape):
        return torch.randn(*shape, generator=g) / 2

    def factors(*names):
        made = {n: rand(F, r, d) for n, d in zip(names, (K, V) * 2, strict=False)}
        return {n: x[:, 0].clone() if layout == "old" else x for n, x in made.items()}

    state = {"steps_since_active": torch.zeros(F, dtype=torch.long)}
    if sae_type in ("flat", "rank1"):
        state |= {"encoder.weight": rand(F, K * V), "encoder.bias": rand(F)}
    elif sae_type == "bilinear_gated":
        state |= {"b_gate": rand(F), "b_mag": rand(F), "r_mag": rand(F)}
    else:
        state["b_enc"] = rand(F)
    if sae_type == "bilinear_jumprelu":
        state["log_threshold"] = rand(F)
    if sae_type.endswith("flat"):
        state |= {"decoder.weight": rand(K * V, F), "decoder.bias": rand(K * V)}
    if sae_type == "bilinear_flat":
        state |= factors("V_enc", "W_enc")
    elif sae_type == "bilinear_tied":
        state |= factors("V_dec", "W_dec")
    elif sae_type == "rank1":
        state |= factors("V", "W")
    elif sae_type != "flat":
        state |= factors("V_enc", "W_enc", "V_dec", "W_dec")
    return state if sae_type.endswith("flat") else state | {"bias": rand(K, V)}


def publish(folder: Path, sae_type="bilinear", layout="rank1", state=None, beside=True, K=K, V=V, **config) -> Path:
    """`best.pt` and `config.json` in a folder; a value "drop" leaves a key out of both."""
    config = {
        "sae_type": sae_type, "layer": 9, "head": 4, "n_features": F, "d_k": K, "d_v": V, "d_in": K * V, "k": TOP,
        "rank": 2 if layout == "rank2" else 1, "use_batchtopk": False, "lr": 3e-4, "device": "cuda", **config,
    }  # fmt: skip
    config = {name: x for name, x in config.items() if not isinstance(x, str) or x != "drop"}
    folder.mkdir(parents=True, exist_ok=True)
    state = tensors(sae_type, layout, K=K, V=V) if state is None else state
    content = {"model_state_dict": state, "config": config, "epoch": 3, "step": 40, "val_mse": 0.5}
    torch.save(content, folder / "best.pt")
    if beside:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def states(n=40, seed=1) -> torch.Tensor:
    return torch.randn(n, K, V, generator=torch.Generator().manual_seed(seed)) / 2


def forward(state: dict, X: torch.Tensor, batchtopk: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The publisher's codes `[n, F]` and reconstructions, in float64, from the tensors alone."""
    s = {n: x.double() for n, x in state.items()}
    s |= {n: x[:, None] for n, x in s.items() if n in ("V", "W", "V_enc", "W_enc", "V_dec", "W_dec") and x.ndim == 2}
    X = X.double()
    if "encoder.weight" in s:
        z = X.reshape(len(X), -1) @ s["encoder.weight"].T + s["encoder.bias"]
    else:
        left, right = s.get("V_enc", s.get("V_dec")), s.get("W_enc", s.get("W_dec"))
        z = sum(((X @ right[:, j].T) * left[:, j].T).sum(1) for j in range(left.shape[1])) + s.get("b_enc", 0)
    if "b_gate" in s:
        codes = (s["r_mag"].exp() * z + s["b_mag"]).relu() * (z + s["b_gate"] > 0)
    elif "log_threshold" in s:
        codes = z * (z > s["log_threshold"].exp())
    elif batchtopk:
        flat = z.relu().flatten()
        codes = torch.zeros_like(flat)
        best = flat.topk(TOP * len(X)).indices
        codes[best] = flat[best]
        codes = codes.view_as(z)
    else:
        keep = torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(TOP).indices, True)
        codes = z.relu() * keep
    if "decoder.weight" in s:
        return codes, (codes @ s["decoder.weight"].T + s["decoder.bias"]).view_as(X)
    left, right = (s["V"], s["W"]) if "V" in s else (s["V_dec"], s["W_dec"])
    atoms = (left.mT @ right).flatten(1)
    return codes, (codes @ atoms).view_as(X) + s["bias"]


def dense(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*values.shape[:-1], F, dtype=values.dtype).scatter(-1, indices, values)


def same_codes(sae: SAE, X: torch.Tensor, codes: torch.Tensor) -> None:
    got = dense(*sae.encode(X)).double()
    assert torch.equal(got > 0, codes > 0) and bool((codes > 0).any())
    torch.testing.assert_close(got, codes, rtol=0, atol=1e-5)


# ---- codes are the publisher's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sae_type", TYPES)
@pytest.mark.parametrize("layout", ["rank1", "old", "rank2"])
@pytest.mark.parametrize("batchtopk", [None, "topk", 0.75])
def test_codes_are_the_publishers(sae_type, layout, batchtopk, tmp_path):
    own = sae_type in ("bilinear_gated", "bilinear_jumprelu")  # whose flag the publisher's code does not look at
    publish(tmp_path, sae_type, layout, use_batchtopk=batchtopk is not None)
    sae = SAE.from_pretrained(tmp_path, batchtopk=None if own else batchtopk)
    assert (sae.kind, sae.K, sae.V, sae.F, sae.layer, sae.head) == (OURS.get(sae_type, sae_type), K, V, F, 9, 4)
    assert not sae.centred and not bool(sae.mean.any())
    X, state = states(), tensors(sae_type, layout)
    codes, made = forward(state, X)
    if batchtopk == 0.75 and not own:
        every = state | {"log_threshold": torch.full((F,), 0.75, dtype=torch.float64).log()}
        codes, made = forward(every, X)
    same_codes(sae, X, codes)
    torch.testing.assert_close(sae(X).double(), made, rtol=0, atol=1e-4)
    if sae.rank_one_atoms:  # of the norms they were saved with
        key = "V" if sae_type == "rank1" else "V_dec"
        assert torch.equal(sae.v_dec.flatten(), state[key].flatten())


@pytest.mark.parametrize("sae_type", ON_WRITES)
@pytest.mark.parametrize("layout", ["rank1", "old", "rank2"])
@pytest.mark.parametrize("batchtopk", [None, "topk", 0.75])
def test_codes_from_writes_are_those_from_states(sae_type, layout, batchtopk, tmp_path):
    own = sae_type in ("bilinear_gated", "bilinear_jumprelu")
    publish(tmp_path, sae_type, layout, use_batchtopk=batchtopk is not None and not own)
    sae = SAE.from_pretrained(tmp_path, batchtopk=None if own else batchtopk)
    g = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 50, 2, 1, K, generator=g) / 2, torch.randn(2, 50, 4, 1, V, generator=g) / 2
    writes = Writes(-torch.rand(2, 50, 4, generator=g), left, right)
    v, w, b = sae.encoder()
    limit = None if sae.threshold is None else sae.threshold[None]
    codes = ops.encode(writes, v[None], w[None], b[None], k=sae.k, threshold=limit, heads=[1])
    if codes.offsets is None:
        got = dense(codes.values[:, :, 0], codes.indices[:, :, 0]).flatten(0, 1)
    else:
        got, row = torch.zeros(100, F), torch.arange(100).repeat_interleave(codes.offsets.diff())
        got[row, codes.indices] = codes.values
    want = dense(*sae.encode(writes.states(list(range(50)))[:, :, 1].flatten(0, 1)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert torch.equal(got > 0, want > 0) and bool((want > 0).any())


# ---- where they lie -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A repository's layout: two models, five sites, and one dictionary of our own."""
    for path, seed in (("small/L9_H4", 0), ("small/L1_H0", 1), ("large/L9_H4", 2), ("large/L3H11", 3)):
        layer, head = map(int, path.split("/L")[1].replace("_", "").split("H"))
        publish(tmp_path / path, state=tensors("bilinear", seed=seed), layer=layer, head=head)
    SAE(K, V, F, TOP, layer=2, head=5).save_pretrained(tmp_path / "large" / "L2H5")
    return tmp_path


def test_a_file_a_folder_and_a_site_of_the_layout(hub):
    expected = tensors("bilinear", seed=0)["V_dec"]
    for sae in (
        SAE.from_pretrained(hub / "small" / "L9_H4" / "best.pt"),
        SAE.from_pretrained(hub / "small" / "L9_H4"),
        SAE.from_pretrained(hub, subfolder="small/L9_H4"),
        SAE.from_pretrained(str(hub), "small/L9_H4/"),
        SAE.from_pretrained(hub / "small", subfolder="L9_H4"),
        load_published(hub / "small" / "L9_H4" / "best.pt"),
    ):
        assert torch.equal(sae.v_dec, expected) and (sae.layer, sae.head) == (9, 4)
        assert sae.training_record == {"epoch": 3, "step": 40, "val_mse": 0.5}
    assert SAE.from_pretrained(hub, subfolder="large/L2H5").head == 5


def test_what_is_there_is_named(hub):
    sites = "large/L2H5, large/L3H11, large/L9_H4, small/L1_H0, small/L9_H4"
    with pytest.raises(FileNotFoundError, match=rf"no cfg.json there and no best.pt.* it does hold {sites}: say which"):
        SAE.from_pretrained(hub)
    with pytest.raises(FileNotFoundError, match="L5_H5: no such folder; it does hold L1_H0, L9_H4: say which"):
        SAE.from_pretrained(hub / "small", subfolder="L5_H5")
    for i in range(9):
        publish(hub / "many" / f"L{i}_H0", layer=i, head=0)
    with pytest.raises(FileNotFoundError, match=r"hold L0_H0, .*, L7_H0 and 1 more: say which") as found:
        SAE.from_pretrained(hub / "many")
    assert "L8_H0" not in str(found.value)
    (hub / "text").mkdir()
    (hub / "text" / "final.pt").write_text("x")
    (hub / "text" / "red\x1b[31m").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"this is not a saved dictionary; it holds final.pt, red\\x1b\[31m$"):
        SAE.from_pretrained(hub / "text")


def test_two_dictionaries_in_one_folder_are_refused(hub):
    folder = hub / "small" / "L9_H4"
    SAE(K, V, F, TOP).save_pretrained(folder)
    with pytest.raises(ValueError, match="L9_H4: holds cfg.json of one dictionary and best.pt of another: name the"):
        SAE.from_pretrained(folder)
    assert SAE.from_pretrained(folder / "best.pt").layer == 9
    (folder / "cfg.json").unlink()
    with pytest.raises(ValueError, match="holds sae.safetensors of one dictionary and best.pt of another"):
        SAE.from_pretrained(folder)


def test_a_subfolder_lies_inside(hub):
    for subfolder in ("../small/L9_H4", str(hub / "small" / "L9_H4")):
        with pytest.raises(ValueError, match="subfolder: expected a folder inside"):
            SAE.from_pretrained(hub / "large", subfolder=subfolder)
    with pytest.raises(ValueError, match="subfolder: expected none, since .*best.pt is no folder"):
        SAE.from_pretrained(hub / "small" / "L9_H4" / "best.pt", subfolder="L9_H4")


# ---- the site and the rest of the configuration ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, site", [("L9_H4", (9, 4)), ("L9H4", (9, 4)), ("L12_H0", (12, 0)), ("run7", (None, None))]
)
def test_the_site_from_the_folders_name(name, site, tmp_path, monkeypatch):
    folder = publish(tmp_path / name, layer="drop", head="drop")
    sae = SAE.from_pretrained(folder)
    assert (sae.layer, sae.head) == site
    monkeypatch.chdir(folder)
    sae = SAE.from_pretrained("best.pt")
    assert (sae.layer, sae.head) == site


def test_a_site_that_is_contradicted(tmp_path):
    folder = publish(tmp_path / "L9_H5")
    with pytest.raises(ValueError, match="best.pt: config: head: 4, but its folder's name says 5"):
        SAE.from_pretrained(folder)
    assert load_published(folder / "best.pt", layer=9, head=5).head == 5
    publish(tmp_path / "L9_H4")
    (tmp_path / "L9_H4" / "config.json").write_text('{"layer": 8}')
    with pytest.raises(ValueError, match="best.pt: config: layer: 9, but 8 in the config.json beside it"):
        SAE.from_pretrained(tmp_path / "L9_H4")


def test_what_the_file_leaves_out_config_json_says(tmp_path):
    publish(tmp_path, "flat", beside=False)
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    whole = content.pop("config")
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt: a flat dictionary does not say its head's sizes: pass K and V"):
        SAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({n: x for n, x in whole.items() if n != "k"}))
    with pytest.raises(ValueError, match="config: k: expected the number of active atoms, which neither the file nor"):
        SAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    sae = SAE.from_pretrained(tmp_path)
    assert (sae.K, sae.V, sae.k, sae.layer, sae.head) == (K, V, TOP, 9, 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_features": 99}, "config: n_features: 99, but its tensors say 24"),
        ({"rank": 2}, "config: rank: 2, but its tensors say 1"),
        ({"d_in": 5}, "config: d_in: 5, but its tensors say 54"),
        ({"d_k": V, "d_v": K}, "d_k: 9, but V_dec says K = 6 .K and V swapped"),
        ({"sae_type": "flat"}, "sae_type: flat, but its tensors are those of a bilinear dictionary"),
        ({"sae_type": "bilinear_jumprelu"}, "sae_type: bilinear_jumprelu, but its tensors are those of a bilinear"),
        ({"sae_type": 3}, "sae_type: expected text, got 3"),
        ({"use_batchtopk": 1}, "use_batchtopk: expected true or false"),
    ],
)
def test_a_configuration_that_its_tensors_deny(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(publish(tmp_path, state=tensors("bilinear"), **changes))


def test_a_type_that_denies_its_own_tensor(tmp_path):
    publish(tmp_path, state=tensors("bilinear_jumprelu"))
    with pytest.raises(
        ValueError, match="bilinear, but its tensors are those of a bilinear dictionary with log_thresh"
    ):
        SAE.from_pretrained(tmp_path)


# ---- BatchTopK ------------------------------------------------------------------------------------------------------


def test_batchtopk_must_be_decided_and_is_kept(tmp_path):
    publish(tmp_path / "his", use_batchtopk=True)
    with pytest.raises(ValueError, match=r'best.pt: a BatchTopK dictionary without a threshold.*"topk" for the k = 3'):
        SAE.from_pretrained(tmp_path / "his")
    topk = SAE.from_pretrained(tmp_path / "his", batchtopk="topk")
    given = SAE.from_pretrained(tmp_path / "his" / "best.pt", batchtopk=0.37)
    assert topk.sparsity == "topk" and topk.k == TOP and topk.threshold is None
    assert given.sparsity == "threshold" and torch.equal(given.threshold, torch.full((F,), 0.37))
    estimated = estimate_threshold(topk, states(20480 // 8))
    for sae, how in (
        (topk, "plain top-k, k = 3"), (given, "threshold given"), (estimated, "threshold estimated from 2,560 states"),
    ):  # fmt: skip
        sae.save_pretrained(tmp_path / "ours")
        again = SAE.from_pretrained(tmp_path / "ours")
        assert again.training_record["published"] == {"batchtopk": how} and again.training_record["step"] == 40
        assert json.loads((tmp_path / "ours" / "cfg.json").read_text())["training"]["published"]["batchtopk"] == how
        assert torch.equal(dense(*again.encode(states())), dense(*sae.encode(states())))


@pytest.mark.parametrize("batchtopk", ["top", -0.1, float("nan"), float("inf"), True, [1]])
def test_batchtopk_that_is_neither(batchtopk, tmp_path):
    publish(tmp_path, use_batchtopk=True)
    with pytest.raises(ValueError, match="batchtopk: expected 'topk' or a finite threshold >= 0, got"):
        SAE.from_pretrained(tmp_path, batchtopk=batchtopk)


@pytest.mark.parametrize("sae_type", ["bilinear", "bilinear_jumprelu", "ours"])
@pytest.mark.parametrize("batchtopk", ["topk", 0.5])
def test_batchtopk_for_another_dictionary(sae_type, batchtopk, tmp_path):
    if sae_type == "ours":
        SAE(K, V, F, TOP).save_pretrained(tmp_path)
    else:
        publish(tmp_path, sae_type, use_batchtopk=sae_type == "bilinear_jumprelu")
    with pytest.raises(ValueError, match=r"batchtopk: expected None, .* is no (published )?BatchTopK dictionary; got"):
        SAE.from_pretrained(tmp_path, batchtopk=batchtopk)


def test_threshold_and_batchtopk_are_one(tmp_path):
    publish(tmp_path, use_batchtopk=True)
    assert torch.equal(load_published(tmp_path / "best.pt", threshold=0.5).threshold, torch.full((F,), 0.5))
    with pytest.raises(ValueError, match="threshold: expected threshold or batchtopk, got both"):
        load_published(tmp_path / "best.pt", threshold=0.5, batchtopk="topk")


# ---- the command line -----------------------------------------------------------------------------------------------


def chosen(*given, batchtopk=None) -> dict:
    return dictionaries(Namespace(sae=[str(x) for x in given], model="some/model", batchtopk=batchtopk))


def test_the_option_takes_published_dictionaries(hub):
    assert sorted(chosen(hub / "small")) == [(1, 0), (9, 4)]
    assert sorted(chosen(hub / "large")) == [(2, 5), (3, 11), (9, 4)]  # with one of our own
    assert sorted(chosen(hub / "small" / "L9_H4", f"7:1={hub / 'small' / 'L1_H0' / 'best.pt'}")) == [(7, 1), (9, 4)]
    with pytest.raises(
        FileNotFoundError, match="sae: expected a dictionary or a folder of them: .* it does hold large"
    ):
        chosen(hub)
    with pytest.raises(FileNotFoundError, match="sae: expected a dictionary or a folder of them, got nowhere"):
        chosen("nowhere")
    publish(hub / "run7", layer="drop", head="drop")
    with pytest.raises(ValueError, match="sae: .*run7 does not say its site; write --sae LAYER:HEAD="):
        chosen(hub / "run7")


def test_the_option_decides_batchtopk(hub):
    publish(hub / "small" / "L2_H2", layer=2, head=2, use_batchtopk=True)
    with pytest.raises(ValueError, match="L2_H2/best.pt: a BatchTopK dictionary without a threshold.*--batchtopk"):
        chosen(hub / "small")
    found = chosen(hub / "small", batchtopk=0.25)
    assert {site: sae.sparsity for site, sae in found.items()} == {(1, 0): "topk", (9, 4): "topk", (2, 2): "threshold"}
    assert chosen(hub / "small", batchtopk="topk")[2, 2].training_record["published"] == {
        "batchtopk": "plain top-k, k = 3"
    }
    with pytest.raises(ValueError, match="batchtopk: expected a published BatchTopK dictionary among those of --sae"):
        chosen(hub / "large", batchtopk="topk")


@pytest.mark.parametrize("command", ["collect", "replace"])
def test_commands_say_what_the_option_takes(command, tmp_path, capsys):
    for text in ("most", "-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            main([command, "--out", str(tmp_path), f"--batchtopk={text}"])
        assert f"expected topk or a threshold >= 0, got '{text}'" in capsys.readouterr().err


# ---- a stranger's folder --------------------------------------------------------------------------------------------


def test_links_and_pipes_are_refused_by_name(tmp_path):
    publish(tmp_path / "beside")
    for make in (
        lambda p: p.symlink_to("/dev/zero"), os.mkfifo, lambda p: p.mkdir(), lambda p: p.symlink_to(p.name),
        lambda p: p.symlink_to("nowhere"),
    ):  # fmt: skip
        for name in ("best.pt", "config.json"):
            folder = publish(tmp_path / "here")
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(ValueError, match=f"{name}: (expected a regular file|cannot be read)"):
                SAE.from_pretrained(folder)
            with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: "):
                SAE.from_pretrained(folder / "best.pt")
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "a").symlink_to("a")
    (tmp_path / "loop" / "b").symlink_to(".")
    (tmp_path / "loop" / "L9_H4").symlink_to(tmp_path / "beside")
    with pytest.raises(FileNotFoundError, match="it does hold L9_H4, b/L9_H4, b/b/L9_H4: say which"):
        SAE.from_pretrained(tmp_path / "loop")


def test_a_huge_directory_is_refused_unread(tmp_path):
    size = 64 * 2**20
    with (tmp_path / "best.pt").open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFE, 0xFFFE, size, 0, 0))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"best.pt: refused: .*a directory of 67,108,864 bytes, at most 4,194,304"):
        SAE.from_pretrained(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * 2**20


def test_code_in_a_published_folder_does_not_run(tmp_path):
    class Owned:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    folder = publish(tmp_path / "L9_H4")
    content = torch.load(folder / "best.pt", weights_only=True)
    torch.save({**content, "rng": Owned()}, folder / "best.pt")
    with pytest.raises(ValueError, match="L9_H4/best.pt: refused: .*would mean unpickling"):
        SAE.from_pretrained(tmp_path, subfolder="L9_H4")
    assert not (tmp_path / "owned").exists()

"""Dictionaries: encode and decode against the formulas, files, published checkpoints, bad input."""

from __future__ import annotations

import json

import pytest
import torch

import writesae
from writesae import ops
from writesae.sae import KINDS, SAE, SparseCodes, fvu, load_published
from writesae.sae.sparse import BilinearAt, Decode, exact_topk
from writesae.writes import Writes

K, V, F, TOP = 6, 9, 20, 4


def some_sae(kind="bilinear", r=1, sparsity="topk", seed=0, **more) -> SAE:
    """A dictionary whose every parameter is random."""
    torch.manual_seed(seed)
    sae = SAE(K, V, F, TOP, kind, 1 if kind == "flat" else r, sparsity, layer=3, head=1, **more)
    with torch.no_grad():
        for x in [*sae.parameters(), sae.mean]:
            x.copy_(torch.randn_like(x))
        if sae.threshold is not None:
            sae.threshold.uniform_(0, 2)
    return sae


def some_states(n=17, seed=1) -> torch.Tensor:
    return torch.randn(n, K, V, generator=torch.Generator().manual_seed(seed))


def some_writes(T=40, H=4, Hl=2, seed=2) -> Writes:
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, T, Hl, 1, K, generator=g), torch.randn(2, T, H, 1, V, generator=g)
    return Writes(-torch.rand(2, T, H, generator=g), left, right)


def by_hand(sae: SAE, X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense codes `[n, F]` and reconstructions by the formulas, feature by feature."""
    p = {name: x.double() for name, x in sae.state_dict().items() if x is not None}
    X = X.double()
    pre = []
    for i in range(sae.F):
        C = X - p["mean"]
        if sae.kind in ("matrix", "flat"):
            a = sum(p["W_enc"][i, k * V + v] * C[:, k, v] for k in range(K) for v in range(V))
        else:
            ve, we = ("v_dec", "w_dec") if sae.kind == "bilinear_tied" else ("v_enc", "w_enc")
            a = sum(torch.einsum("k,nkv,v->n", p[ve][i, x], C, p[we][i, x]) for x in range(sae.r))
        pre.append(a + p["b_enc"][i])
    pre = torch.stack(pre, 1)
    codes = torch.zeros_like(pre)
    for n in range(len(X)):
        if sae.sparsity == "topk":
            for i in sorted(range(sae.F), key=lambda i: -float(pre[n, i]))[: sae.k]:
                codes[n, i] = max(float(pre[n, i]), 0.0)
        else:
            codes[n] = torch.where(pre[n] > p["threshold"], pre[n], 0.0)
    if "W_dec" in p:
        atoms = p["W_dec"].view(sae.F, K, V)
    else:
        atoms = sum(torch.einsum("fk,fv->fkv", p["v_dec"][:, x], p["w_dec"][:, x]) for x in range(sae.r))
    return codes, torch.einsum("nf,fkv->nkv", codes, atoms) + p["bias"] + p["mean"]


def dense(codes: SparseCodes, features=F) -> torch.Tensor:
    out = torch.zeros(*codes.values.shape[:-1], features, dtype=codes.values.dtype)
    return out.scatter_add(-1, codes.indices, codes.values)


@pytest.mark.parametrize("sparsity", ["topk", "threshold"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 2])
def test_encode_and_decode_are_the_formulas(kind, r, sparsity):
    sae, X = some_sae(kind, r, sparsity), some_states()
    codes, made = by_hand(sae, X)
    got = sae.encode(X)
    torch.testing.assert_close(dense(got).double(), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(got).double(), made, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(X[None])[0], sae.decode(got))
    if sparsity == "topk":
        assert got.values.shape == (len(X), TOP)
        assert int((got.values > 0).sum(1).max()) <= TOP


def test_top_k_takes_raw_preactivations_and_breaks_ties_low():
    pre = torch.tensor([[1.0, 3.0, 3.0, 3.0, -1.0], [-5.0, -1.0, -1.0, -2.0, 0.5], [2.0, 2.0, 2.0, 2.0, 2.0]])
    values, indices = exact_topk(pre, 2)
    assert indices.tolist() == [[1, 2], [4, 1], [0, 1]]
    assert values.tolist() == [[3, 3], [0.5, 0], [2, 2]]


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat"])
@pytest.mark.parametrize("r", [1, 2])
def test_encoder_runs_on_writes_with_the_centring_folded_in(kind, r):
    sae, writes = some_sae(kind, r), some_writes()
    v, w, b = sae.encoder()
    assert v.shape == (F, r, K) and w.shape == (F, r, V) and b.shape == (F,)
    codes = ops.encode(writes, v[None], w[None], b[None], k=TOP, heads=[1])
    states = writes.states(list(range(40)))[:, :, 1]
    want = sae.encode(states)
    torch.testing.assert_close(codes.values[:, :, 0], want.values, rtol=1e-4, atol=1e-4)
    assert float((codes.indices[:, :, 0] == want.indices).float().mean()) > 0.99


def test_what_a_kind_does_not_have_is_said():
    with pytest.raises(ValueError, match="kind flat has a dense encoder.*use encode"):
        some_sae("flat").encoder()
    with pytest.raises(ValueError, match="kind bilinear_flat has dense atoms"):
        some_sae("bilinear_flat").atoms()


@pytest.mark.parametrize("r", [1, 2])
def test_sparse_gradients(r):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(3, K, V, generator=g, dtype=torch.float64)
    v, w = (torch.randn(5, r, n, generator=g, dtype=torch.float64, requires_grad=True) for n in (K, V))
    indices = torch.tensor([[0, 1], [1, 4], [4, 0]])
    values = torch.rand(3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, v, w: Decode.apply(a, indices, v, w), (values, v, w))
    dense_pre = torch.einsum("frk,pkv,frv->pf", v, X, w).gather(1, indices)
    sparse_pre = BilinearAt.apply(dense_pre.detach(), indices, X, v, w)
    upstream = torch.randn(3, 2, generator=g, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(dense_pre, (v, w), upstream), torch.autograd.grad(sparse_pre, (v, w), upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_fvu_of_the_mean_is_exactly_one():
    X = some_states(200) * 37 + 5
    assert fvu(X, X.mean(0, keepdim=True).expand_as(X)) == 1.0
    assert fvu(X, X) == 0.0
    with pytest.raises(ValueError, match="prediction: expected the states' shape"):
        fvu(X, X[:5])


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", ["topk", "threshold"])
def test_save_and_load_are_exact(kind, sparsity, tmp_path):
    sae = some_sae(kind, 2, sparsity, model="a model", training={"steps": 7}, metrics={"fvu": 0.5})
    sae.save_pretrained(tmp_path / "here")
    got = writesae.SAE.from_pretrained(tmp_path / "here")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["cfg.json", "sae.safetensors"]
    for name, x in sae.state_dict().items():
        assert torch.equal(got.state_dict()[name], x), name
    for name in ("kind", "F", "d_sae", "k", "K", "V", "r", "sparsity", "layer", "head", "model", "centred",
                 "training_record", "metrics"):  # fmt: skip
        assert getattr(got, name) == getattr(sae, name), name
    assert torch.equal(got(some_states()), sae(some_states()))
    assert not any(p.requires_grad for p in got.parameters())
    config = json.loads((tmp_path / "here" / "cfg.json").read_text())
    assert config["writesae_version"] == writesae.__version__ and config["d_sae"] == F


def test_a_site_is_a_subfolder(tmp_path):
    some_sae().save_pretrained(tmp_path / "L3H1")
    assert SAE.from_pretrained(tmp_path, subfolder="L3H1").head == 1
    with pytest.raises(FileNotFoundError, match=r"no cfg.json there.*it does hold L3H1"):
        SAE.from_pretrained(tmp_path)


def edited(folder, **changes):
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: x for n, x in config.items() if x != "drop"}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2, "writesae_version": "9.0"}, "format 2 .written by writesae 9.0.*reads format 1"),
        ({"format": "drop"}, "not a writesae dictionary"),
        ({"colour": "red"}, "unknown keys colour"),
        ({"head": "drop"}, "missing keys head"),
        ({"kind": "cubic"}, "kind: expected one of bilinear"),
        ({"V": 7}, r"bias: expected shape \(6, 7\), got \(6, 9\)"),
        ({"kind": "matrix"}, "unknown tensors v_enc, w_enc for kind matrix"),
        ({"kind": "bilinear_tied", "sparsity": "threshold"}, "unknown tensors"),
        ({"sparsity": "threshold"}, "missing tensors threshold"),
        ({"k": 21}, "k: expected k <= F=20, got 21"),
        ({"k": "four"}, "k: expected an integer"),
        ({"dtype": "int8"}, "dtype: expected a floating dtype, got 'int8'"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(changes, message, tmp_path):
    some_sae().save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    sae = some_sae()
    sae.save_pretrained(tmp_path)
    weights = (tmp_path / "sae.safetensors").read_bytes()
    (tmp_path / "sae.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        SAE.from_pretrained(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="cfg.json: not JSON"):
        SAE.from_pretrained(tmp_path)
    with torch.no_grad():
        sae.b_enc[3] = float("nan")
    sae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="b_enc: expected finite values"):
        SAE.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or file"):
        SAE.from_pretrained("nowhere")
    with pytest.raises(FileNotFoundError, match="missing.pt: no such folder or file"):
        SAE.from_pretrained("some/missing.pt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="cubic"), "kind: expected one of bilinear, .*got 'cubic'"),
        (dict(F=0), "F: expected an integer >= 1, got 0"),
        (dict(k=21), "k: expected k <= F=20, got 21"),
        (dict(r=7), "r: expected a rank <= min.K, V. = 6, got 7"),
        (dict(kind="flat", r=2), "r: kind flat"),
        (dict(sparsity="l1"), "sparsity: expected one of topk, threshold, pursuit, got 'l1'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAE(**(dict(K=K, V=V, F=F, k=TOP) | arguments))


def test_wrong_states():
    with pytest.raises(ValueError, match=r"X: expected states \[..., K=6, V=9\], got shape \(3, 9, 6\)"):
        some_sae().encode(torch.zeros(3, 9, 6))
    with pytest.raises(ValueError, match="X: expected a floating dtype, got torch.int64"):
        some_sae().encode(torch.zeros(3, 6, 9, dtype=torch.int64))


# ---- published checkpoints ------------------------------------------------------------------------------------------


def published(kind: str, r: int = 1, old: bool = False) -> dict:
    """The tensors of a checkpoint as the paper's code lays them out."""
    g = torch.Generator().manual_seed(5)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    def factors(*names):
        return {n: rand(F, r, d)[:, 0] if old else rand(F, r, d) for n, d in zip(names, (K, V) * 2, strict=False)}

    state = {"steps_since_active": torch.zeros(F, dtype=torch.long)}
    if kind in ("flat", "matrix"):
        state |= {"encoder.weight": rand(F, K * V), "encoder.bias": rand(F)}
    if kind in ("flat", "bilinear_flat"):
        state |= {"decoder.weight": rand(K * V, F), "decoder.bias": rand(K * V)}
    if kind == "matrix":
        state |= factors("V", "W") | {"bias": rand(K, V)}
    if kind == "bilinear_tied":
        state |= factors("V_dec", "W_dec") | {"b_enc": rand(F), "bias": rand(K, V)}
    if kind == "bilinear_flat":
        state |= factors("V_enc", "W_enc") | {"b_enc": rand(F)}
    if kind in ("bilinear", "jumprelu", "gated"):
        state |= factors("V_enc", "W_enc", "V_dec", "W_dec") | {"bias": rand(K, V)}
        if kind == "gated":
            state |= {n: rand(F) for n in ("b_gate", "b_mag", "r_mag")}
        else:
            state["b_enc"] = rand(F)
        if kind == "jumprelu":
            state["log_threshold"] = rand(F)
    return state


def published_codes(kind: str, state: dict, X: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the paper says such a checkpoint computes: dense codes and reconstruction."""
    s = {n: x[:, None] if n in ("V", "W", "V_enc", "W_enc", "V_dec", "W_dec") and x.ndim == 2 else x
         for n, x in state.items()}  # fmt: skip
    if kind in ("flat", "matrix"):
        pre = X.flatten(1) @ s["encoder.weight"].T + s["encoder.bias"]
    else:
        ve, we = ("V_dec", "W_dec") if kind == "bilinear_tied" else ("V_enc", "W_enc")
        pre = torch.einsum("frk,nkv,frv->nf", s[ve], X, s[we])
        pre = pre if kind == "gated" else pre + s["b_enc"]
    if kind == "jumprelu":
        codes = pre * (pre > s["log_threshold"].exp())
    elif kind == "gated":
        codes = (pre + s["b_gate"] > 0) * (s["r_mag"].exp() * pre + s["b_mag"]).relu()
    else:
        values, indices = pre.topk(k)
        codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    if "decoder.weight" in s:
        return codes, (codes @ s["decoder.weight"].T + s["decoder.bias"]).view_as(X)
    v, w = (s["V"], s["W"]) if kind == "matrix" else (s["V_dec"], s["W_dec"])
    return codes, torch.einsum("nf,frk,frv->nkv", codes, v, w) + s["bias"]


@pytest.mark.parametrize("kind", ["bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat", "jumprelu", "gated"])
@pytest.mark.parametrize("layout", ["rank1", "rank2", "old"])
def test_published_checkpoints(kind, layout, tmp_path):
    state = published(kind, 2 if layout == "rank2" else 1, layout == "old")
    config = {"k": 3, "layer": 9, "head": 4, "d_k": K, "d_v": V, "sae_type": "rank1" if kind == "matrix" else kind}
    content = {"model_state_dict": state, "config": config, "epoch": 2, "step": 11, "val_mse": 0.25}
    torch.save(content, tmp_path / "best.pt")
    sae = SAE.from_pretrained(tmp_path / "best.pt")
    assert (sae.K, sae.V, sae.F, sae.layer, sae.head, sae.centred) == (K, V, F, 9, 4, False)
    assert sae.training_record == {"epoch": 2, "step": 11, "val_mse": 0.25}
    X = some_states()
    codes, made = published_codes(kind, state, X, 3)
    torch.testing.assert_close(dense(sae.encode(X)), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(X), made, rtol=1e-4, atol=1e-4)
    if kind not in ("flat", "matrix"):
        assert sae.encoder()[0].shape == (F, 2 if layout == "rank2" else 1, K)


def test_published_batchtopk_needs_its_threshold(tmp_path):
    content = {"model_state_dict": published("bilinear"), "config": {"k": 3, "use_batchtopk": True}}
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="BatchTopK dictionary without a threshold.*must be said"):
        load_published(tmp_path / "best.pt")
    sae = load_published(tmp_path / "best.pt", threshold=1.5)
    assert sae.sparsity == "threshold" and bool((sae.encode(some_states()).values > 1.5).any())
    codes = dense(sae.encode(some_states()))
    assert float(codes[codes > 0].min()) > 1.5


def test_published_flat_needs_sizes(tmp_path):
    torch.save({"model_state_dict": published("flat"), "config": {"k": 3}}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="does not say its head's sizes: pass K and V"):
        load_published(tmp_path / "best.pt")
    assert load_published(tmp_path / "best.pt", K=K, V=V).K == K
    with pytest.raises(ValueError, match=r"decoder.bias: expected K\*V = 42"):
        load_published(tmp_path / "best.pt", K=K, V=7)


class Dangerous:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_that_needs_unpickling_is_refused(tmp_path):
    content = {"model_state_dict": published("bilinear"), "config": Dangerous(tmp_path / "owned")}
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt: refused: .*would mean unpickling"):
        SAE.from_pretrained(tmp_path / "best.pt")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt: refused"):
        SAE.from_pretrained(tmp_path / "text.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.pt: refused"):
        SAE.from_pretrained(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "expected a dict with model_state_dict, got list"),
        ({"weights": {}}, "expected a dict with model_state_dict"),
        ({"model_state_dict": {"V_enc": torch.zeros(2, 3)}}, "no known layout has exactly the tensors V_enc"),
        ({"model_state_dict": {"conv": torch.zeros(2)}}, "unknown tensors conv"),
    ],
)
def test_other_checkpoints_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(ValueError, match=message):
        SAE.from_pretrained(tmp_path / "best.pt")

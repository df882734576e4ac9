"""Exports read by the tools they are for. Each is skipped where its package is not installed; `python
scripts/test_libraries.py bridges` installs them beside the environment."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from bridge_cases import SITE, real_store
from fake_hub import Hub, Repo

import writesae
from writesae.bridges import circuit_tracer, delphi, neuronpedia
from writesae.sae import saelens_layout


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread):
    pass


class Aside(types.ModuleType):
    """Stands for a package while another that imports it is loaded; its names are empty classes."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def peer(name: str, *aside: str):
    """A module of another package. `aside`: packages that it imports, of tens or hundreds of megabytes, and that
    nothing here runs; an `Aside` stands for each that is not installed."""
    package = name.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    missing = [x for x in aside if x not in sys.modules and find_spec(x) is None]
    sys.modules.update({x: Aside(x) for x in missing})
    try:
        return importlib.import_module(name)
    finally:
        for x in missing:
            del sys.modules[x]


# ---- SAELens --------------------------------------------------------------------------------------------------------

KINDS = {
    "bilinear": {}, "tied": {"kind": "bilinear_tied", "r": 2}, "dense atoms": {"kind": "bilinear_flat"},
    "matrix": {"kind": "matrix"}, "flat": {"kind": "flat"}, "threshold": {"sparsity": "threshold"},
    "writes": {"target": "write"}, "pursuit": {"kind": "bilinear_tied", "target": "write", "sparsity": "pursuit"},
}  # fmt: skip


@pytest.fixture(scope="module")
def sae_lens():
    """With our architecture registered; wandb is where it would log training to."""
    module = peer("sae_lens", "wandb")
    importlib.import_module("writesae.bridges.saelens")
    return module


def dictionary(kind: str) -> tuple[writesae.SAE, torch.Tensor]:
    """One of ours, and what it encodes."""
    sae = writesae.SAE(6, 10, F=24, k=4, layer=1, head=2, model="m", **KINDS[kind])
    if sae.target == "state":
        torch.nn.init.normal_(sae.mean)
        torch.nn.init.normal_(sae.bias)
    if sae.threshold is not None:
        torch.nn.init.uniform_(sae.threshold, 0.2, 0.5)
    if sae.sparsity == "pursuit":
        a = torch.randn(6, 6)
        a = a @ a.T
        sae.metric.copy_((a + a.T) / 2 + torch.eye(6))
        scale = torch.einsum("frk,kj,frj->fr", sae.v_dec, sae.metric, sae.v_dec).rsqrt()
        sae.v_dec.data.mul_(scale[..., None])
    else:
        torch.nn.init.normal_(sae.b_enc, std=0.3)
    if sae.target == "write":
        return sae, torch.randn(3, 5, 6, 1) * torch.randn(3, 5, 1, 10)
    return sae, torch.randn(3, 5, 6, 10)


def dense(sae: writesae.SAE, X: torch.Tensor) -> torch.Tensor:
    """Our codes, `[..., F]`."""
    if sae.sparsity == "pursuit":
        left, sizes, right = torch.linalg.svd(X, full_matrices=False)
        codes = sae.encode_writes((left[..., :1] * sizes[..., None, :1]).mT, right[..., :1, :])
    else:
        codes = sae.encode(X)
    return torch.zeros(*X.shape[:-2], sae.F).scatter(-1, codes.indices, codes.values)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_saelens_encodes_ours_alike(sae_lens, kind, tmp_path):
    """The folder that `writesae export saelens` writes, the dictionary converted in memory, and its folder again."""
    from writesae.bridges.saelens import from_saelens, to_saelens

    ours, X = dictionary(kind)
    expected, x = dense(ours, X), X.flatten(-2)
    assert (expected > 0).any()
    saelens_layout.save(ours, tmp_path / "ours")
    made = to_saelens(ours)
    made.save_model(tmp_path / "theirs")
    exact = {} if kind == "pursuit" else {"rtol": 0, "atol": 0}  # of other factors of the same write
    for theirs in (made, *(sae_lens.SAE.load_from_disk(tmp_path / name) for name in ("ours", "theirs"))):
        assert theirs.cfg.architecture() == "writesae_bilinear" and theirs.cfg.d_in == 60
        codes = theirs.encode(x)
        torch.testing.assert_close(codes, expected, **(exact or {"rtol": 1e-4, "atol": 1e-5}))
        if kind != "pursuit":
            torch.testing.assert_close(theirs(x), ours(X).flatten(-2), rtol=1e-5, atol=1e-6)
            by_matrix = codes @ theirs.W_dec + theirs.b_dec
            torch.testing.assert_close(theirs.decode(codes), by_matrix, rtol=1e-4, atol=1e-5)
    again = writesae.SAE.from_pretrained(tmp_path / "theirs")  # and what SAELens wrote is one of ours
    assert again.extra_repr() == ours.extra_repr()
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in ours.state_dict().items())
    assert from_saelens(made) is ours


@torch.no_grad()
def test_both_read_a_repository_of_saelens_folders(sae_lens, tmp_path, monkeypatch):
    """Its own call by a folder of the repository, and ours by a subfolder."""
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        ours, X = dictionary("bilinear")
        saelens_layout.save(ours, tmp_path / "L1H2")
        hub.repos["someone/lens"] = Repo()
        hub.repos["someone/lens"].commit({f"L1H2/{p.name}": p.read_bytes() for p in (tmp_path / "L1H2").iterdir()})
        mine = writesae.SAE.from_pretrained("someone/lens", subfolder="L1H2")
        assert torch.equal(dense(mine, X), dense(ours, X)) and "hub" in mine.training_record
        theirs = sae_lens.SAE.from_pretrained("someone/lens", "L1H2")
        assert torch.equal(theirs.encode(X.flatten(-2)), dense(ours, X))
    finally:
        hub.close()


def test_saelens_hooks_see_codes(sae_lens):
    """And what is put in their place is decoded."""
    from writesae.bridges.saelens import to_saelens

    ours, X = dictionary("bilinear")
    sae, x = to_saelens(ours), X.flatten(-2)
    _, cache = sae.run_with_cache(x)
    assert torch.equal(cache["hook_sae_acts_post"], dense(ours, X))
    assert torch.equal(cache["hook_sae_acts_pre"], ours.preactivations(X))
    nothing = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: acts * 0)])
    assert torch.equal(nothing, sae.b_dec.expand_as(x))
    with pytest.raises(NotImplementedError, match="norms"):
        sae.fold_W_dec_norm()
    sae(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0 and ours.v_enc.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, options",
    [("standard", {}), ("topk", {"k": 4}), ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}), ("jumprelu", {})],
)
@pytest.mark.parametrize("applied", [True, False])
def test_theirs_over_states_become_flat_ones(sae_lens, name, options, applied):
    from sae_lens.registry import get_sae_class

    from writesae.bridges.saelens import from_saelens

    kind, config = get_sae_class(name)
    theirs = kind(config(d_in=60, d_sae=24, apply_b_dec_to_input=applied, **options))
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    X = torch.randn(3, 5, 6, 10)
    ours = from_saelens(theirs, K=6, V=10, layer=1, head=2)
    assert (ours.kind, ours.layer, ours.head) == ("flat", 1, 2)
    with torch.no_grad():
        codes = theirs.encode(X.flatten(-2))
        codes = codes.to_dense() if codes.is_sparse else codes
        torch.testing.assert_close(dense(ours, X), codes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(X).flatten(-2), theirs(X.flatten(-2)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="K, V: expected sizes whose product is d_in=60, got 6 and 9"):
        from_saelens(theirs, K=6, V=9)


def test_theirs_that_cannot_be_ours_are_refused(sae_lens, tmp_path):
    from sae_lens.registry import get_sae_class

    from writesae.bridges.saelens import from_saelens

    kind, config = get_sae_class("topk")
    normalised = kind(config(d_in=60, d_sae=24, k=4, normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="normalize_activations: expected 'none', got 'layer_norm'"):
        from_saelens(normalised, K=6, V=10)
    kind, config = get_sae_class("gated")
    with pytest.raises(ValueError, match="got gated"):
        from_saelens(kind(config(d_in=60, d_sae=24)), K=6, V=10)
    normalised.save_model(tmp_path)
    with pytest.raises(ValueError, match="architecture: expected writesae_bilinear, got 'topk'"):
        writesae.SAE.from_pretrained(tmp_path)


# ---- delphi ---------------------------------------------------------------------------------------------------------


def test_delphi_reads_a_collection_of_the_embedded_model(tmp_path):
    """Its LatentDataset: every firing, every token, and the examples that its explainers get."""
    # What scores and asks other models; of 1 GB and a GPU.
    loader = peer("delphi.latents.loader", "faiss", "sentence_transformers", "sparsify", "blobfile", "vllm")
    from delphi.config import ConstructorConfig, SamplerConfig

    store, (layer, head) = real_store(), SITE
    delphi.export(store, tmp_path)
    sampled = SamplerConfig(n_examples_train=2, n_examples_test=2, n_quantiles=2)
    built = ConstructorConfig(example_ctx_len=16, min_examples=6, n_non_activating=5)
    found = loader.LatentDataset(tmp_path, sampled, built, writesae.load_default()[1])
    first = dict(zip(*(store.documents[x].to_pylist() for x in ("document", "first_passage")), strict=True))
    mine = sorted(
        (first[f["document"]] + f["row"], f["position"], f["feature"], f["activation"])
        for table in store.firings(layer, head) for f in table.to_pylist()
    )  # fmt: skip
    theirs = []
    for buffer in found.buffers:
        locations, activations, tokens = buffer.load()
        assert torch.equal(tokens, found.tokens)
        theirs += [(*place, a) for place, a in zip(locations.tolist(), activations.tolist(), strict=True)]
    assert len(mine) > 1000 and sorted(theirs) == mine
    for document, passage in first.items():
        ids = store.tokens(document).tolist()
        assert found.tokens[passage:].flatten()[: len(ids)].tolist() == ids
    records = list(found)
    assert records and all(str(x.latent).startswith("layers.5.head.3_latent") for x in records)
    counts = store.counts(layer, head)["max"].to_pylist()
    for record in records:
        assert record.max_activation == pytest.approx(counts[record.latent.latent_index])
        assert record.train and all(float(x.activations.max()) > 0 for x in record.train)


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_neuronpedia_would_send_what_is_written(tmp_path, monkeypatch):
    """Its client, given the same features, posts the file's content."""
    peer("neuronpedia.requests.feature_request")
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_feature import Feature, Logit
    from neuronpedia.requests.feature_request import MAX_FEATURES_PER_BATCH, FeatureRequest

    model = writesae.load_default()[0]
    writes = (model, {SITE: writesae.SAE.from_pretrained("default")})
    neuronpedia.export(real_store(), tmp_path, features=140, writes=writes)
    files = sorted((tmp_path / "5-writesae-h3").iterdir())
    assert len(files) == 2 and neuronpedia.BATCH == MAX_FEATURES_PER_BATCH
    sent = {}
    monkeypatch.setattr(FeatureRequest, "send_request", lambda self, **request: sent.update(request))
    for path in files:
        body = json.loads(path.read_text())
        of = {"modelId": body["modelId"], "source": body["source"]}
        features = [
            Feature(
                **of, index=x["index"], density=x["density"], explanations=[],
                top_logits=[Logit(**y) for y in x["topLogits"]], bottom_logits=[Logit(**y) for y in x["bottomLogits"]],
                activations=[Activation(**of, index=x["index"], **y) for y in x["activations"]],
            )
            for x in body["features"]
        ]  # fmt: skip
        FeatureRequest(api_key="none").upload_batch(body["modelId"], body["source"], features)
        assert sent["json"] == body and sent["method"] == "POST"


def test_sae_dashboard_reads_its_batches(tmp_path):
    """Into its own classes, and out again the same but for what they add empty."""
    dashboard = peer("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    neuronpedia.export(real_store(), tmp_path, "sae-dashboard", features=20)
    [path] = (tmp_path / "5-writesae-h3").iterdir()
    body = json.loads(path.read_text())
    batch = dashboard.NeuronpediaDashboardBatch(**body).to_dict()
    assert {name: x for name, x in batch.items() if name != "features"} == {k: body[k] for k in body if k != "features"}
    for theirs, ours in zip(batch["features"], body["features"], strict=True):
        assert {name: x for name, x in theirs.items() if name in ours} == ours
        assert all(x == [] for name, x in theirs.items() if name not in ours)


def test_circuit_tracer_reads_a_graph(tmp_path):
    """Into its own model of a file; its nodes are as it would make them."""
    models = peer("circuit_tracer.frontend.graph_models")
    model, tokenizer, saes = writesae.load_default()
    prompt = "import os\nfor name in os.listdir('.'):\n    print("
    circuit_tracer.export(prompt, tmp_path, model, tokenizer, {SITE: writesae.SAE.from_pretrained("default")}, top=10)
    text = (tmp_path / "prompt.json").read_text()
    graph = models.Model.model_validate_json(text)
    assert graph.model_dump()["links"] == json.loads(text)["links"] and graph.metadata.prompt == prompt
    for link in graph.links:
        models.Link(**link)
    tokens, last = graph.metadata.prompt_tokens, len(graph.metadata.prompt_tokens) - 1
    for node in graph.nodes:
        if node.feature_type == "embedding":
            made = models.Node.token_node(node.ctx_idx, int(node.node_id.split("_")[1]))
        elif node.feature_type == "logit":
            made = models.Node.logit_node(last, node.feature, "", int(node.layer) - 1, node.is_target_logit)
        else:
            layer, number, position = map(int, node.node_id.split("_"))
            made = models.Node.feature_node(layer, position, number)
            assert (layer, divmod(number, 4096)[0]) == SITE
        for name in ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "is_target_logit"):
            assert getattr(made, name) == getattr(node, name), name
    assert len(tokens) == last + 1

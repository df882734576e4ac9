"""A prompt's firings as a graph that circuit-tracer's page shows: `OUT/<slug>.json` and `OUT/graph-metadata.json`.

Source of the layout: circuit-tracer 0.5.0, `frontend/graph_models.py` and `utils/create_graph_files.py`. Nodes are the
prompt's tokens, firings of the dictionaries, and the likeliest next tokens. Links are what can be known of them:

- token -> firing: how much of the activation the write of that token put there. Exact, since a code is linear in the
  state and the state a sum of decayed writes; with the encoder's bias they add up to the activation. (Of a dictionary
  of writes: all of it, from the token itself.)
- firing -> next token: what the atom, as much of it as fired, does to the token's logit less the mean logit, to first
  order, through everything that comes after; minus what erasing it does.

There are none from a firing to another: atoms of later layers answer to those of earlier ones, and how is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..edits import Edits
from ..files import write_json
from ..firings import Firings
from ..untrusted import is_integer, shown

if TYPE_CHECKING:
    from ..sae import SAE
    from ..writes import Writes

KEPT = 0.98  # of the links to a firing, by absolute weight, as many as make this share of them
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MEANING = {
    "token to firing": "part of the activation that this token's write put into the state the firing was read from",
    "firing to next token": "first-order effect of the atom, as much as fired, on the logit less the mean logit",
    "firing to firing": "not known",
}


@dataclass(frozen=True)
class Graph:
    """What is known of a prompt: n firings, T tokens, m next tokens.

    Attributes:
        ids: `[T]` int64. firings: of the prompt, n. targets: `[m]` int64 next tokens, likeliest first.
        probabilities: `[m]`. written: `[n, T]` share of an activation that each token wrote.
        effects: `[n, m]` first-order effect of each firing on each next token's logit less the mean logit.
    """

    ids: Tensor
    firings: Firings
    targets: Tensor
    probabilities: Tensor
    written: Tensor
    effects: Tensor


def trace(model, ids: Tensor, dictionaries: Mapping[tuple[int, int], SAE], logits: int = 5) -> Graph:
    """Runs a prompt, twice forward and once backward for each next token.

    Args:
        ids: `[T]` tokens.
        dictionaries: `{(layer, head): dictionary}` with outer-product atoms.
        logits: next tokens.
    Raises:
        ValueError: no tokens, no dictionary, one with dense atoms, or what `attach` raises.
    """
    from ..models import attach

    ids = torch.as_tensor(ids)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids: expected tokens [T], at least one, got shape {tuple(ids.shape)}")
    if not is_integer(logits, 1):
        raise ValueError(f"logits: expected a whole number >= 1, got {shown(logits)}")
    for sae in dictionaries.values():
        sae.atoms()  # refuses kinds that have none
    ids = ids.to(model.get_input_embeddings().weight.device)
    with torch.no_grad(), attach(model, dictionaries) as tap:
        final = model(input_ids=ids[None]).logits[0, -1].float()
    fired = tap.firings.sort()
    probabilities, targets = final.softmax(-1).topk(min(logits, len(final)))
    written = torch.zeros(len(fired), len(ids))
    for (layer, head), sae in dictionaries.items():
        at = torch.nonzero((fired.layer == layer) & (fired.head == head)).flatten()
        if sae.target == "write":
            written[at, fired.position[at].long()] = fired.activation[at]
        else:
            one = tap.writes[layer].head(head).to("cpu")
            written[at] = _written(one, sae, fired.feature[at].long(), fired.position[at].long())
    effects = _effects(model, ids, dictionaries, fired, targets)
    return Graph(ids.cpu(), fired, targets.cpu(), probabilities.cpu(), written, effects)


@torch.no_grad()
def _written(one: Writes, sae: SAE, feature: Tensor, position: Tensor) -> Tensor:
    """`[n, T]`: what each token's write gives to the pre-activations of features at positions, of one head."""
    left, right, decay = (x.float().flatten(0, 2) for x in (one.left, one.right, one.decay))  # of B = H = 1
    T, K, V = len(left), sae.K, sae.V
    cumulative, matrix = decay.view(T, -1).cumsum(0), one.decay_matrix
    found = torch.zeros(len(feature), T)
    encoder = sae.encoder_matrix().float().cpu().view(sae.F, K, V)
    for i, (f, s) in enumerate(zip(feature.tolist(), position.tolist(), strict=True)):
        since = cumulative[s] - cumulative[: s + 1]  # [s + 1, 1, K or V], of what decays from each write to s
        if matrix is None:
            key = left[: s + 1] * since.exp()[:, None]
            found[i, : s + 1] = torch.einsum("trk,kv,trv->t", key, encoder[f], right[: s + 1])
        else:
            kept = encoder[f] * (since[:, None] * matrix[0].float()).exp()
            found[i, : s + 1] = torch.einsum("trk,tkv,trv->t", left[: s + 1], kept, right[: s + 1])
    return found


def _effects(model, ids: Tensor, dictionaries, fired: Firings, targets: Tensor) -> Tensor:
    """`[n, m]`, by the gradient of edits `v 0^T` that would add the atoms again."""
    from ..models import attach

    edits, sides = {}, []
    for layer in dict.fromkeys(layer for layer, _ in dictionaries):
        at = torch.nonzero(fired.layer == layer).flatten()
        if not len(at):
            continue
        v: list[Tensor] = []
        w: list[Tensor] = []
        for n in at.tolist():
            atoms = dictionaries[layer, int(fired.head[n])].atoms()
            for side, x in zip((v, w), atoms, strict=True):
                side.append(x[int(fired.feature[n])].detach().float().cpu())
        ranks = torch.tensor([len(x) for x in v])
        again = at.repeat_interleave(ranks)
        right = torch.zeros(len(again), w[0].shape[-1], requires_grad=True)
        edits[layer] = Edits.add(0, fired.position[again], fired.head[again], torch.cat(v), right)
        sides.append((again, torch.cat(w), right))
    effects = torch.zeros(len(fired), len(targets))
    if not edits:
        return effects
    with torch.enable_grad(), attach(model, {}, edits=edits) as _:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -1].float()
        rights = [right for _, _, right in sides]
        for m, token in enumerate(targets.tolist()):
            grads = torch.autograd.grad(logits[token] - logits.mean(), rights, retain_graph=True)
            for (again, value, _), grad in zip(sides, grads, strict=True):
                effects[:, m].index_add_(0, again, fired.activation[again] * (grad * value).sum(-1))
    return effects


# ---- the file -------------------------------------------------------------------------------------------------------


def export(
    prompt: str,
    out: str | Path,
    model,
    tokenizer,
    dictionaries: Mapping[tuple[int, int], SAE],
    top: int = 200,
    logits: int = 5,
    slug: str = "prompt",
    scan: str = "default",
) -> dict:
    """Writes a prompt's graph; `circuit-tracer start-server --graph_file_dir OUT` shows it.

    Args:
        prompt: the text. out: a folder, made if it is not there.
        model, tokenizer, dictionaries: as for `attach`.
        top: firings that become nodes, those with the largest effect on the next tokens.
        logits: next tokens.
        slug: name of the graph and of its file. scan: what the page calls the model.
    Returns:
        {nodes, links, firings}: firings of the prompt, nodes or not.
    Raises:
        ValueError: an empty prompt, a slug that is no file name, and what `trace` raises.
    """
    if not _SLUG.fullmatch(slug):
        raise ValueError(f"name: expected letters, digits and _ . -, got {shown(slug)}")
    if not is_integer(top, 1):
        raise ValueError(f"top: expected a whole number >= 1, got {shown(top)}")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"][0] if prompt else torch.empty(0, dtype=torch.int64)
    if not len(ids):
        raise ValueError("source: expected the text of a prompt, got no tokens")
    graph = trace(model, ids, dictionaries, logits)
    layers = max(getattr(model.config, "num_hidden_layers", 0), *(layer + 1 for layer, _ in dictionaries))
    content = layout(graph, dictionaries, layers, lambda i: tokenizer.decode([i]), prompt, top, slug, scan)
    write_json(Path(out) / f"{slug}.json", content, Path(out))
    write_json(Path(out) / "graph-metadata.json", {"graphs": [content["metadata"]]}, Path(out))
    return {"nodes": len(content["nodes"]), "links": len(content["links"]), "firings": len(graph.firings)}


def layout(
    graph: Graph, dictionaries: Mapping[tuple[int, int], SAE], layers: int, text, prompt: str, top: int, slug: str,
    scan: str,
) -> dict[str, Any]:  # fmt: skip
    """The graph as circuit-tracer has it: {metadata, qParams, nodes, links}.

    Args:
        layers: of the model; next tokens stand one above them. text: from a token to its text.
    """
    f, T = graph.firings, len(graph.ids)
    stride = {layer: max(sae.F for (x, _), sae in dictionaries.items() if x == layer) for layer, _ in dictionaries}
    score = (graph.effects.abs() * graph.probabilities).sum(-1)
    order = score.argsort(descending=True, stable=True)[:top]
    share = score[order].cumsum(0) / score.sum().clamp_min(1e-30)  # circuit-tracer's influence: what the node completes
    tokens = [text(i) for i in graph.ids.tolist()]
    nodes: list[dict] = [
        {"node_id": f"E_{i}_{t}", "feature": t, "layer": "E", "ctx_idx": t, "feature_type": "embedding",
         "jsNodeId": f"E_{i}-{t}", "clerp": f'Token "{tokens[t]}"'}
        for t, i in enumerate(graph.ids.tolist())
    ]  # fmt: skip
    links: list[dict] = []
    last = []
    for m, (token, p) in enumerate(zip(graph.targets.tolist(), graph.probabilities.tolist(), strict=True)):
        last.append({
            "node_id": f"{layers + 1}_{token}_{T - 1}", "feature": token, "layer": str(layers + 1), "ctx_idx": T - 1,
            "feature_type": "logit", "token_prob": p, "is_target_logit": m == 0, "jsNodeId": f"L_{token}-{T - 1}",
            "clerp": f'Output "{text(token)}" (p={p:.3f})',
        })  # fmt: skip
    for n, influence in zip(order.tolist(), share.tolist(), strict=True):
        layer, head, feature, position = (int(x[n]) for x in (f.layer, f.head, f.feature, f.position))
        number = head * stride[layer] + feature  # circuit-tracer knows no heads
        node = f"{layer}_{number}_{position}"
        nodes.append({
            "node_id": node, "feature": (layer + number) * (layer + number + 1) // 2 + number, "layer": str(layer),
            "ctx_idx": position, "feature_type": "cross layer transcoder", "jsNodeId": f"{layer}_{number}-0",
            "clerp": f"L{layer} H{head} atom {feature}", "influence": influence, "activation": float(f.activation[n]),
        })  # fmt: skip
        for t in _most(graph.written[n]):
            links.append({"source": nodes[t]["node_id"], "target": node, "weight": float(graph.written[n, t])})
        for m, target in enumerate(last):
            links.append({"source": node, "target": target["node_id"], "weight": float(graph.effects[n, m])})
    metadata = {
        "slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": tokens, "prompt": prompt,
        "node_threshold": None, "schema_version": 1, "writesae": {"links": _MEANING, "strides": stride},
    }  # fmt: skip
    params = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": params, "nodes": [*nodes, *last], "links": links}


def _most(weights: Tensor) -> list[int]:
    """The largest of them that make `KEPT` of their absolute sum, in order."""
    sizes, order = weights.abs().sort(descending=True, stable=True)
    needed = int((sizes.cumsum(0) < KEPT * sizes.sum()).sum()) + 1
    return sorted(order[:needed][sizes[:needed] > 0].tolist())

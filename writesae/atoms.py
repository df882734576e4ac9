"""What an atom is about: which tokens its value side promotes, which keys it answers to, and what it goes with.

An atom `v w^T` in a state is read by a query q as `(v . q) w`. So the value side w says what it does to the output
(`promoted_tokens`), and the key side v what it answers to (`answers_to`). The pair has no sign of its own, (-v)(-w)^T
is the same atom: what is promoted is so for readers with `v . q > 0`, and keys are told with the sign of their cosine.

Letters: F atoms, r rank, K key size, V value size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import normalize

from .firings import Firings

if TYPE_CHECKING:
    from .models.binding import LayerSite
    from .sae import SAE

_ROWS = 256  # directions whose logits are made at once


class Promoted(NamedTuple):
    """A token of the vocabulary, its text, and its score."""

    token: int
    text: str
    score: float


class Answered(NamedTuple):
    """A token, its text, the mean cosine of its keys with the atom's key side, and of how many keys."""

    token: int
    text: str
    cosine: float
    n: int


class Neighbour(NamedTuple):
    """Another atom of a dictionary, and its cosine (Frobenius)."""

    feature: int
    cosine: float


def _place(sae: SAE, layer: int | None, head: int | None) -> tuple[int, int]:
    layer, head = sae.layer if layer is None else layer, sae.head if head is None else head
    if layer is None or head is None:
        raise ValueError("sae: the dictionary does not say its layer and head; pass layer and head")
    return int(layer), int(head)


def sides(sae: SAE, feature: int) -> tuple[Tensor, Tensor]:
    """`(v [K], w [V])`, unit: an atom's key and value side; of one of higher rank, its first singular pair.

    Raises:
        ValueError: no such feature, or a kind of dictionary whose atoms are dense.
    """
    v, w = (x.detach().float() for x in sae.atoms())  # [F, r, *]
    _check_feature(feature, len(v))
    if v.shape[1] == 1:
        return normalize(v[feature, 0], dim=0), normalize(w[feature, 0], dim=0)
    left, _, right = torch.linalg.svd(v[feature].mT @ w[feature])
    return left[:, 0], right[0]


def _check_feature(feature: int, F: int) -> None:
    if isinstance(feature, bool) or not isinstance(feature, int) or not 0 <= feature < F:
        raise ValueError(f"feature: expected 0 <= feature < {F}, got {feature!r}")


# ---- value side -----------------------------------------------------------------------------------------------------


def promoted_tokens(
    model,
    tokenizer,
    sae: SAE,
    feature: int,
    k: int = 10,
    *,
    least: bool = False,
    at: tuple[Tensor, int] | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> list[Promoted]:
    """The tokens whose logits an atom raises most by the direct path: past all other layers, straight to the logits.

    Args:
        model, tokenizer: a causal language model, and its tokenizer (None leaves numbers for texts).
        sae: a dictionary with outer-product atoms.
        feature: the atom.
        k: how many.
        least: those it lowers most, instead.
        at: (tokens `[T]`, position): by the exact derivative at that token, with the gate and the norm it has there:
            `direct_path`. None: by the weights alone, `output_map`, which knows neither.
        layer, head: where the dictionary is from, if it does not say.
    Returns:
        The k tokens, most first; the score is the change of the logit less its mean over the vocabulary, in standard
        deviations over the vocabulary.
    Raises:
        ValueError: no such feature, layer or head; without `at`, a layer without an output projection.
    """
    layer, head = _place(sae, layer, head)
    _, w = sides(sae, feature)
    if at is None:
        logits = to_logits(model, w[None] @ output_map(model, layer, head).to(w))[0]
    else:
        logits = direct_path(model, at[0], layer, head, at[1], w[None])[0]
    return _raised(tokenizer, logits, k, least)


def _raised(tokenizer, logits: Tensor, k: int, least: bool = False) -> list[Promoted]:
    """What `promoted_tokens` says of the changes of logits `[vocabulary]`."""
    score = logits.double() - logits.double().mean()
    score = score / score.std().clamp_min(1e-300)
    found = (-score if least else score).topk(min(k, len(score)))
    return [Promoted(int(i), _text(tokenizer, int(i)), float(score[i])) for i in found.indices]


def _text(tokenizer, token: int) -> str:
    return str(token) if tokenizer is None else tokenizer.decode([token])


def _site(model, layer: int, head: int) -> LayerSite:
    from .models.sites import layers, require_layer

    site = require_layer(model, {site.layer_index: site for site in layers(model)}, layer)
    if not 0 <= head < site.num_v_heads:
        raise ValueError(f"head: expected 0 <= head < {site.num_v_heads} (value heads of layer {layer}), got {head}")
    return site


@torch.no_grad()
def output_map(model, layer: int, head: int) -> Tensor:
    """`[V, hidden]` float32: from a head's output to the residual stream by weights alone: the norm's and the output
    projection's.

    The token's own gate, and by how much the norm divides, are left out: they are of a context. So it is right up to
    both; `direct_path` is right with them.

    Raises:
        ValueError: no such layer or head, or one without an output projection that is a matrix.
    """
    from .models.directions import head_projection

    site = _site(model, layer, head)
    out, scale = head_projection(site, head), getattr(site.norm, "weight", None)
    if scale is None:
        return out
    wide = site.num_v_heads * site.V
    if scale.numel() not in (site.V, wide):
        where = f"{site.path} ({type(site.module).__name__})"
        raise ValueError(f"model: expected a norm of {site.V} or {wide} weights in {where}, got {scale.numel()}")
    scale = scale.flatten().float()
    return (scale if len(scale) == site.V else scale[head * site.V : (head + 1) * site.V])[:, None] * out


@torch.no_grad()
def direction_to(model, layer: int, head: int, token: int) -> Tensor:
    """`[V]` float32, unit: the paper's `w* = W_O[head]^T W_U[token]`, what in a value raises a token's logit.

    Raises:
        ValueError: no such layer, head or token, or a layer without an output projection.
    """
    from .models.directions import token_directions

    return token_directions(model, _site(model, layer, head), head, [token])[0]


def _by_op(call, output_final_state: bool):
    return call.run(output_final_state=output_final_state)


@torch.no_grad()
def to_logits(model, hidden: Tensor) -> Tensor:
    """`[n, vocabulary]`: what directions `[n, hidden]` of the residual stream do to the logits, by the model's own
    final norm and output map, each as though it was all there is (a positive factor is the norm's).

    Raises:
        ValueError: a model whose last block returns something else than a stream of that width.
    """
    from .models.seam import intercept
    from .models.shared_prefix import Stack

    stack, embedding = Stack(model), model.get_input_embeddings().weight
    with intercept(model, private=True, calls=dict.fromkeys(stack.sites, _by_op)):  # fla's cannot by itself
        like = stack.last(torch.zeros(1, 1, dtype=torch.int64, device=embedding.device))
    shape, width = like.shape[2:], hidden.shape[-1]
    streams, rest = divmod(shape.numel(), width)
    if hidden.ndim != 2 or rest:
        raise ValueError(f"hidden: expected [n, {shape[-1]}], got shape {tuple(hidden.shape)}")
    x = normalize(hidden.to(like), dim=1) * width**0.5  # as long as a normed stream: the norm's epsilon is small
    x = x[:, None].expand(-1, streams, -1).reshape(-1, *shape)  # the same in each of several streams
    nothing = stack.logits(like.new_zeros(1, *shape))
    return torch.cat([stack.logits(part) - nothing for part in x.split(_ROWS)]).float()


@torch.no_grad()
def direct_path(model, ids: Tensor, layer: int, head: int, position: int, values: Tensor) -> Tensor:
    """Exact first-order change of the logits at a token by the direct path, for changes of a head's output there.

    The change passes the layer's own gate, norm and output projection as they are at that token, is added to the
    residual stream, skips all that comes after, and passes the final norm and the output map as the stream is there.

    Args:
        ids: `[T]` tokens.
        layer, head, position: where the head's output is changed; position among the T.
        values: `[n, V]` changes of the output.
    Returns:
        `[n, vocabulary]` float32, a unit of logit for a unit of change.
    Raises:
        ValueError: places or sizes that the model does not have, or a last block whose output is no plain stream.
    """
    from .models.shared_prefix import Stack

    site = _site(model, layer, head)
    ids = torch.as_tensor(ids)
    if ids.ndim != 1 or not 0 <= position < len(ids):
        raise ValueError(f"position: expected one of {len(ids)} tokens [T], got {position} of {tuple(ids.shape)}")
    if values.ndim != 2 or values.shape[1] != site.V:
        raise ValueError(f"values: expected [n, V={site.V}], got shape {tuple(values.shape)}")
    stack = Stack(model)
    device = model.get_input_embeddings().weight.device
    ids = ids[None, : position + 1].to(device)
    final = stack.last(ids)[0, position]
    return torch.cat([_direct(stack, site, head, ids, final, part) for part in values.split(_ROWS)])


def _direct(stack, site: LayerSite, head: int, ids: Tensor, final: Tensor, values: Tensor) -> Tensor:
    from .models import Stopped
    from .models.seam import intercept, running
    from .ops.rule import RuleOutput

    n, found = len(values), []

    def changed(call, output_final_state):
        out = call.run(output_final_state=output_final_state)
        tangent = torch.zeros_like(out.o)
        frame = running()
        one = frame.head if frame is not None else None  # of a layer that calls once a head
        width = site.num_v_heads if one is None else 1
        if one in (None, head):
            tangent.view(n, ids.shape[1], width, -1)[:, -1, head if one is None else 0] = values.to(tangent)
        return RuleOutput(forward_ad.make_dual(out.o, tangent), out.final_state, None, None)

    def look(module, args, output):
        found.append(forward_ad.unpack_dual(output[0] if isinstance(output, tuple) else output).tangent)
        raise Stopped  # what comes after is skipped, and need not know derivatives

    with forward_ad.dual_level():
        hook = site.module.register_forward_hook(look)
        try:
            calls = dict.fromkeys(stack.sites, _by_op) | {site.layer_index: changed}
            with intercept(stack.model, calls=calls, private=True), contextlib.suppress(Stopped):
                stack.model(input_ids=ids.expand(n, -1), use_cache=False)
        finally:
            hook.remove()
        added = found[0][:, -1].to(final)
        if added.shape[1:] != final.shape:
            raise ValueError(
                f"model: expected one residual stream, got {tuple(final.shape)} a token from the last block of "
                f"{type(stack.model).__name__}, of whose layers each adds {tuple(added.shape[1:])}: no path is direct"
            )
        logits = stack.logits(forward_ad.make_dual(final.expand(n, -1).contiguous(), added))
        return forward_ad.unpack_dual(logits).tangent.float()


# ---- key side -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers_to(
    model,
    tokenizer,
    sae: SAE,
    feature: int | Sequence[int],
    k: int = 10,
    *,
    ids: Tensor | None = None,
    least: int = 3,
    layer: int | None = None,
    head: int | None = None,
):
    """The tokens whose keys lie nearest to an atom's key side, of either sign.

    Args:
        model, tokenizer: the model whose keys they are, and its tokenizer (None leaves numbers for texts).
        sae: a dictionary with outer-product atoms.
        feature: the atom, or several (the model then runs once for all).
        k: how many.
        ids: `[P, T]` tokens of text, whose keys are averaged by token. None: the key of every token of the vocabulary
            as it stands alone behind the first token, which a short convolution sees, too.
        least: keys of text that a token needs to be told.
        layer, head: where the dictionary is from, if it does not say.
    Returns:
        The k tokens with the largest absolute mean cosine, largest first; of several features a list each.
    Raises:
        ValueError: no such feature, or a token the model does not embed.
    """
    from .sae.stream import ModelStream, Passages
    from .text.tokens import first_token

    layer, head = _place(sae, layer, head)
    several = not isinstance(feature, int)
    v = torch.stack([sides(sae, one)[0] for one in ([feature] if isinstance(feature, int) else feature)])
    alone = ids is None
    if ids is None:
        vocabulary = torch.arange(model.get_input_embeddings().weight.shape[0])
        first = None if tokenizer is None else first_token(tokenizer)
        ids = vocabulary[:, None] if first is None else torch.stack([torch.full_like(vocabulary, first), vocabulary], 1)
    size = max(1, 4096 // ids.shape[1])
    total = torch.zeros(len(v), int(model.get_input_embeddings().weight.shape[0]), dtype=torch.float64)
    count = torch.zeros(total.shape[1], dtype=torch.int64)
    with ModelStream(model, Passages(ids), [(layer, head)], batch=size) as stream:
        for part, found in zip(ids.split(size), stream.writes(range(len(ids))), strict=True):
            row, position = (torch.arange(n) for n in part.shape)
            row, position = (row[:, None], position[-1:]) if alone else (row[:, None], position)
            keys, _ = found[layer].native(row, position, head)
            cosine = (normalize(keys.float().cpu(), dim=-1) @ v.cpu().mT).flatten(0, 1)  # [tokens, features]
            token = (part[:, -1:] if alone else part).flatten().long().cpu()
            total.index_add_(1, token, cosine.mT.double())
            count.index_add_(0, token, torch.ones_like(token))
    enough = count >= (1 if alone else least)
    mean = (total / count.clamp_min(1)).masked_fill(~enough, 0)
    out = []
    for one in mean:
        order = one.abs().topk(min(k, int(enough.sum()))).indices.tolist()
        out.append([Answered(i, _text(tokenizer, i), float(one[i]), int(count[i])) for i in order])
    return out if several else out[0]


# ---- other atoms ----------------------------------------------------------------------------------------------------


def describe(
    model,
    tokenizer,
    saes: Mapping[tuple[int, int], SAE],
    features: Mapping[tuple[int, int], Sequence[int]],
    k: int = 6,
    ids: Tensor | None = None,
) -> dict[str, dict[str, dict]]:
    """What reports tell of atoms, ready for JSON: {"LAYER:HEAD": {feature: {promoted, answers_to, neighbours}}}.

    Args:
        saes: dictionaries of sites; features: of each site, those to describe.
        k: how many of each.
        ids: text for `answers_to`.
    Each is a list of `[text, score]` (of neighbours `[feature, cosine]`), `promoted` None where the model has no direct
    path by weights.
    """
    out: dict[str, dict[str, dict]] = {}
    for (layer, head), listed in features.items():
        sae = saes[layer, head]
        keys = answers_to(model, tokenizer, sae, list(listed), k, ids=ids, layer=layer, head=head) if listed else []
        found = out[f"{layer}:{head}"] = {}
        raised: list[list[Promoted] | None] = [None] * len(listed)
        if listed:
            with contextlib.suppress(ValueError):  # no direct path by weights
                out_map = output_map(model, layer, head)
                values = torch.stack([sides(sae, feature)[1] for feature in listed]).to(out_map)
                raised = [_raised(tokenizer, x, k) for x in to_logits(model, values @ out_map)]
        for feature, answers, promoted in zip(listed, keys, raised, strict=True):
            found[str(feature)] = {
                "promoted": None if promoted is None else [[x.text, x.score] for x in promoted],
                "answers_to": [[x.text, x.cosine] for x in answers],
                "neighbours": [[x.feature, x.cosine] for x in neighbours(sae, feature, k)],
            }  # fmt: skip
    return out


@torch.no_grad()
def neighbours(sae: SAE, feature: int, k: int = 10) -> list[Neighbour]:
    """The k other atoms with the largest absolute cosine, `<A_i, A_j> / (|A_i| |A_j|)`, largest first.

    Raises:
        ValueError: no such feature, or a kind of dictionary whose atoms are dense.
    """
    v, w = (x.detach().double() for x in sae.atoms())  # [F, r, *]
    _check_feature(feature, len(v))
    inner = torch.einsum("frk,sk,frv,sv->f", v, v[feature], w, w[feature])
    square = torch.einsum("frk,fsk,frv,fsv->f", v, v, w, w).clamp_min(1e-300)
    cosine = inner / (square * square[feature]).sqrt()
    order = cosine.abs().index_fill(0, torch.tensor([feature], device=v.device), -1).topk(min(k, len(v) - 1)).indices
    return [Neighbour(int(i), float(cosine[i])) for i in order]


def co_firing(firings: Firings, tokens: int | None = None, least: int = 5) -> dict[str, Tensor]:
    """Which pairs of features fire at the same token, and how much more often than they would by chance.

    Args:
        firings: of any sites; a feature is one of its own site.
        tokens: how many tokens were looked at. None: those at which anything fired.
        least: tokens at which a pair has to fire together to be listed.
    Returns:
        Columns `[m]`, one entry a pair, most frequent first: layer, head, feature and other_layer, other_head,
        other_feature (int32), `together` (int64 tokens), `expected` of independent firing (float64), `lift`, together /
        expected, and `jaccard`, together / tokens at which either fires.
    Raises:
        ValueError: a feature that fires twice at a token, or fewer tokens than fired.
    """
    place = _codes(firings.row, firings.position)[1]
    atoms, atom = _codes(firings.layer, firings.head, firings.feature)
    order = torch.argsort(place * max(1, len(atoms)) + atom)
    place, atom = place[order], atom[order]
    if bool(((place.diff() == 0) & (atom.diff() == 0)).any()):
        raise ValueError("firings: expected a feature to fire once at a token, got one that fires twice")
    seen = int(place[-1]) + 1 if len(place) else 0
    if tokens is not None and tokens < seen:
        raise ValueError(f"tokens: expected at least the {seen} at which something fired, got {tokens}")
    pairs, counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    for step in range(1, len(place)):  # the step-th next firing of the same token
        same = place[step:] == place[:-step]
        if not bool(same.any()):
            break
        key = atom[:-step][same] * len(atoms) + atom[step:][same]
        every, of = torch.unique(torch.cat([pairs, key]), return_inverse=True)
        weight = torch.cat([counts, torch.ones_like(key)])
        pairs, counts = every, torch.zeros_like(every).index_add_(0, of, weight)
    kept = counts >= least
    pairs, counts = pairs[kept], counts[kept]
    order = torch.argsort(counts, descending=True, stable=True)
    pairs, counts = pairs[order], counts[order]
    alone = torch.bincount(atom, minlength=len(atoms))
    one, other = (pairs // max(1, len(atoms)), pairs % max(1, len(atoms)))
    expected = alone[one].double() * alone[other].double() / max(1, tokens or seen)
    names = ("layer", "head", "feature")
    sides = {**dict(zip(names, atoms[one].T.int(), strict=True)),
             **dict(zip((f"other_{x}" for x in names), atoms[other].T.int(), strict=True))}  # fmt: skip
    either = alone[one] + alone[other] - counts
    return {**sides, "together": counts, "expected": expected, "lift": counts / expected, "jaccard": counts / either}


def _codes(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct rows `[m, columns]` int64, the number of each entry's `[n]`)."""
    rows, of = torch.unique(torch.stack([x.long().cpu() for x in columns], 1), dim=0, return_inverse=True)
    return rows, of

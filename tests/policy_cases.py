"""Policies against a slow reference: the whole prefix once more for every token and layer, states and codes dense.

It knows nothing of the walk: what a policy does at a token is decided here from the state as the token reads it, and
given to the next run as edits of that position.
"""

from __future__ import annotations

import inspect

import torch
from tiny_models import tokens

from writesae import SAE, Clamp, Edits, Erase, Install, Scale, attach
from writesae.models import layers

F, TOP = 24, 3
SOME = range(0, F, 2)  # features of which one fires at most tokens, but not at all


def dictionary(site, head, seed=0, **kwargs):
    """A random `SAE` whose encoder is near its decoder and not the same."""
    sae = SAE(site.K, site.V, kwargs.pop("F", F), k=TOP, layer=site.layer_index, head=head, **kwargs)
    g = torch.Generator().manual_seed(1000 * site.layer_index + 10 * head + seed)
    for name, p in sae.named_parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.05 if name in ("b_enc", "bias") else 1)
    if sae.kind == "bilinear":
        for mine, other in ((sae.v_enc, sae.v_dec), (sae.w_enc, sae.w_dec)):
            mine.data = other.data + 0.3 * mine.data
    if sae.threshold is not None:
        sae.threshold += 0.5
    return sae.requires_grad_(False)


def some_sites(model, **kwargs):
    """Dictionaries of the first and last head of the model's first such layer, and the first of its last."""
    found = layers(model)
    places = [(found[0], 0), (found[0], found[0].num_v_heads - 1), (found[-1], 0)]
    return {(site.layer_index, head): dictionary(site, head, **kwargs) for site, head in places}


def dense(sae, state):
    """Pre-activations `[F]` of one state `[K, V]`, in float64."""
    v, w, b = (x.double() for x in sae.encoder())
    return torch.einsum("frk,kv,frv->f", v, state.double(), w) + b


def coded(sae, state):
    """Codes `[F]`, zero where nothing fires."""
    pre = dense(sae, state)
    if sae.threshold is not None:
        return torch.where(pre > sae.threshold, pre, 0)
    top = pre.topk(sae.k)
    return torch.zeros_like(pre).scatter(0, top.indices, top.values.relu())


def decided(policy, sae, site, position, state, left, right):
    """[(left, right, kind)] of one policy at one token: its definition once more."""
    listed = policy.features
    features = listed.get((sae.layer, sae.head), ()) if isinstance(listed, dict) else listed
    codes, v, w = coded(sae, state), *(x.double() for x in sae.atoms())
    if isinstance(policy, Install):
        if position not in policy.positions:
            return []
        return [(policy.magnitude * left * right.norm(), site.direction(policy.token), "add")]
    fire = [i for i in features if codes[i] > 0]
    if isinstance(policy, Erase) and policy.what == "write":
        return [(left * 0, right * 0, "delete")] if fire else []
    if isinstance(policy, Clamp):
        at = list(features) if policy.always else fire
        if not at:
            return []
        ve, we, _ = (x.double() for x in sae.encoder())
        atoms = torch.einsum("frk,frv->fkv", v, w)[at]
        gram = torch.einsum("irk,jkv,irv->ij", ve[at], atoms, we[at])
        dose = torch.linalg.solve(gram, policy.value - dense(sae, state)[at])
        parts = zip(at, dose.tolist(), strict=True)
    else:
        factor = 0.0 if isinstance(policy, Erase) else policy.factor
        parts = ((i, float((factor - 1) * codes[i])) for i in fire)
    return [(c * v[i, r], w[i, r], "add") for i, c in parts for r in range(sae.r)]


class Reference:
    """edits: `{layer: Edits}` found; logits: `[B, T, vocabulary]`; applied: `{policy: count}`; codes: `{(row, position,
    layer, head): [F]}` of states as tokens read them."""

    def __init__(self, model, ids, saes, policies, mask=None):
        self.model, self.ids, self.saes, self.mask = model, ids, saes, mask
        sites = {site.layer_index: site for site in layers(model)}
        found: dict[int, list] = {}
        self.applied = dict.fromkeys(range(len(policies)), 0)
        # Some models take no row of pads alone. What comes after a token does not change it.
        least = 1 if mask is None else 1 + int(mask.long().argmax(1).max())
        for t in range(ids.shape[1]):
            for layer in sorted({ell for ell, _ in saes}):
                writes = self.run(max(t + 1, least), found)[1].writes[layer]
                states = writes.states([t], read=True)[:, 0]
                for b in range(len(ids)):
                    if mask is not None and not mask[b, t]:
                        continue
                    for (ell, head), sae in saes.items():
                        if ell != layer:
                            continue
                        left, right = (x.double() for x in writes.native(b, t, head))
                        for i, policy in enumerate(policies):
                            if policy.sites is not None and (ell, head) not in policy.sites:
                                continue
                            wrapped = _Site(model, sites[layer], head)
                            edits = decided(policy, sae, wrapped, t, states[b, head], left, right)
                            self.applied[i] += bool(edits)
                            for p, q, kind in edits:
                                found.setdefault(layer, []).append((b, t, head, p, q, kind, _when(policy)))
        self.edits = {ell: _edits(x) for ell, x in found.items()}
        out, tap = self.run(ids.shape[1], found)
        self.logits, self.codes = out.logits, {}
        for (ell, head), sae in saes.items():
            states = tap.writes[ell].states(range(ids.shape[1]), read=True)
            for b in range(len(ids)):
                for t in range(ids.shape[1]):
                    if mask is None or mask[b, t]:
                        self.codes[b, t, ell, head] = coded(sae, states[b, t, head])

    def run(self, length, found):
        edits = {ell: _edits(x) for ell, x in found.items()}
        with attach(self.model, dict.fromkeys(self.saes), edits=edits, self_test=False) as tap:
            mask = {} if self.mask is None else {"attention_mask": self.mask[:, :length]}
            if "position_ids" in inspect.signature(self.model.forward).parameters and self.mask is not None:
                mask["position_ids"] = (self.mask[:, :length].cumsum(-1) - 1).clamp_min(0)
            return self.model(self.ids[:, :length], use_cache=False, **mask), tap

    def check_firings(self, firings, limit=1e-4):
        """What a tap saw, against the dense codes: every token, as it read the state."""
        got = {key: torch.zeros(F, dtype=torch.float64) for key in self.codes}
        for row in zip(*(x.tolist() for x in firings.columns().values()), strict=True):
            b, t, ell, head, feature, value = row
            assert got[b, t, ell, head][feature] == 0, f"twice: {row}"
            got[b, t, ell, head][feature] = value
        scale = max(1.0, max(float(x.max()) for x in self.codes.values()))
        worst = max(float((got[key] - x).abs().max()) for key, x in self.codes.items())
        assert worst <= limit * scale, worst
        return worst / scale


class _Site:
    def __init__(self, model, site, head):
        self.model, self.site, self.head = model, site, head

    def direction(self, token):
        V = self.site.V
        mine = self.site.out_proj.weight[:, self.head * V : (self.head + 1) * V].double()
        found = mine.T @ self.model.get_output_embeddings().weight[token].double()
        return found / found.norm()


def _when(policy):
    return policy.read


def _edits(found):
    row, position, head, left, right, kind, when = zip(*found, strict=True)
    return Edits(row, position, head, torch.stack(left).float(), torch.stack(right).float(), list(kind), list(when))


# ---- generating ----------------------------------------------------------------------------------------------------


def padded(rows=2, length=7, pads=3):
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    ids[0, :pads], mask[0, :pads] = 0, 0
    return ids, mask


def generated(model, ids, mask, saes, policies, new=5, **kwargs):
    with attach(model, saes, policies=policies, self_test=False, strict=True) as tap:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True, **kwargs,
        )  # fmt: skip
    return out, tap


def check(model, ids, mask, saes, policies, new=5, **kwargs):
    """Generates; then goes over the text that came out by the reference. The last token chosen is never fed."""
    out, tap = generated(model, ids, mask, saes, policies, new, **kwargs)
    text = out.sequences[:, :-1]
    whole = torch.cat([mask, mask.new_ones(len(mask), new - 1)], 1)
    reference = Reference(model, text, saes, policies, whole)
    assert [r.total for r in tap.policies] == list(reference.applied.values())
    worst = reference.check_firings(tap.firings)
    theirs = reference.logits[:, ids.shape[1] - 1 :]
    ours = torch.stack(out.logits, 1)
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= 1e-4 * max(scale, 1)
    if not kwargs.get("do_sample"):
        assert torch.equal(theirs.argmax(-1), out.sequences[:, ids.shape[1] :])
    return worst


def mixed(saes):
    first, *_, third = saes
    second = list(saes)[len(saes) // 2]  # a model of one head has two sites
    return [
        Erase({first: SOME}), Scale({second: SOME}, 1.5, read="before"), Clamp({third: [3]}, 0.7, always=True),
        Scale({third: SOME}, -0.5),
    ]  # fmt: skip

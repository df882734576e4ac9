"""Install: does writing a token's direction into the memory of a prompt make the model say that token?

At the last positions of a prompt `m ||N||_F k_t w*^T` is added to the state of one head, or of all heads of the last
recurrent layers: N and k_t are the native write and its key in the clean pass, `w* = W_O[head]^T W_U[token]`, k_t and
w* at unit length. Then tokens are generated greedily. A pair (prompt, token) counts if the token is among them. Beside
it stand the model as it is, and the same with another token's direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..edits import Edits
from ..experiments.statistics import proportion
from ..models.attach import attach
from ..models.directions import token_directions
from ..models.sites import layers
from . import forks
from .lab import Lab, Site
from .measures import above, mean, percent
from .study import Answer, Claim, Figure, Findings, Setting, Study
from .tokens_by_rank import STRATA, bounds, by_rank, semantic

_LATER = (20, 128)  # tokens after the prompt, among which a semantic target is sought
_BATCH = 64  # texts that are generated at once


def run(lab: Lab) -> Findings:
    places = _places(lab)
    pairs = lab.unit("pairs", lambda: _pairs(lab))
    if not len(pairs["prompt"]):
        raise ValueError("vocabulary: expected tokens of the strata's ranks, got none")
    prompts = lab.whole("test", lab["prompts"], lab["prompt"] + _LATER[1])[:, : lab["prompt"]]
    runs = [(where, m, way) for where in places for m in lab["magnitudes"] for way in ("edited", "control")]
    native = lab.unit("native", lambda: {"said": _said(lab, prompts, pairs, None, 0.0, "native")})["said"]
    found = lab.units(
        [" ".join(map(str, key)) for key in runs],
        lambda key: {"said": _one(lab, prompts, pairs, places, key)}, "generate",
    )  # fmt: skip
    said = {key: x["said"] for key, x in zip(runs, found, strict=True)}
    statistics: dict[str, Any] = {
        "pairs": len(native), "prompts": len(np.unique(pairs["prompt"])), "generated": lab["generated"],
        "strata": {**{k: list(v) for k, v in bounds(_vocabulary(lab)).items()},
                   "semantic": f"used by the text {_LATER[0]} to {_LATER[1]} tokens after the prompt, not in it"},
        "places": {name: [f"{layer}:{head}" for layer, head in sites] for name, sites in places.items()},
        "native": _by_stratum(lab, native, pairs),
    }  # fmt: skip
    for where in places:
        statistics[where] = {
            f"{m:g}": {way: _by_stratum(lab, said[where, m, way], pairs) for way in ("edited", "control")}
            | {"less_native": _difference(lab, said[where, m, "edited"], native, pairs),
               "less_control": _difference(lab, said[where, m, "edited"], said[where, m, "control"], pairs)}
            for m in lab["magnitudes"]
        }  # fmt: skip
    rows = {**pairs, "stratum": np.array(STRATA)[pairs["stratum"]], "native": native}
    rows |= {f"{where.replace(' ', '_')}_{m:g}_{way}": x for (where, m, way), x in said.items()}
    return Findings(statistics, {"pairs": rows}, _figures(statistics, lab["magnitudes"]), _answers(lab, statistics), [
        f"Ranks are of the model's own next token, as a share of the vocabulary of {_vocabulary(lab):,}: the paper's "
        "100 and 1,000 of 248,320.",
        "Each (prompt, token) is counted once; the paper's n counts each of its pairs at five positions.",
        "Additions are made before their token reads the state, all at once, with keys and norms of the clean pass.",
        f"A token is installed where it is among the {lab['generated']} that follow, generated greedily.",
    ])  # fmt: skip


def _vocabulary(lab: Lab) -> int:
    return lab.model.get_output_embeddings().weight.shape[0]


def _places(lab: Lab) -> dict[str, list[Site]]:
    """{name: heads that are written to}."""
    first = next(iter({**lab.saes, **lab.writes}))
    last = layers(lab.model)[-lab["layers"] :]
    return {"one head": [first],
            "all heads": [(site.layer_index, head) for site in last for head in range(site.num_v_heads)]}  # fmt: skip


def _pairs(lab: Lab) -> dict[str, np.ndarray]:
    """prompt, token, stratum (number in STRATA), rank, and other: the control's token."""
    rng = lab.rng("install")
    texts = lab.whole("test", lab["prompts"], lab["prompt"] + _LATER[1])
    ranks = bounds(_vocabulary(lab))
    barred = set(lab.tokenizer.all_special_ids) | set(range(len(lab.tokenizer), _vocabulary(lab)))
    out: dict[str, list] = {name: [] for name in ("prompt", "token", "stratum", "rank")}
    device = lab.model.get_input_embeddings().weight.device
    for lo in range(0, len(texts), _BATCH):
        part = texts[lo : lo + _BATCH]
        with torch.no_grad():
            logits = lab.model(input_ids=part[:, : lab["prompt"]].to(device), use_cache=False).logits[:, -1]
        for i, (text, here) in enumerate(zip(part.numpy(), logits.float().cpu(), strict=True)):
            seen = barred | set(text[: lab["prompt"]].tolist())
            for number, stratum in enumerate(STRATA):
                if stratum == "semantic":
                    token = semantic(text[lab["prompt"] + _LATER[0] :], here, seen, rng)
                else:
                    token = by_rank(here, *ranks[stratum], barred, rng)
                if token >= 0:
                    for name, x in zip(out, (lo + i, token, number, int((here > here[token]).sum())), strict=True):
                        out[name].append(x)
    found = {name: np.array(column, int) for name, column in out.items()}
    # The control's token: another one that is asked for, of the same stratum.
    found["other"] = found["token"].copy()
    for number in range(len(STRATA)):
        mine = np.flatnonzero(found["stratum"] == number)
        found["other"][mine] = np.roll(found["token"][mine], 1)
    return forks.some(found, found["other"] != found["token"])


def _one(lab: Lab, prompts: Tensor, pairs: Mapping[str, np.ndarray], places: Mapping, key: str) -> np.ndarray:
    first, second, m, way = key.split()
    return _said(lab, prompts, pairs, places[f"{first} {second}"], float(m), way)


def _said(
    lab: Lab, prompts: Tensor, pairs: Mapping[str, np.ndarray], where: list[Site] | None, m: float, way: str
) -> np.ndarray:
    """`[n]`: whether each pair's token is among those generated."""
    out = np.zeros(len(pairs["prompt"]), bool)
    written = pairs["other"] if way == "control" else pairs["token"]
    device = lab.model.get_input_embeddings().weight.device
    for lo in range(0, len(out), _BATCH):
        index = np.arange(lo, min(lo + _BATCH, len(out)))
        ids = prompts[torch.from_numpy(pairs["prompt"][index])].to(device)
        if where is None:
            text = _generate(lab, ids)
        else:
            edits = install_edits(lab.model, ids, written[index], where, m, lab["positions"])
            sites: dict = dict.fromkeys(where)
            with attach(lab.model, sites, edits, record_writes=False):
                text = _generate(lab, ids)
        out[index] = (text.cpu().numpy() == pairs["token"][index][:, None]).any(1)
    return out


def _generate(lab: Lab, ids: Tensor) -> Tensor:
    pad = lab.model.generation_config.pad_token_id
    pad = lab.model.generation_config.eos_token_id if pad is None else pad
    pad = pad[0] if isinstance(pad, list) else pad
    with torch.no_grad():
        text = lab.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=lab["generated"], pad_token_id=0 if pad is None else pad)  # fmt: skip
    return text[:, ids.shape[1] :]


def install_edits(
    model, ids: Tensor, token: np.ndarray, where: list[Site], m: float, positions: int
) -> dict[int, Edits]:
    """{layer: edits} that write the direction of `token [n]` at the last positions of the prompts `ids [n, T]`."""
    sites: dict = dict.fromkeys(where)
    known = {site.layer_index: site for site in layers(model)}
    with torch.no_grad(), attach(model, sites) as tap:
        model(input_ids=ids, use_cache=False)
    n, T = ids.shape
    row = torch.arange(n).repeat_interleave(positions)
    position = torch.arange(T - positions, T).repeat(n)
    parts: dict[int, list[Edits]] = {}
    for layer, head in where:
        left, right = (x.detach().float().cpu() for x in tap.writes[layer].native(row, position, head))
        size = left.norm(dim=1, keepdim=True) * right.norm(dim=1, keepdim=True)
        value = token_directions(model, known[layer], head, token.tolist()).cpu()
        edits = Edits.add(row, position, head, m * size * normalize(left, dim=1),
                          value.repeat_interleave(positions, 0), when="before")  # fmt: skip
        parts.setdefault(layer, []).append(edits)
    return {layer: Edits.cat(found) for layer, found in parts.items()}


# ---- statistics ---------------------------------------------------------------------------------------------------


def _by_stratum(lab: Lab, said: np.ndarray, pairs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    out = {}
    for name, mask in (("all", np.ones(len(said), bool)),
                       *((s, pairs["stratum"] == i) for i, s in enumerate(STRATA))):  # fmt: skip
        if mask.any():
            prompts = mean(said[mask], pairs["prompt"][mask], "prompt", lab.seed)
            out[name] = {**proportion(said[mask], "pairs whose token is generated, Wilson 95 % interval"),
                         "by_prompt": prompts["ci95"]}  # fmt: skip
    return out


def _difference(lab: Lab, said: np.ndarray, other: np.ndarray, pairs: Mapping[str, np.ndarray]) -> dict:
    return mean(said.astype(float) - other, pairs["prompt"], "prompt", lab.seed)


def _answers(lab: Lab, statistics: dict[str, Any]) -> list[Answer]:
    out = []
    for claim, where in (("install.one_head", "one head"), ("install.all_heads", "all heads")):
        best = f"{max(lab['magnitudes']):g}"
        found = statistics[where][best]
        edited, control, native = found["edited"]["all"], found["control"]["all"], statistics["native"]["all"]
        verdicts = {above(found[name]["ci95"], 0) for name in ("less_native", "less_control")}
        verdict = next(v for v in ("does not hold", "cannot be told", "holds") if v in verdicts)
        out.append(Answer(
            claim, f"{100 * native['rate']:.1f} % → {100 * edited['rate']:.1f} % at m = {best}", edited["n"],
            "(prompt, token) pairs", percent(edited["by_prompt"]),
            f"another token's direction: {100 * control['rate']:.1f} %; edited less control "
            f"{100 * found['less_control']['mean']:+.1f} points", verdict,
        ))  # fmt: skip
    return out


def _figures(statistics: dict[str, Any], magnitudes) -> dict[str, Figure]:
    best = f"{max(magnitudes):g}"
    bars = [("native", "native", statistics["native"].get)]
    for where, colour, pale in (("one head", "previous", "mean"), ("all heads", "atom", "delete")):
        found = statistics[where][best]
        bars += [(where, colour, found["edited"].get), (f"{where}, another token", pale, found["control"].get)]
    shown = [s for s in ("all", *STRATA) if s in statistics["native"]]

    def paint(axes, colours):
        for j, (label, colour, get) in enumerate(bars):
            for i, stratum in enumerate(shown):
                found, at = get(stratum), i + 0.16 * (j - 2)
                axes.bar(at, 100 * found["rate"], 0.15, color=colours[colour], label=label if not i else None)
                axes.plot([at] * 2, [100 * x for x in found["ci95"]], color=colours["line"], lw=1)
        axes.set_xticks(range(len(shown)), shown)
        axes.set(ylabel=f"token generated, % of pairs (m = {best})")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.45)
        axes.set_yticks([y for y in axes.get_yticks() if y <= 100])
        axes.legend(fontsize=7.5, ncols=2, loc="upper left")

    return {"install": Figure(paint, "How often the token that was written is generated, by its native rank, beside "
                              "the model as it is and another token's direction; Wilson 95 % intervals.")}  # fmt: skip


STUDY = Study(
    "install", "Install a token",
    "Writes a token's direction into the memory at the last positions of a prompt, in one head or in all heads of the "
    "last recurrent layers, and counts how often the model then says that token within some greedily generated ones.",
    (
        Claim("install.one_head", "Writes to one head install a token.", "33.3 % → 100 % (mid ranks, m = 3)",
              "other model; the paper's n = 300 is 60 pairs at 5 positions each; it has no control of another token"),
        Claim("install.all_heads", "Writes to all heads of a layer or two install a token.", "–",
              "not in the paper, which writes to one head"),
    ),
    {
        "prompts": Setting(96, 12, "prompts, with a token of each stratum each"),
        "prompt": Setting(48, 32, "tokens of a prompt"),
        "positions": Setting(3, 3, "last positions that are written to"),
        "layers": Setting(2, 2, "last recurrent layers of which all heads are written to"),
        "magnitudes": Setting((1.5, 3.0, 6.0), (6.0,), "m: norm of a write, in units of the native one's"),
        "generated": Setting(20, 20, "tokens generated"),
    },
    run,
    needs="",
)  # fmt: skip

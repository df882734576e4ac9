"""Features of a collection as Neuronpedia takes them, and as sae-dashboard keeps them (whose files Neuronpedia reads).

    OUT/5-writesae-h3/batch-0000.json, ...        # at most 128 features each

`neuronpedia`: each file is the body of one POST to `/api/feature/upload-batch`. Source: neuronpedia 1.2.1,
`requests/feature_request.py` and `examples/upload_features.ipynb`. `sae-dashboard`: each file is a
`NeuronpediaDashboardBatch`. Source: sae-dashboard 0.8.0, `neuronpedia/neuronpedia_dashboard.py` and
`neuronpedia_converter.py`. Nothing is sent anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..browse.sources import require_own, vocabulary
from ..browse.words import Words
from ..collect import Store
from ..files import write_json
from ..progress import tqdm
from ..untrusted import is_integer, shown
from .features import Feature, Level, most_frequent, pages, promoter
from .stored import chosen_sites, firings, model_name, open_store, passages

BATCH = 128  # features of one upload, at most
FORMATS = ("neuronpedia", "sae-dashboard")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")  # of addresses and folders


def source_name(layer: int, head: int, name: str) -> str:
    """What Neuronpedia calls the dictionary of a site: `<layer>-<name of the set>`, a set for each head."""
    return f"{layer}-{name}-h{head}"


def export(
    store: Store | str | Path,
    out: str | Path,
    layout: str = "neuronpedia",
    sites: Iterable[tuple[int, int]] | None = None,
    features: int | None = None,
    model: str | None = None,
    name: str = "writesae",
    width: int = 16,
    writes: tuple[Any, Mapping[tuple[int, int], Any]] | None = None,
    progress: bool = False,
) -> dict:
    """Writes the features of a finished collection of mode "all" that fired.

    Args:
        store: the collection, or its folder. out: a folder, made if it is not there.
        layout: "neuronpedia" or "sae-dashboard".
        sites: (layer, head)s; all by default.
        features: of a site at most so many, the most frequent ones; all that fired by default.
        model: what Neuronpedia calls the model; by default as the collection calls it, without its owner.
        name: of the set of dictionaries.
        width: tokens shown either side of a firing.
        writes: (model, {(layer, head): dictionary}), from which the promoted tokens come; None leaves them out.
    Returns:
        {features, files, sites}.
    Raises:
        ValueError: an unfinished collection or one of another mode, without tokens that can be decoded, a site it or
            `writes` does not have, an argument out of range, a damaged file by name.
    """
    store, out = open_store(store), Path(out)
    wanted = chosen_sites(store, sites)
    if layout not in FORMATS:
        raise ValueError(f"layout: expected {' or '.join(FORMATS)}, got {shown(layout)}")
    for argument, value in (("features", 1 if features is None else features), ("width", width)):
        if not is_integer(value, 1, 2**31):
            raise ValueError(f"{argument}: expected a whole number >= 1, got {shown(value)}")
    model = model_name(store).rpartition("/")[2] if model is None else model
    for argument, text in (("model", model), ("name", name)):
        if not _NAME.fullmatch(text):
            raise ValueError(f"{argument}: expected letters, digits and _ . + -, got {shown(text)}")
    words, where = vocabulary(store), passages(store, progress=progress)
    if not len(words):
        raise ValueError(f"tokenizer: expected one in {store.path}, whose tokens can be shown as text, got none")
    made = {"features": 0, "files": 0, "sites": len(wanted)}
    for layer, head in wanted:
        found = firings(store, layer, head, where, progress)
        promotes = None if writes is None else _promotes(store, words, writes, layer, head)
        chosen, folder = most_frequent(found, features), out / source_name(layer, head, name)
        folder.mkdir(parents=True, exist_ok=True)
        shown_pages = pages(found, where, words, chosen, width=width, promotes=promotes)
        with tqdm(total=len(chosen), desc=folder.name, unit="feature", disable=not progress, leave=False) as bar:
            for number, start in enumerate(range(0, len(chosen), BATCH)):
                batch: list[Feature] = []
                body: dict[str, Any]
                for _ in chosen[start : start + BATCH]:
                    batch.append(next(shown_pages))
                    bar.update()
                if layout == "neuronpedia":
                    body = {"modelId": model, "source": folder.name, "features": [for_neuronpedia(x) for x in batch]}
                else:
                    about = {"n_prompts_total": len(where.tokens), "n_tokens_in_prompt": store.context,
                             "dataset": store.path.name}  # fmt: skip
                    body = {
                        "model_id": model, "layer": layer, "sae_set": f"{name}-h{head}", "sae_id_suffix": None,
                        "features": [{**for_sae_dashboard(x), **about} for x in batch],
                    }  # fmt: skip
                write_json(folder / f"batch-{number:04d}.json", body, out, indent=None)
                made["files"] += 1
        made["features"] += len(chosen)
    return made


def _promotes(store: Store, words: Words, writes: tuple, layer: int, head: int) -> Callable[[list[int]], list[tuple]]:
    model, dictionaries = writes
    if (layer, head) not in dictionaries:
        raise ValueError(f"sae: expected a dictionary for {layer}:{head}, got none")
    sae = dictionaries[layer, head]
    require_own(store, sae, (layer, head))
    return promoter(model, words, sae, layer, head)


def for_neuronpedia(feature: Feature) -> dict:
    """A feature in an upload; a level of activations is a quantile there."""
    return {
        "index": feature.index, "density": feature.density,
        "activations": [
            {"tokens": shown.tokens, "values": shown.values, "quantileMax": level.high, "quantileMin": level.low,
             "quantileFraction": level.share}
            for level in feature.levels for shown in level.shown
        ],
        "explanations": [],
        "topLogits": _logits(feature.promoted), "bottomLogits": _logits(feature.suppressed),
    }  # fmt: skip


def _logits(found) -> list[dict] | None:
    return None if found is None else [{"token": x.token, "value": x.value} for x in found]


def for_sae_dashboard(feature: Feature) -> dict:
    """A feature in a batch; what it has no counterpart for (neurons, vectors) stays empty."""

    def bounds(level: Level) -> dict:
        if level.top:  # how sae-dashboard marks them
            return {"bin_min": -1, "bin_max": level.high, "bin_contains": -1}
        return {"bin_min": level.low, "bin_max": level.high, "bin_contains": level.share}

    promoted, suppressed = feature.promoted or [], feature.suppressed or []
    middles, heights = feature.logits or ([], [])
    return {
        "feature_index": feature.index, "frac_nonzero": feature.density,
        "pos_str": [x.token for x in promoted], "pos_values": [x.value for x in promoted],
        "neg_str": [x.token for x in suppressed], "neg_values": [x.value for x in suppressed],
        "freq_hist_data_bar_values": feature.histogram[0], "freq_hist_data_bar_heights": feature.histogram[1],
        "logits_hist_data_bar_values": middles, "logits_hist_data_bar_heights": heights,
        "activations": [
            {**bounds(level), "tokens": x.tokens, "values": x.values, "qualifying_token_index": x.at}
            for level in feature.levels for x in level.shown
        ],
    }  # fmt: skip

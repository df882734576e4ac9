"""`sample_store`: a store, and dictionaries for it, made in seconds: for tests and benchmarks of the browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import entry, make_folder, write_json, write_sealed

HOSTILE = (
    "<script>document.title='ran'</script>", "</script><img src=x onerror=alert(1)>", "\u202egnp.exe\u2066",
    "a\x00\x1b[31mb", "{{7*7}}${7*7}", "'\"&<>`", "\ufeff\u2028\u2029", "__proto__",
)  # fmt: skip
_BYTES = 256


def sample_store(
    folder: str | Path,
    sites=((0, 0), (1, 0)),
    F: int = 64,
    firings: int = 10_000,
    seed: int = 0,
    *,
    k: int = 8,
    mode: str = "all",
    n: int = 100,
    context: int = 512,
    shard: int = 500_000,
    K: int = 16,
    V: int = 24,
    dictionaries: bool = True,
    hostile: bool = False,
) -> tuple[Path, Path | None]:
    """A finished collection in `folder/firings`, and its dictionaries in `folder/sae/L*H*`; returns both paths.

    The text is bytes, a token each; which features fire is drawn, the frequent ones by a power law, more often on some
    tokens than on others. Nothing of a model is in it.

    Args:
        sites: (layer, head). F: features of each. firings: of all sites together, at least one passage's.
        k: that fire a token and site. mode, n, context: of the collection. shard: firings of a part.
        K, V: sizes of the dictionaries' atoms. dictionaries: False makes none.
        hostile: sources, tokens, names and numbers that a page must survive.
    """
    from ..collect import finish as finishing
    from ..collect import manifest
    from ..collect.marks import mark
    from ..collect.modes import Features, Selection
    from ..collect.shard import Progress, Shard
    from ..collect.source import Site
    from ..text.passages import Cursor, DocumentEnd, Passage

    if k > F:
        raise ValueError(f"k: expected k <= F={F}, got {k}")
    rng, folder = np.random.default_rng(seed), Path(folder)
    out = make_folder(folder, "firings")
    sites = sorted((int(a), int(b)) for a, b in sites)
    passages = max(1, round(firings / (k * len(sites) * context)))
    each = max(1, round(shard / (k * len(sites) * context)))  # passages a shard
    content = {
        "shard_passages": each, "estimate": None, "mode": mode, "n": n, "seed": seed, "context": context, "batch": 4,
        "max_tokens": None, "bos": None, "corpus": {"name": "sample", "sha256": "0" * 64}, "tokenizer": {"sha256": ""},
        "source": {"model": HOSTILE[0] if hostile else "sample"}, "sites": [[a, b, F, k] for a, b in sites],
        "named": {"model": HOSTILE[0] if hostile else "sample", "tokenizer": HOSTILE[1] if hostile else "bytes"},
    }  # fmt: skip
    manifest.make(out, content)
    for name in ("firings", "tokens", "documents", "counts", "done", "index", "tokenizer"):
        make_folder(out, name)
    manifest.restore(out)
    _, digest = manifest.check(out, {})
    path = out / "tokenizer" / "tokenizer.json"
    write_json(path, _tokenizer(hostile), out)
    mark(out, "tokenizer", [path], digest)

    features = Features([Site(a, b, F, k) for a, b in sites])
    state = Progress(out, features, None if mode == "all" else Selection(n, features.total, mode, seed), digest)
    weight = 1.0 / (1 + np.arange(F)) ** 0.7
    weight /= weight.sum()
    per_document, made, cursor = 8, 0, Cursor()
    while made < passages:
        part = Shard(state.shards, last=made + each >= passages)
        for number in range(made, min(made + each, passages)):
            document, row = divmod(number, per_document)
            tokens = _text(rng, context, hostile)
            at = (number + 1) * context
            cursor = Cursor((0, 0, 0), document, row + 1, passages=number + 1, tokens=at)
            part.passages.append(Passage(document, row, tokens, cursor))
            if row + 1 == per_document or number + 1 == passages:
                source = HOSTILE[document % len(HOSTILE)] if hostile else f"document-{document}.txt"
                length = (row + 1) * context
                part.ends.append(
                    DocumentEnd(document, source, None, length, row + 1, number - row)
                )  # fmt: skip
        made += len(part.passages)
        part.stored = _fired(rng, part.passages, features, F, k, weight, hostile)
        state.write(part)
    finishing.finish(state, n, lambda: None)
    integrity = {
        "manifest": digest, "shards": state.digest,
        "files": {name: entry(out / name) for name in ("documents.parquet", "features.parquet")},
    }  # fmt: skip
    sums = {"complete": True, "shards": state.shards, "tokens": state.tokens, "firings": state.firings}
    write_sealed(out / "summary.json", {**sums, "documents": state.documents, "integrity": integrity})
    if not dictionaries:
        return out, None
    return out, _dictionaries(folder / "sae", sites, F, K, V, k, rng, hostile)


def _tokenizer(hostile: bool) -> dict:
    """A tokenizer of bytes as `tokenizers` writes it; hostile: special tokens of HOSTILE behind them."""
    from .words import BYTE_OF

    vocabulary = {character: byte for character, byte in sorted(BYTE_OF.items(), key=lambda item: item[1])}
    added = [
        {"id": _BYTES + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, text in enumerate(HOSTILE)
    ] if hostile else []  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": vocabulary, "merges": []}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}  # fmt: skip


def _text(rng, length: int, hostile: bool) -> np.ndarray:
    """`[length]` int32 bytes of something that looks like code, with letters of several bytes."""
    words = ["def", "return", "self", "for", "naïve", "x += 1", "東京", "if", "else:", "print(“hi”)"]
    text = ""
    while len(text) < length:
        text += rng.choice(words) + rng.choice([" ", " ", "\n    ", "\n", "\t"])
    tokens = np.frombuffer(text.encode(), np.uint8)[:length].astype(np.int32)
    if hostile:
        at = rng.random(length) < 0.05
        tokens[at] = _BYTES + rng.integers(0, len(HOSTILE), int(at.sum()))
    return tokens


def _fired(rng, passages, features, F: int, k: int, weight, hostile: bool):
    """Firings of a shard, sorted as a collection's are."""
    from ..collect.modes import Columns

    token = np.concatenate([p.tokens for p in passages])
    lengths = [len(p.tokens) for p in passages]
    document = np.repeat(np.array([p.document for p in passages], np.int32), lengths)
    row = np.repeat(np.array([p.row for p in passages], np.int32), lengths)
    position = np.concatenate([np.arange(x, dtype=np.int32) for x in lengths])
    total, cumulative = len(token), np.cumsum(weight)
    parts = []
    for s in range(len(features.sites)):
        # One feature of each residue mod k at most, so that none fires twice; the token decides half of the time.
        drawn = np.searchsorted(cumulative, rng.random((total, k)) * cumulative[-1]).clip(0, F - 1)
        own = (token[:, None] * 31 + np.arange(k) * 7 + s) % F
        feature = np.where(rng.random((total, k)) < 0.5, own, drawn)
        feature = (feature // k * k + np.arange(k)) % (F - F % k)
        parts.append((features.first[s] + feature).reshape(-1))
    key = np.concatenate(parts)
    place = np.tile(np.repeat(np.arange(total), k), len(parts))
    activation = rng.gamma(2.0, 1.0, len(key)).astype(np.float32) + np.float32(1e-3)
    if hostile:  # that no encoder gives
        for odd, number in ((5, np.nan), (6, np.inf), (7, 3e38)):
            activation[np.flatnonzero(key % F == odd)[:3]] = number
    order = np.argsort(key * np.int64(total) + place, kind="stable")
    key, place, activation = key[order], place[order], activation[order]
    return Columns(key, document[place], row[place], position[place], activation)


def _dictionaries(folder: Path, sites, F: int, K: int, V: int, k: int, rng, hostile: bool) -> Path:
    import torch

    from ..sae import SAE

    for layer, head in sites:
        sae = SAE(K, V, F, k, layer=layer, head=head, model=HOSTILE[0] if hostile else "sample")
        with torch.no_grad():
            for x in (sae.v_enc, sae.w_enc, sae.v_dec, sae.w_dec):
                x.copy_(torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal(x.shape)).float(), dim=-1))
        sae.save_pretrained(make_folder(folder, f"L{layer}H{head}"))
    return folder

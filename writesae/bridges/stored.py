"""What exporters read of a collection: its tokens as a matrix of passages, and the firings of one site, in memory.

Letters: P passages, T tokens a passage (the collection's context), n firings of a site. It takes 4 bytes a token and 20
bytes a firing of one site at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..collect import Store
from ..collect.files import TOKENS, read_table
from ..progress import tqdm
from ..untrusted import is_integer, shown

_PADDED, _SMALL = 64, 2**26  # times the tokens, and entries, up to which a matrix of passages is made
_COLUMNS = ("document", "row", "position", "feature", "activation")


@dataclass(frozen=True)
class Passages:
    """The tokens of a collection.

    Attributes:
        tokens: `[P, T]` int32, a document's passages behind one another; `pad` behind the end of a shorter passage.
        lengths: `[P]` int32 tokens of each.
        documents, first: `[D]` int64 numbers of the documents, rising, and the passage each begins with.
        pad: the token that stands where there is none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    first: np.ndarray
    pad: int

    def of(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """`[n]` int64 passages of (document, row)s.

        Raises:
            ValueError: one is not there.
        """
        at = np.minimum(np.searchsorted(self.documents, document), max(len(self.documents) - 1, 0))
        if len(document) and (not len(self.documents) or (self.documents[at] != document).any()):
            raise ValueError("document: expected one of the collection's documents table, got another")
        passage = self.first[at] + row if len(document) else np.empty(0, np.int64)
        if len(passage) and not 0 <= int(passage.min()) <= int(passage.max()) < len(self.tokens):
            raise ValueError(f"row: expected a passage among the {len(self.tokens)} of the collection, got another")
        return passage


@dataclass(frozen=True)
class SiteFirings:
    """All firings of one site, by (feature, passage, position).

    Attributes:
        layer, head: the site. size: features of its dictionary.
        passage: `[n]` int64 row of `Passages.tokens`. position: `[n]` int32 column. feature: `[n]` int32.
        activation: `[n]` float32.
    """

    layer: int
    head: int
    size: int
    passage: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    activation: np.ndarray

    @cached_property
    def bounds(self) -> np.ndarray:
        """`[size + 1]`: where each feature's firings begin."""
        return np.searchsorted(self.feature, np.arange(self.size + 1))

    def of(self, feature: int) -> slice:
        """Where a feature's firings are."""
        return slice(int(self.bounds[feature]), int(self.bounds[feature + 1]))


def open_store(path) -> Store:
    """A finished collection that holds every firing.

    Raises:
        ValueError: no collection, an unfinished one, or one of another mode, where what was not kept would pass for
            what did not fire.
    """
    store = path if isinstance(path, Store) else Store(path)
    if not store.complete:
        raise ValueError(
            f"store: the collection in {store.path} is not finished: run the same `writesae collect` again"
        )
    if store.mode != "all":
        raise ValueError(
            f"store: expected a collection of mode all, got mode {store.mode} in {store.path}: a firing that was not "
            "kept would be exported as none"
        )
    return store


def chosen_sites(store: Store, sites: Iterable[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """Those of the store's sites, all by default.

    Raises:
        ValueError: one that it does not have.
    """
    wanted = list(dict.fromkeys((layer, head) for layer, head in sites)) if sites else list(store.sites)
    for site in wanted:
        if site not in store.sites:
            names = ", ".join(f"{a}:{b}" for a, b in store.sites[:12])
            raise ValueError(f"site: expected one of this collection ({names}), got {':'.join(map(str, site))}")
    return wanted


def model_name(store: Store) -> str:
    """What the store calls its model, "" where it does not say."""
    named = store.manifest.get("named")
    return str((named.get("model") if isinstance(named, dict) else None) or "")


def passages(store: Store, pad: int = 0, progress: bool = False) -> Passages:
    """The tokens of a finished collection.

    Args:
        pad: stands behind the end of shorter passages.
    Raises:
        ValueError: a damaged file, tokens that its documents table does not tell of, or next to none for the size of
            the passages.
    """
    if not is_integer(pad, 0, 2**31 - 1):
        raise ValueError(f"pad: expected a token id, got {shown(pad)}")
    documents = store.documents
    numbers, first = (documents[name].to_numpy().astype(np.int64) for name in ("document", "first_passage"))
    count, T = int(documents["passages"].to_numpy().sum(dtype=np.int64)), store.context
    held = int(documents["tokens"].to_numpy().sum(dtype=np.int64))
    if count * T > max(_PADDED * held, _SMALL):
        raise ValueError(
            f"store: expected passages that are mostly text, got {count:,} of {T:,} tokens for {held:,} in "
            f"{store.path}: collect with a --context nearer to the length of the documents"
        )
    tokens, lengths = np.full((count, T), pad, np.int32), np.zeros(count, np.int32)
    made = Passages(tokens, lengths, numbers, first, pad)
    names = [name for piece in store.pieces for name in piece.names("tokens")]
    for name in tqdm(names, desc="tokens", unit="file", disable=not progress, leave=False):
        table = read_table(store.file(name), TOKENS)
        columns = [table[column].to_numpy() for column in TOKENS.names]
        document, row, position, token = columns
        try:
            passage = made.of(document, row)
            if len(position) and not 0 <= int(position.min()) <= int(position.max()) < T:
                raise ValueError(f"position: expected a token of a passage of {T}")
        except ValueError as error:
            raise ValueError(f"{store.path / name}: {error}") from error
        tokens[passage, position] = token
        if len(passage):  # a file's passages follow one another
            low = int(passage.min())
            counts = np.bincount(passage - low)
            lengths[low : low + len(counts)] += counts.astype(np.int32)
    return made


def firings(store: Store, layer: int, head: int, where: Passages, progress: bool = False) -> SiteFirings:
    """All firings of a site.

    Raises:
        ValueError: a damaged file, or a firing on a token or of a feature that is not there, or that is no number.
    """
    size, parts = store.features_of(layer, head), []
    total = int(np.sum(store.counts(layer, head)["count"].to_numpy()))
    with tqdm(total=total, desc=f"{layer}:{head}", unit="firing", unit_scale=True, disable=not progress,
              leave=False) as bar:  # fmt: skip
        for table in store.firings(layer, head, batch=1 << 20):
            document, row, position, feature, activation = (table[name].to_numpy() for name in _COLUMNS)
            parts.append((where.of(document, row), position, feature, activation))
            bar.update(len(table))
    kinds = (np.int64, np.int32, np.int32, np.float32)
    passage, position, feature, activation = (
        np.concatenate([part[i] for part in parts]) if parts else np.empty(0, kind) for i, kind in enumerate(kinds)
    )
    if len(feature):
        if not 0 <= int(feature.min()) <= int(feature.max()) < size:
            raise ValueError(f"{store.path}: a firing of {layer}:{head} is of no feature of its {size}")
        if int(position.min()) < 0 or (position >= where.lengths[passage]).any():
            raise ValueError(f"{store.path}: a firing of {layer}:{head} is behind the end of its passage")
        if not np.isfinite(activation).all():
            odd = int(feature[~np.isfinite(activation)][0])
            raise ValueError(
                f"{store.path}: expected finite activations, got a NaN or infinity of {layer}:{head} feature {odd}"
            )
    order = np.lexsort((position, passage, feature))
    return SiteFirings(layer, head, size, *(x[order] for x in (passage, position, feature, activation)))

"""The model itself behind a page: what fires in a text, and what it goes on to write with features edited.

One request runs at a time. A comparison runs in a thread of its own and is given out as it comes; closing the iterator
ends it at the next token.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..policies import Change, Erase, Policy, Scale, TokenView
from ..untrusted import is_integer, shown
from . import words
from .words import Words

LONGEST = 2048  # tokens of a text or prompt
MOST_NEW = 256  # tokens written
MOST_EDITS = 16
MOST_FIRINGS = 200_000  # of a text
_LARGEST = 1e6  # factor or strength
KINDS = {"erase": "what", "scale": "factor", "install": "strength"}


class Write(Policy):
    """Writes `strength` times a feature's atom at given columns, after they have read their state.

    Args:
        feature: its number. site: (layer, head). strength: in units of its code. positions: columns.
    """

    needs_dictionary = True

    def __init__(self, feature: int, site: tuple[int, int], strength: float, positions: Sequence[int]):
        super().__init__(sites=[site], positions=positions)
        self.feature, self.strength = feature, strength

    def check(self, site) -> None:
        super().check(site)
        F = len(site.atoms[0])
        if not 0 <= self.feature < F:
            raise ValueError(f"feature: expected 0 <= feature < {F} (site {site.key}), got {self.feature}")

    def act(self, view: TokenView) -> Change:
        device = view.site.device
        return view.add_atoms(torch.tensor([self.feature], device=device), torch.tensor([self.strength], device=device))


class _Cancelled(Exception):
    pass


class Live:
    """A model with dictionaries, for one request at a time.

    Args:
        model, tokenizer: of transformers. dictionaries: {(layer, head): SAE}.

    Raises:
        ValueError: no dictionaries.
    """

    def __init__(self, model, tokenizer, dictionaries: Mapping[tuple[int, int], Any]):
        from ..text.tokens import tokenizing

        if not dictionaries:
            raise ValueError("sae: expected dictionaries to see what fires, got none (--sae)")
        self.model, self.dictionaries = model.eval(), dict(dictionaries)
        self._tokenize, self._first = tokenizing(tokenizer, True, model)
        self.words = _words(tokenizer)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str | Path, dictionaries: Mapping[tuple[int, int], Any]) -> Live:
        """Of a model's folder or name."""
        from ..models import load
        from ..models.identity import require_same_model

        if not dictionaries:
            raise ValueError("sae: expected dictionaries to see what fires, got none (--sae)")
        made, tokenizer = load(model)
        require_same_model(made, dictionaries, False, str(model))
        return cls(made, tokenizer, dictionaries)

    def text(self, text: str, sites: Sequence[tuple[int, int]] | None = None, top: int = 8) -> dict:
        """What fires in a text.

        Args:
            sites: (layer, head) to look at; None: all. top: largest firings of each token and site, at most.
        Returns:
            {tokens: [str], joined they are the text with the token that begins one, firings: [{position, layer, head,
            feature, activation}], by position and falling activation}.
        Raises:
            ValueError: an empty or too long text, an unknown site, a number out of range.
        """
        from ..models import attach

        ids = self._encode("text", text)
        if not is_integer(top, 1, 1000):
            raise ValueError(f"top: expected an integer from 1 to 1,000, got {shown(top)}")
        wanted = list(self.dictionaries) if sites is None else [self._site("sites", *_pair(site)) for site in sites]
        if not wanted:
            raise ValueError("sites: expected at least one (layer, head), got none")
        asked = {site: self.dictionaries[site] for site in wanted}
        device = next(self.model.parameters()).device
        with self._lock, torch.no_grad(), attach(self.model, asked, any_model=True, record_writes=False) as tap:
            self.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            columns = {name: x.cpu().tolist() for name, x in tap.firings.columns().items() if name != "row"}
        names = ("position", "layer", "head", "feature", "activation")
        every = sorted(zip(*(columns[name] for name in names), strict=True), key=lambda f: (f[0], -f[4], *f[1:4]))
        kept: list[dict] = []
        seen: dict[tuple, int] = {}
        for firing in every:
            place = firing[:3]
            seen[place] = seen.get(place, 0) + 1
            if seen[place] <= top:
                kept.append(dict(zip(names, firing, strict=True)))
        return {"tokens": self.words.split(ids), "firings": kept[:MOST_FIRINGS]}

    def compare(self, prompt: str, edits: Sequence[Mapping], max_new_tokens: int = 40) -> Iterator[dict]:
        """The model's own greedy continuation, and the one with features edited as it reads and writes.

        Args:
            edits: each {kind, layer, head, feature, positions (columns, None: all)} and, by kind:
                "erase": what, "write" (the whole native write where the feature fires, as the paper) or "atom";
                "scale": factor, of the feature's part where it fires;
                "install": strength, how much of its atom is written, at positions (None: the prompt's last token).
        Yields:
            {"side": "plain" or "edited", "token": text, "id": int} as they are written, the plain side first; at last
            {"done": {plain, edited: text, first_difference: index of the first new token that differs or None,
            applied: [tokens at which each edit acted], kl: nats, of each token of the plain text, by which the edits
            move what predicts it (a change too small to write another token shows here), prompt: [str]}}.
        Raises:
            ValueError: at once, for an argument out of range or an edit that cannot be made; while it runs, with what
                the model raised.
        """
        ids = self._encode("prompt", prompt)
        if not is_integer(max_new_tokens, 1, MOST_NEW):
            raise ValueError(f"max_new_tokens: expected an integer from 1 to {MOST_NEW}, got {shown(max_new_tokens)}")
        if isinstance(edits, (str, Mapping)) or not isinstance(edits, Sequence) or not 1 <= len(edits) <= MOST_EDITS:
            raise ValueError(f"edits: expected a list of 1 to {MOST_EDITS} edits, got {shown(edits)}")
        policies = [self._policy(f"edits[{i}]", edit, len(ids)) for i, edit in enumerate(edits)]
        sites = {site: self.dictionaries[site] for policy in policies for site in policy.sites or ()}
        return self._events(ids, policies, sites, max_new_tokens)

    def _events(self, ids: list[int], policies, sites, new: int) -> Iterator[dict]:
        with self._lock:
            events: queue.Queue[Any] = queue.Queue()
            cancelled = threading.Event()
            thread = threading.Thread(
                target=self._work, args=(ids, policies, sites, new, events, cancelled), daemon=True
            )  # fmt: skip
            thread.start()
            try:
                while (event := events.get()) is not None:
                    if isinstance(event, BaseException):
                        raise ValueError(f"compare: {event}") from event
                    yield event
            finally:
                cancelled.set()
                thread.join()

    def _work(self, ids, policies, sites, new: int, events: queue.Queue, cancelled: threading.Event) -> None:
        from ..models import attach

        try:
            plain = self._generate(ids, new, "plain", events, cancelled)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an edit that never acted is said in the answer
                with attach(self.model, sites, policies=policies, any_model=True, record_writes=False) as tap:
                    edited = self._generate(ids, new, "edited", events, cancelled)
                    applied = [report.total for report in tap.policies]
                with attach(self.model, sites, policies=policies, any_model=True, record_writes=False):
                    changed = self._predictions([*ids, *plain], len(ids))
            usual = self._predictions([*ids, *plain], len(ids))
            pairs = zip(plain, edited, strict=False)
            differing = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if differing is None and len(plain) != len(edited):
                differing = min(len(plain), len(edited))
            kl = (usual.exp() * (usual - changed)).sum(-1).clamp_min(0)
            events.put({"done": {
                "plain": "".join(self.words.split(plain)), "edited": "".join(self.words.split(edited)),
                "first_difference": differing, "applied": applied, "kl": kl.tolist(), "prompt": self.words.split(ids),
            }})  # fmt: skip
        except _Cancelled:
            pass
        except Exception as error:  # whatever the model raises is the request's
            events.put(error)
        finally:
            events.put(None)

    @torch.no_grad()
    def _generate(self, ids, new: int, side: str, events: queue.Queue, cancelled: threading.Event) -> list[int]:
        streamer = _Streamer(self.words, side, events, cancelled)
        given = torch.tensor([ids], device=next(self.model.parameters()).device)
        end = getattr(self.model.generation_config, "eos_token_id", None)
        pad = end[0] if isinstance(end, (list, tuple)) and end else end
        self.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, num_beams=1,
            streamer=streamer, pad_token_id=pad,
        )  # fmt: skip
        return streamer.ids

    @torch.no_grad()
    def _predictions(self, ids: list[int], prompt: int) -> torch.Tensor:
        """`[new, vocabulary]` float64 log-probabilities of what follows the prompt."""
        given = torch.tensor([ids], device=next(self.model.parameters()).device)
        return self.model(input_ids=given, use_cache=False).logits[0, prompt - 1 : -1].double().log_softmax(-1)

    # ---- arguments -------------------------------------------------------------------------------------------------

    def _encode(self, name: str, text) -> list[int]:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name}: expected text, got {shown(text)}")
        if len(text) > 64 * LONGEST:
            raise ValueError(f"{name}: expected at most {LONGEST:,} tokens, got {len(text):,} characters")
        ids = [int(i) for i in self._tokenize(text.encode("utf-8", "replace").decode())]
        ids = ids if self._first is None else [self._first, *ids]
        limit: Any = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        most = min(LONGEST, limit - MOST_NEW) if is_integer(limit, MOST_NEW + 1) else LONGEST
        if not 1 <= len(ids) <= most:
            raise ValueError(f"{name}: expected 1 to {most:,} tokens, got {len(ids):,}")
        return ids

    def _site(self, name: str, layer, head) -> tuple[int, int]:
        if not (is_integer(layer) and is_integer(head)) or (layer, head) not in self.dictionaries:
            some = ", ".join(f"{a}:{b}" for a, b in list(self.dictionaries)[:8])
            raise ValueError(f"{name}: expected a site with a dictionary ({some}), got {shown(layer)}:{shown(head)}")
        return layer, head

    def _policy(self, name: str, edit, prompt: int) -> Policy:
        if not isinstance(edit, Mapping):
            raise ValueError(f"{name}: expected an edit with kind, layer, head and feature, got {shown(edit)}")
        kind = edit.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"{name}.kind: expected one of {', '.join(KINDS)}, got {shown(kind)}")
        unknown = set(edit) - {"kind", "layer", "head", "feature", "positions", KINDS[kind]}
        if unknown:
            raise ValueError(f"{name}: expected no {sorted(map(str, unknown))[0][:40]} of an edit of kind {kind}")
        site = self._site(f"{name}.layer, head", edit.get("layer"), edit.get("head"))
        feature: Any = edit.get("feature")
        F = self.dictionaries[site].F
        if not is_integer(feature, 0, F - 1):
            raise ValueError(f"{name}.feature: expected 0 <= feature < {F}, got {shown(feature)}")
        positions = edit.get("positions")
        if positions is not None:
            fine = isinstance(positions, (list, tuple)) and 1 <= len(positions) <= LONGEST + MOST_NEW
            if not fine or not all(is_integer(x, 0, LONGEST + MOST_NEW) for x in positions):
                raise ValueError(f"{name}.positions: expected a list of columns >= 0 or None, got {shown(positions)}")
        if kind == "erase":
            what = edit.get("what", "write")
            if what not in ("write", "atom"):
                raise ValueError(f"{name}.what: expected write or atom, got {shown(what)}")
            return Erase({site: [feature]}, what=what, positions=positions)
        value: Any = edit.get(KINDS[kind])
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or abs(value) > _LARGEST:
            raise ValueError(
                f"{name}.{KINDS[kind]}: expected a number from {-_LARGEST:,.0f} to {_LARGEST:,.0f}, got {shown(value)}"
            )
        if kind == "scale":
            return Scale({site: [feature]}, float(value), positions=positions)
        return Write(feature, site, float(value), [prompt - 1] if positions is None else positions)


class _Streamer:
    """What `generate` tells its tokens to."""

    def __init__(self, words: Words, side: str, events: queue.Queue, cancelled: threading.Event):
        self.ids: list[int] = []
        self._decode, self._side, self._events, self._cancelled = words.stream(), side, events, cancelled
        self._prompt = True

    def put(self, value) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
        if self._prompt:  # the prompt comes first
            self._prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.ids.append(int(token))
            self._events.put({"side": self._side, "token": self._decode(int(token)), "id": int(token)})

    def end(self) -> None:
        pass


def _pair(site) -> tuple:
    if not isinstance(site, (list, tuple)) or len(site) != 2:
        raise ValueError(f"sites: expected (layer, head), got {shown(site)}")
    return site[0], site[1]


def _words(tokenizer) -> Words:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = None if backend is None else words.from_config(json.loads(backend.to_str()))
    return words.by_decoding(tokenizer.decode, len(tokenizer)) if made is None else made

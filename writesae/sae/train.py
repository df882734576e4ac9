"""Training dictionaries from writes streamed out of a model: what data each step sees, checkpoints, resuming.

Step s draws from block s // (steps a block), the block's passages come from a permutation of the corpus, or of the pool
of it that is held (`Order`), and both are functions of the seed and s alone. A resumed run makes its current block
again and goes on bit for bit as it would have (on a GPU, whose sums have no fixed order, and from one device to
another: to rounding).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..files import make_folder, write_json
from ..interrupt import finishing
from .block import Block
from .config import TrainConfig
from .evaluate import block_fvu
from .order import Order
from .resume import read_checkpoint, refuse_other, write_checkpoint
from .sae import SAE
from .site import Batch, SiteTrainer, generator

CHECKPOINT, HISTORY = "checkpoint.pt", "training.json"

__all__ = ["TrainConfig", "Trainer"]


class Trainer:
    """Trains one dictionary a site, all from the same passes of the model.

    Args:
        stream: a `ModelStream` (entered), or anything like it: `len(stream)` passages, `stream.length` tokens each,
            `stream.writes(rows)` yielding batches of `{layer: Writes}` in order. `stream.digests()`, if there is one,
            names what the writes depend on ({"weights": sha256, "tokens": sha256}). With `stream.pool(number)`,
            `state()` and `restore(state)`, see `Pools`, it need not hold all its passages; `len(stream)` is pool 0's.
        sites: (layer, head) pairs.
        config: one for all sites.
        folder: where checkpoints go, or None for none.
        resume: go on from the checkpoint in `folder`. `config.steps` may be more or fewer than it was: what is left
            follows the learning rate of the new length, and `training_record["lengths"]` tells so.
        model_name: stored with the dictionaries.
        progress: show a bar.
        pinned: {name: digest} of more that the run depends on (held-out tokens, tokenizer).
        held_out: {site: block} of held-out passages whose FVU is noted while training, see `run`; of the config's
            target, and with the same roots.
        roots: {site: `[K, K]`} of the readers' metric, see `readers.roots`; with metric "readers" only.
        log: called with every record of `history` as it is made.

    Attributes:
        done: steps done.
        history: records, in order: of a site's step (`step`, `layer`, `head`, `loss`, `aux`, `dead`, `rate`), and of
            all sites on held-out passages (`step`: steps done; `held_out_fvu`: {"L<layer>H<head>": FVU}).

    Raises:
        ValueError: no sites, a site twice; steps fewer than are done; a damaged checkpoint, or one of other sites,
            settings, weights, tokens or `pinned`, by name.
        FileNotFoundError: resume without a checkpoint.
    """

    def __init__(
        self,
        stream,
        sites: Sequence[tuple[int, int]],
        config: TrainConfig,
        folder: str | Path | None = None,
        resume: bool = False,
        model_name: str | None = None,
        progress: bool = True,
        pinned: Mapping[str, str] | None = None,
        held_out: Mapping[tuple[int, int], Block] | None = None,
        log: Callable[[dict], object] | None = None,
        roots: Mapping[tuple[int, int], Tensor] | None = None,
    ):
        self.stream, self.config, self.model_name, self.progress = stream, config, model_name, progress
        self.sites = [(int(layer), int(head)) for layer, head in sites]
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites: expected at least one (layer, head), each once, got {self.sites}")
        self.roots = dict(roots or {})
        if set(self.roots) != (set(self.sites) if config.metric == "readers" else set()):
            raise ValueError(f'roots: expected one a site with metric "readers", else none, got {sorted(self.roots)}')
        self.folder = None if folder is None else Path(folder)
        self.rows = min(config.block, len(stream))
        self.order = Order(getattr(stream, "pool", self._only_pool), self.rows, config.seed)
        self._block: tuple[int, dict[tuple[int, int], Block]] | None = None
        self.held_out, self.log = dict(held_out or {}), log
        digests = getattr(stream, "digests", dict) if self.folder is not None else dict
        self._pinned = {**digests(), **(pinned or {})}
        saved = self._read_checkpoint() if resume else None
        prepared = self._make_block(self._passages(config.prepare, "prepare"), "preparation")
        self.trainers = {site: SiteTrainer(*site, config, prepared[site]) for site in self.sites}
        self.done, self.history, self.lengths = 0, [], []
        if saved is not None:
            self._restore(saved)
        paths = {t.path for t in self.trainers.values()}
        if len(paths) > 1:
            raise ValueError("path: the sites' heads differ in size and would take different paths; name one path")
        self._plan(paths.pop())

    # ---- data -------------------------------------------------------------------------------------------------

    def _plan(self, path: str) -> None:
        c, T = self.config, self.stream.length
        self.states = min(c.states, self.rows * T)
        few = -(-self.states // T)  # passages that hold the states of a step
        self.passages = min(self.rows, max(c.passages, few) if c.passages or path == "factored" else self.rows)
        if self.passages < self.rows:
            self.steps_a_block = max(1, round(self.rows // self.passages * c.uses))
        else:
            self.steps_a_block = max(1, round(self.rows * T * c.uses / self.states))

    def _passages(self, count: int, *keys) -> Tensor:
        return torch.randperm(len(self.stream), generator=generator(self.config.seed, *keys))[:count]

    def _only_pool(self, number: int) -> range:
        return range(0 if number else len(self.stream))

    def _make_block(self, rows: Tensor, what: str) -> dict[tuple[int, int], Block]:
        parts: dict[int, list] = {}
        bar = tqdm(total=len(rows), desc=what, unit=" passages", disable=not self.progress, leave=False)
        for writes in self.stream.writes(rows):
            for layer, part in writes.items():
                parts.setdefault(layer, []).append(part)
            bar.update(len(next(iter(writes.values())).decay))
        bar.close()
        return {
            (layer, head): Block(parts[layer], head, self.config.target, self.roots.get((layer, head)))
            for layer, head in self.sites
        }

    def batch(self, step: int) -> dict[tuple[int, int], Batch]:
        """What a step sees, the same tokens at every site."""
        index, at = divmod(step, self.steps_a_block)
        if self._block is None or self._block[0] != index:
            self._block = None  # let go of the old one first
            self._block = (index, self._make_block(self.order.rows(index), "writes"))
        c, T = self.config, self.stream.length
        if self.passages < self.rows:
            turn, group = divmod(at, self.rows // self.passages)
            order = torch.randperm(self.rows, generator=generator(c.seed, "group", index, turn))
            rows = order[group * self.passages : (group + 1) * self.passages]
            pick = torch.randperm(len(rows) * T, generator=generator(c.seed, "pick", step))[: self.states]
            rows, positions = rows[pick // T], pick % T
        else:
            turns = self.rows * T // self.states
            turn, group = divmod(at, turns)
            order = torch.randperm(self.rows * T, generator=generator(c.seed, "order", index, turn))
            pick = order[group * self.states : (group + 1) * self.states]
            rows, positions = pick // T, pick % T
        there: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for block in self._block[1].values():
            if block.device not in there:
                there[block.device] = rows.to(block.device), positions.to(block.device)
        return {site: Batch(block, *there[block.device]) for site, block in self._block[1].items()}

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(
        self, until: int | None = None, checkpoint_every: int = 1000, evaluate_every: int = 500
    ) -> dict[tuple[int, int], SAE]:
        """Trains up to step `until` (default all) and returns the dictionaries as they then are.

        Notes the FVU of the held-out blocks every `evaluate_every` steps and at the end of all. Writes a checkpoint
        every `checkpoint_every` steps, at the end, and when interrupted, after the step in hand; then raises
        KeyboardInterrupt.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        bar = tqdm(total=until, initial=self.done, desc="training", unit=" steps", disable=not self.progress)
        began = time.monotonic()
        smooth: dict[tuple[int, int], float] = {}
        with bar, finishing("step") as stop:
            while self.done < until and not stop:
                step = self.done
                batches = self.batch(step)
                for site, trainer in self.trainers.items():
                    got = trainer.step(step, batches[site])
                    smooth[site] = 0.98 * smooth.get(site, got["loss"]) + 0.02 * got["loss"]
                    if step % 50 == 0 or step + 1 == self.config.steps:
                        self._note({"step": step, "layer": site[0], "head": site[1], **got})
                self.done += 1
                if self.held_out and (self.done % evaluate_every == 0 or self.done == self.config.steps):
                    self._note({"step": self.done, "held_out_fvu": self._held_out_fvu()})
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(fvu=f"{sum(smooth.values()) / len(smooth):.4f}", dead=got["dead"])
                if self.done % checkpoint_every == 0:
                    self.checkpoint()
        self.seconds = time.monotonic() - began
        self.checkpoint()
        stop.check()
        return self.export()

    def _note(self, record: dict) -> None:
        self.history.append(record)
        if self.log is not None:
            self.log(record)

    def _held_out_fvu(self) -> dict[str, float]:
        found = {}
        for (layer, head), block in self.held_out.items():
            order = torch.arange(block.shape[0] * block.shape[1])
            rows, positions = order // block.shape[1], order % block.shape[1]
            sae = self.trainers[layer, head].export(inside=True).to(block.device)
            found[f"L{layer}H{head}"] = block_fvu(block, sae, rows, positions)
        return found

    def export(self) -> dict[tuple[int, int], SAE]:
        """The dictionaries as they are now, on raw states."""
        out = {}
        for site, trainer in self.trainers.items():
            sae = trainer.export()
            sae.model = self.model_name
            corpus = {"length": self.stream.length}
            total = self.stream.total if hasattr(self.stream, "total") else len(self.stream)
            if total is not None:  # else the run ended before its text did
                corpus["passages_in_corpus"] = total
            lengths = {"lengths": self.lengths} if self.lengths else {}
            sae.training_record |= {"done": self.done, **lengths, **corpus}
            out[site] = sae
        return out

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _identity(self) -> dict:
        named = {} if "weights" in self._pinned else {"model": self.model_name}  # a model may be moved
        return {
            "config": self.config.record(), "sites": [list(s) for s in self.sites], "passages": len(self.stream),
            "length": self.stream.length, **named, **self._pinned,
        }  # fmt: skip

    def checkpoint(self) -> None:
        """Writes the whole state of the run, each file whole or not at all; plain tensors and numbers only.

        Raises:
            ValueError: a symbolic link stands where a file should be written.
        """
        if self.folder is None:
            return
        make_folder(self.folder)
        content = {
            "identity": self._identity(), "done": self.done, "history": self.history, "lengths": self.lengths,
            "place": {"order": self.order.state(), "stream": getattr(self.stream, "state", dict)()},
            "trainers": [self.trainers[s].state() for s in self.sites],
        }  # fmt: skip
        write_checkpoint(self.folder / CHECKPOINT, content)
        write_json(self.folder / HISTORY, self.history, indent=None, allow_nan=True)

    def _read_checkpoint(self) -> dict:
        if self.folder is None:
            raise ValueError("folder: expected the folder of the checkpoint to resume from, got None")
        path = self.folder / CHECKPOINT
        saved = read_checkpoint(path)
        refuse_other(path, self._identity(), saved["identity"])
        return saved

    def _restore(self, saved: dict) -> None:
        path, states = self.folder / CHECKPOINT, saved["trainers"]
        done, before = saved["done"], saved["identity"]["config"]["steps"]
        if not 0 <= done <= before or len(states) != len(self.sites):
            raise ValueError(
                f"{path}: expected {len(self.sites)} sites after at most {before} steps, got {len(states)} after {done}"
            )
        if self.config.steps < done:
            raise ValueError(f"steps: the run has done {done} of {before}, got {self.config.steps}")
        for site, state in zip(self.sites, states, strict=True):
            try:
                self.trainers[site].restore(state)
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: not of this run, at site {site}: {str(error).splitlines()[0]}") from error
        try:
            self.order.restore(saved["place"]["order"])
            if hasattr(self.stream, "restore"):
                self.stream.restore(saved["place"]["stream"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not of this run, its place in the text: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{path}: the checkpoint is of another run: {error}") from error
        self.done, self.history, self.lengths = done, saved["history"], saved["lengths"]
        if self.config.steps != before:
            self.lengths = [*self.lengths, {"done": done, "steps": self.config.steps, "before": before}]

"""Training dictionaries from writes streamed out of a model: what data each step sees, checkpoints, resuming.

Step s draws from block s // (steps a block), the block's passages come from a permutation of the corpus, or of the pool
of it that is held (`Order`), and both are functions of the seed and s alone. A resumed run makes its current block
again and goes on bit for bit as it would have (on a GPU, whose sums have no fixed order, and from one device to
another: to rounding).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..files import make_folder, write_json
from ..interrupt import finishing
from ..progress import tqdm
from ..writes import Writes
from .block import Block
from .config import TrainConfig
from .order import Order
from .output import CHECKPOINT, HISTORY
from .resume import read_checkpoint, refuse_other, write_checkpoint
from .sae import SAE
from .site import Batch, SiteTrainer, generator
from .variants import check_variants
from .watch import LOOKS, look

__all__ = ["TrainConfig", "Trainer"]


class Trainer:
    """Trains one dictionary a site, or several, all from the same passes of the model.

    Args:
        stream: a `ModelStream` (entered), or anything like it: `len(stream)` passages, `stream.length` tokens each,
            `stream.writes(rows)` yielding batches of `{layer: Writes}` in order. `stream.digests()`, if there is one,
            names what the writes depend on ({"weights": sha256, "tokens": sha256}). With `stream.pool(number)`,
            `state()` and `restore(state)`, see `Pools`, it need not hold all its passages; `len(stream)` is pool 0's.
        sites: (layer, head) pairs.
        config: one for all sites; or {name: config} of variants, each trained at every site to the same dictionary as
            by itself, see `variants.py`. Each step's data are the same for all.
        folder: where checkpoints go, or None for none.
        resume: go on from the checkpoint in `folder`. `config.steps` may be more or fewer than it was: what is left
            follows the learning rate of the new length, and `training_record["lengths"]` tells so.
        model_name: stored with the dictionaries.
        progress: show a bar.
        pinned: {name: digest} of more that the run depends on (held-out tokens, tokenizer).
        held_out: {site: block} of held-out passages at which dictionaries are looked while training, see `run`; of the
            config's target, and with the same roots.
        roots: {site: `[K, K]`} of the readers' metric, see `readers.roots`; with metric "readers" only.
        log: called with every record of `history` as it is made.
        devices: where dictionaries are trained, the sites in turn; default: where the model writes. Sites of different
            devices take their steps at the same time.
        reading: {site: root `[K, K]`} through which later queries see a write, for `beats_deletion` of `watch.look`
            where the metric is not the readers'; default: entry by entry.

    Attributes:
        done: steps done.
        every: {variant: {site: its trainer}}; a single config's variant is "".
        history: records, in order: of a site's step (`step`, `layer`, `head`, with several also `variant`, `loss`,
            `aux`, `dead`, `rate`), and of all at held-out passages (`step`: steps done; and of each of `watch.LOOKS`
            {"L<layer>H<head>", or "<variant>/L<layer>H<head>": number}).

    Raises:
        ValueError: no sites, a site twice; steps fewer than are done; a damaged checkpoint, or one of other sites,
            settings, weights, tokens or `pinned`, by name.
        FileNotFoundError: resume without a checkpoint.
    """

    def __init__(
        self,
        stream,
        sites: Sequence[tuple[int, int]],
        config: TrainConfig | Mapping[str, TrainConfig],
        folder: str | Path | None = None,
        resume: bool = False,
        model_name: str | None = None,
        progress: bool = True,
        pinned: Mapping[str, str] | None = None,
        held_out: Mapping[tuple[int, int], Block] | None = None,
        log: Callable[[dict], object] | None = None,
        roots: Mapping[tuple[int, int], Tensor] | None = None,
        devices: Sequence[str | torch.device] | None = None,
        reading: Mapping[tuple[int, int], Tensor] | None = None,
    ):
        self.configs = {"": config} if isinstance(config, TrainConfig) else check_variants(config)
        config = next(iter(self.configs.values()))  # for what all share
        self.stream, self.config, self.model_name, self.progress = stream, config, model_name, progress
        self.sites = [(int(layer), int(head)) for layer, head in sites]
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites: expected at least one (layer, head), each once, got {self.sites}")
        self.roots = dict(roots or {})
        if set(self.roots) != (set(self.sites) if config.metric == "readers" else set()):
            raise ValueError(f'roots: expected one a site with metric "readers", else none, got {sorted(self.roots)}')
        self.folder = None if folder is None else Path(folder)
        self.rows = min(config.block, len(stream))
        self.order = Order(getattr(stream, "pool", self._only_pool), self.rows, config.drawn_by)
        self.devices = {site: torch.device(devices[i % len(devices)]) for i, site in enumerate(self.sites) if devices}
        self._block: tuple[int, dict[tuple[int, int], Block]] | None = None
        self.held_out, self.reading, self.log = dict(held_out or {}), dict(reading or {}), log
        digests = getattr(stream, "digests", dict) if self.folder is not None else dict
        self._pinned = {**digests(), **(pinned or {})}
        saved = self._read_checkpoint() if resume else None
        prepared = self._make_block(self._passages(config.prepare, "prepare"), "preparation")
        self.every = {
            name: {site: SiteTrainer(*site, one, prepared[site]) for site in self.sites}
            for name, one in self.configs.items()
        }
        self.done, self.history, self.lengths = 0, [], []
        if saved is not None:
            self._restore(saved)
        paths = {trainer.path for _, _, trainer in self._all()}
        if len(paths) > 1:
            raise ValueError("path: sites or variants differ and would take different paths; name one path")
        self._plan(paths.pop())

    @property
    def trainers(self) -> dict[tuple[int, int], SiteTrainer]:
        """Those of a single config."""
        if len(self.every) > 1:
            raise ValueError(f"trainers: expected one config, got {', '.join(self.every)}: see `every`")
        return next(iter(self.every.values()))

    def _all(self) -> Iterator[tuple[str, tuple[int, int], SiteTrainer]]:
        for name, trainers in self.every.items():
            for site, trainer in trainers.items():
                yield name, site, trainer

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
        return torch.randperm(len(self.stream), generator=generator(self.config.drawn_by, *keys))[:count]

    def _only_pool(self, number: int) -> range:
        return range(0 if number else len(self.stream))

    def _make_block(self, rows: Tensor, what: str) -> dict[tuple[int, int], Block]:
        parts: dict[int, list[Writes]] = {}
        bar = tqdm(total=len(rows), desc=what, unit=" passages", disable=not self.progress, leave=False)
        for writes in self.stream.writes(rows):
            for layer, part in writes.items():
                parts.setdefault(layer, []).append(part)
            bar.update(len(next(iter(writes.values())).decay))
        bar.close()
        return {site: self._block_of(parts[site[0]], site) for site in self.sites}

    def _block_of(self, parts: list[Writes], site: tuple[int, int]) -> Block:
        head = site[1]
        if site in self.devices:  # what the site needs of them
            parts, head = [part.head(head).to(self.devices[site]) for part in parts], 0
        return Block(parts, head, self.config.target, self.roots.get(site))

    def batch(self, step: int) -> dict[tuple[int, int], Batch]:
        """What a step sees, the same tokens at every site."""
        index, at = divmod(step, self.steps_a_block)
        if self._block is None or self._block[0] != index:
            self._block = None  # let go of the old one first
            self._block = (index, self._make_block(self.order.rows(index), "writes"))
        c, T = self.config, self.stream.length
        if self.passages < self.rows:
            turn, group = divmod(at, self.rows // self.passages)
            order = torch.randperm(self.rows, generator=generator(c.drawn_by, "group", index, turn))
            rows = order[group * self.passages : (group + 1) * self.passages]
            pick = torch.randperm(len(rows) * T, generator=generator(c.drawn_by, "pick", step))[: self.states]
            rows, positions = rows[pick // T], pick % T
        else:
            turns = self.rows * T // self.states
            turn, group = divmod(at, turns)
            order = torch.randperm(self.rows * T, generator=generator(c.drawn_by, "order", index, turn))
            pick = order[group * self.states : (group + 1) * self.states]
            rows, positions = pick // T, pick % T
        there: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for block in self._block[1].values():
            if block.device not in there:
                there[block.device] = rows.to(block.device), positions.to(block.device)
        return {site: Batch(block, *there[block.device]) for site, block in self._block[1].items()}

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(self, until: int | None = None, checkpoint_every: int = 1000, evaluate_every: int = 500) -> dict:
        """Trains up to step `until` (default all) and returns the dictionaries as they then are, see `export`.

        Looks at the held-out blocks every `evaluate_every` steps and at the end of all. Writes a checkpoint every
        `checkpoint_every` steps, at the end, and when interrupted, after the step in hand; then raises
        KeyboardInterrupt.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        bar = tqdm(total=until, initial=self.done, desc="training", unit=" steps", disable=not self.progress)
        began = time.monotonic()
        smooth: dict[tuple, float] = {}
        seen: dict[str, str] = {}
        with bar, finishing("step") as stop, ThreadPoolExecutor(max(len(set(self.devices.values())), 1)) as workers:
            while self.done < until and not stop:
                step = self.done
                steps = self._steps(step, self.batch(step), workers)
                for (name, site), got in steps.items():
                    smooth[name, site] = 0.98 * smooth.get((name, site), got["loss"]) + 0.02 * got["loss"]
                    if step % 50 == 0 or step + 1 == self.config.steps:
                        variant = {"variant": name} if name else {}
                        self._note({"step": step, **variant, "layer": site[0], "head": site[1], **got})
                self.done += 1
                if self.held_out and (self.done % evaluate_every == 0 or self.done == self.config.steps):
                    found = self._look()
                    self._note({"step": self.done, **found})
                    means = {name: sum(x.values()) / len(x) for name, x in found.items()}
                    seen = {"held_out": f"{means['held_out_fvu']:.4f}", "l0": f"{means['held_out_l0']:.1f}",
                            "wins": f"{means['beats_deletion']:.0%}"}  # fmt: skip
                bar.update()
                if step % 10 == 0:
                    dead = sum(int(got["dead"]) for got in steps.values())
                    bar.set_postfix(fvu=f"{sum(smooth.values()) / len(smooth):.4f}", dead=dead, **seen)
                if self.done % checkpoint_every == 0:
                    self.checkpoint()
        self.seconds = time.monotonic() - began
        self.checkpoint()
        stop.check()
        return self.export()

    def _steps(self, step: int, batches: Mapping, workers: Executor) -> dict[tuple[str, tuple[int, int]], dict]:
        """{(variant, site): what its step told}. A step waits for its device, so each device has a thread."""

        def on(device: torch.device | None) -> dict:
            return {
                (name, site): trainer.step(step, batches[site])
                for name, site, trainer in self._all()
                if self.devices.get(site) == device
            }

        devices = list(dict.fromkeys(self.devices.get(site) for site in self.sites))
        if len(devices) == 1:
            return on(devices[0])
        found = {key: got for part in workers.map(on, devices) for key, got in part.items()}
        return {(name, site): found[name, site] for name, site, _ in self._all()}

    def _note(self, record: dict) -> None:
        self.history.append(record)
        if self.log is not None:
            self.log(record)

    def _look(self) -> dict[str, dict[str, float]]:
        """{what of `LOOKS`: {whose: number}}."""
        found: dict[str, dict[str, float]] = {what: {} for what in LOOKS}
        for name, site, trainer in self._all():
            block = self.held_out[site]
            got = look(trainer.export(inside=True).to(block.device), block, self.reading.get(site))
            got["dead"] = int(trainer.dead().sum())
            for what in LOOKS:
                found[what][f"{name}/L{site[0]}H{site[1]}" if name else f"L{site[0]}H{site[1]}"] = got[what]
        return found

    def export(self) -> dict:
        """{site: dictionary} as they are now, on raw states; of variants {variant: {site: dictionary}}."""
        out: dict[str, dict[tuple[int, int], SAE]] = {name: {} for name in self.every}
        corpus = {"length": self.stream.length}
        total = self.stream.total if hasattr(self.stream, "total") else len(self.stream)
        if total is not None:  # else the run ended before its text did
            corpus["passages_in_corpus"] = total
        for name, site, trainer in self._all():
            sae = out[name][site] = trainer.export()
            sae.model = self.model_name
            lengths = {"lengths": self.lengths} if self.lengths else {}
            sae.training_record |= {"done": self.done, **lengths, **corpus}
        return out[""] if list(out) == [""] else out

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _identity(self) -> dict:
        named = {} if "weights" in self._pinned else {"model": self.model_name}  # a model may be moved
        several = {}
        if list(self.configs) != [""]:
            several = {"variants": {name: c.record() | {"steps": 0} for name, c in self.configs.items()}}
        return {
            "config": self.config.record(), **several, "sites": [list(s) for s in self.sites],
            "passages": len(self.stream), "length": self.stream.length, **named, **self._pinned,
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
            "trainers": [trainer.state() for *_, trainer in self._all()],
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
        expected = len(self.sites) * len(self.every)
        if not 0 <= done <= before or len(states) != expected:
            raise ValueError(
                f"{path}: expected {expected} sites after at most {before} steps, got {len(states)} after {done}"
            )
        if self.config.steps < done:
            raise ValueError(f"steps: the run has done {done} of {before}, got {self.config.steps}")
        for (_, site, trainer), state in zip(self._all(), states, strict=True):
            try:
                trainer.restore(state)
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

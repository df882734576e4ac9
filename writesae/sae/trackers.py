"""Training curves to where experiments are kept (tensorboard, wandb, trackio and others), through `accelerate`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..ranks import LAUNCHERS

# By these, too, accelerate would find the processes of a launcher and wait for them.
_ENVIRONMENT = {name for names in LAUNCHERS for name in names} | {
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK",
    "PMI_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
}  # fmt: skip


class Trackers:
    """Logs of one process's training; a context manager. No process waits for another: each keeps its own.

    Args:
        names: of trackers, as `accelerate` calls them.
        run: what this run is called.
        folder: of the run; those that write files of their own (tensorboard) put them in its `logs`.
        config: {name: number or string}, kept with the run.

    Raises:
        ValueError: `accelerate`, or a tracker's own package, is not installed, or there is no tracker of that name.
    """

    def __init__(self, names: Sequence[str], run: str, folder: Path, config: Mapping[str, object]):
        self.names, self.run, self.folder = list(names), run, folder
        self.config = {name: x for name, x in config.items() if isinstance(x, bool | int | float | str)}
        self._accelerator: Any = None
        try:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        except ImportError as error:
            raise ValueError(f"track: {error}: pip install writesae[trackers]") from error
        here = [str(x) for x in get_available_trackers()]
        for name in self.names:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ValueError(f"track: expected some of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
            if name not in here:
                raise ValueError(f"track: {name} is not installed: pip install {name}")

    def __enter__(self) -> Trackers:
        from accelerate import Accelerator

        own = {x: {"name": self.run} for x in ("wandb", "trackio") if x in self.names}
        with _alone():
            self._accelerator = Accelerator(cpu=True, log_with=self.names, project_dir=str(self.folder / "logs"))
        self._accelerator.init_trackers("writesae", self.config, own)
        return self

    def __exit__(self, *error) -> None:
        self._accelerator.end_training()

    def log(self, record: Mapping) -> None:
        """One record of `Trainer.history`, its numbers named by site, such as L2H3/loss."""
        self._accelerator.log(*named(record))


def named(record: Mapping) -> tuple[dict[str, float], int]:
    """({"L2H3/loss": number}, step) of a record of `Trainer.history`; of a variant "k16/L2H3/loss"."""
    found = {}
    if "layer" in record:
        site = f"L{record['layer']}H{record['head']}"
        whose = f"{record['variant']}/{site}" if "variant" in record else site
        found = {f"{whose}/{name}": record[name] for name in ("loss", "aux", "dead", "rate")}
    for name, values in record.items():
        if isinstance(values, Mapping):
            found |= {f"{whose}/{name}": x for whose, x in values.items()}
    return found, record["step"]


@contextmanager
def _alone() -> Iterator[None]:
    """The environment without what a launcher of several processes put into it."""
    taken = {name: os.environ.pop(name) for name in _ENVIRONMENT & set(os.environ)}
    try:
        yield
    finally:
        os.environ.update(taken)

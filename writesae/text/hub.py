"""Records of a dataset by its name, through the `datasets` package: streamed, or from its local copy when offline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..untrusted import first_line


def records(dataset: tuple[str, str | None, str], skip: int = 0) -> Iterator[dict]:
    """Records of (name, configuration, split) from number `skip` on. No code of a dataset is run.

    Raises:
        ValueError: the package is missing; no such dataset, configuration or split; the Hub is out of reach and there
            is no local copy; reading fails on the way.
    """
    with _told(dataset, at := [skip]):
        stream = _load(*dataset)[0]
        for record in stream.skip(skip) if skip else stream:
            yield record
            at[0] += 1


def version(dataset: tuple[str, str | None, str]) -> str:
    """What changes when the dataset does: its commit on the Hub, a digest of its files' places and times in a folder.

    Raises:
        ValueError: as `records`.
    """
    with _told(dataset, [0]):
        return _load(*dataset)[1]


def _load(name: str, config: str | None, split: str):
    """(records to iterate, version)."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("the datasets package is not installed: pip install writesae[datasets]") from error
    if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():  # of save_to_disk
        saved = datasets.load_from_disk(name)
        if isinstance(saved, dict):
            if split not in saved:
                raise ValueError(f"expected one of its splits {', '.join(saved)}, got {split}")
            saved = saved[split]
        return saved, saved._fingerprint
    # From version 4 on the package runs no scripts of a dataset; before, it could ask whether it may.
    safe = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
    builder = datasets.load_dataset_builder(name, config, **safe)
    try:
        return builder.as_streaming_dataset(split=split), str(builder.hash)
    except NotImplementedError:  # older versions do not stream a local copy
        return datasets.load_dataset(name, config, split=split, **safe), str(builder.hash)


@contextmanager
def _told(dataset: tuple[str, str | None, str], at: list[int]) -> Iterator[None]:
    """What goes wrong within, told with the dataset's name; the package and what it uses raise all kinds."""
    name, _, split = dataset
    try:
        yield
    except ConnectionError as error:
        raise ValueError(
            f"dataset: {name} ({split}) is out of reach, and there is no local copy of it: {first_line(error)}. Load "
            "it once where there is a network, or give files"
        ) from error
    except Exception as error:
        raise ValueError(f"dataset: cannot read {name} ({split}), record {at[0]}: {first_line(error)}") from error

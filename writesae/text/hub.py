"""Records of a dataset by its name, through the `datasets` package: streamed, or from its local copy when offline."""

from __future__ import annotations

from collections.abc import Iterator


def records(dataset: tuple[str, str | None, str], skip: int = 0) -> Iterator[dict]:
    """Records of (name, configuration, split) from number `skip` on. No code of a dataset is run.

    Raises:
        ValueError: the package is missing; no such dataset, configuration or split; the Hub is out of reach and there
            is no local copy; reading fails on the way.
    """
    name, _, split = dataset
    number = skip
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "dataset: needs the datasets package, which is not installed: pip install writesae[datasets]"
        ) from error
    try:
        stream = _load(datasets, *dataset)
        for record in stream.skip(skip) if skip else stream:
            yield record
            number += 1
    except ConnectionError as error:
        raise ValueError(
            f"dataset: {name} ({split}) is out of reach, and there is no local copy of it: {_line(error)}. Load "
            "it once where there is a network, or give files"
        ) from error
    except Exception as error:  # the package and what it uses raise all kinds
        raise ValueError(f"dataset: cannot read {name} ({split}), record {number}: {_line(error)}") from error


def _load(datasets, name: str, config: str | None, split: str):
    # From version 4 on the package runs no scripts of a dataset; before, it could ask whether it may.
    safe = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True, **safe)
    except NotImplementedError:  # older versions do not stream a local copy
        return datasets.load_dataset(name, config, split=split, **safe)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Which version of a package is installed, as every record and `writesae info` tell it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(name: str) -> str | None:
    """The installed version of a distribution, or None; of this package also where it runs from a clone."""
    try:
        return version(name)
    except PackageNotFoundError:
        from . import __version__

        return __version__ if name == "writesae" else None

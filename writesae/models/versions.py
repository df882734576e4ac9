"""Which releases of transformers the hooks are tested with, and whether the installed one lies among them."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

TESTED = ("5.14.1", "5.23.0", "5.24.0")  # in CI, each by its own run


def installed(package: str = "transformers") -> str | None:
    """The installed release of a package, or None. Reads its metadata; does not import it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def in_range(release: str | None = None) -> bool:
    """Whether a release (by default the installed one) lies between the oldest and the newest tested; else it may
    work, but nobody looked. A pre-release counts as the release it leads to."""
    release = installed() if release is None else release
    return release is not None and _key(TESTED[0]) <= _key(release) <= _key(TESTED[-1])


def remark() -> str:
    """One line for `writesae info`."""
    have = installed()
    tested = f"tested with {TESTED[0]} to {TESTED[-1]} ({', '.join(TESTED)})"
    if have is None:
        return f"not installed; {tested}"
    if in_range(have):
        return f"{have}; {tested}"
    side = "newer" if _key(have) > _key(TESTED[-1]) else "older"
    return f"{have}, which is {side} than what is tested: attach compares logits before it is used; {tested}"


def _key(release: str) -> tuple[int, ...]:
    numbers = re.split(r"[^\d.]", release)[0].strip(".").split(".")  # "5.24.0.dev0" -> 5, 24, 0
    return tuple([*map(int, numbers), 0, 0][:3])

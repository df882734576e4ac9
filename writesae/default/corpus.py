"""The corpus of the default model: the Python standard library's own sources.

Every Python installation carries this corpus, so the default model, its dictionary and every example can be
trained, checked and read without a download. A file's split depends on nothing but its path below the standard
library's folder, so a module that is held out under one Python version is held out under all of them.
"""

import hashlib
import sysconfig
from fnmatch import fnmatchcase
from pathlib import Path

SPLITS = ("train", "validation", "test")

# Folder names left out wherever they stand: other people's packages, build products, and the test data of old tools.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "pydoc_data", "idlelib", "data"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
# Generated tables and files that differ from machine to machine: long, repetitive, and nobody's writing.
_SKIPPED_PATHS = (
    "config-*/*",
    "_sysconfigdata*",
    "_sysconfig_vars*",
    "encodings/cp*",
    "encodings/iso8859_*",
    "encodings/koi8_*",
    "encodings/mac_*",
    "encodings/hp_roman8.py",
    "encodings/kz1048.py",
    "encodings/palmos.py",
    "encodings/ptcp154.py",
    "encodings/tis_620.py",
    "html/entities.py",
    "*/bad_coding*",
    "*/badsyntax_*",
    "*/cjkencodings/*",
)


def split_of(name: str) -> str:
    """Return the split of a module: ``"train"`` (90 %), ``"validation"`` (5 %) or ``"test"`` (5 %).

    Args:
        name: path of the module below the standard library's folder, with forward slashes, such as
            ``"email/message.py"``. Only this string counts (its BLAKE2b digest is taken modulo 100), so the answer is
            the same on every machine and under every Python version.
    """
    bucket = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(split: str, *, test_suite: bool = False) -> list[Path]:
    """Return the standard library's sources of one split, sorted by path.

    There are two held-out splits, so that one may be looked at while choosing (``"validation"``) and the other only
    for a final number (``"test"``). Neither is seen by the default model in training.

    Left out: installed packages, generated tables (character maps, help topics, HTML entities, build variables),
    IDLE, empty files and files that are not UTF-8. Also left out, unless asked for, is CPython's own test suite
    (every folder named ``test`` or ``tests``): it is larger than the library and many distributions do not ship it.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; see :func:`split_of`.
        test_suite: return the files of CPython's test suite *instead* of the library's. They are split by the same
            rule. The default model trains on both; its held-out losses are those of the library alone.

    Raises:
        ValueError: if ``split`` is none of the three names.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(map(repr, SPLITS))}; got {split!r}")
    root = stdlib_folder()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        folders = set(relative.parts[:-1])
        name = relative.as_posix()
        if (
            folders & _SKIPPED_FOLDERS
            or bool(folders & _TEST_FOLDERS) != test_suite
            or any(fnmatchcase(name, pattern) for pattern in _SKIPPED_PATHS)
            or split_of(name) != split
        ):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            found.append((name, path))
    return [path for _, path in sorted(found)]

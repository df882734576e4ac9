"""`manifest.json`: what was asked of which model, dictionaries, tokenizer and corpus, and whether it still is.

`source`, `tokenizer` and `corpus` hold digests of everything that decides what is stored, so that a resumed run goes on
with exactly those; `named` says, for a reader, what they were called. Reading one needs neither torch nor a model.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path

from ..files import (
    cached_digests,
    left_over,
    read_json,
    read_sealed,
    refuse_file,
    sealed,
    sha256,
    stamp,
    write_bytes,
    write_first,
)
from ..untrusted import is_integer
from .files import digest_bar
from .shared_digests import FOLDER as DIGESTS
from .shared_digests import shared_digests

FORMAT, VERSION = "writesae-firings", 2
COPY = "done/manifest.json"  # from which a damaged or missing one is restored
MODES = ("all", "top", "reservoir")
_MOST = 2**31 - 1  # what the tables hold
_FEW_FILES = 1000  # of a corpus with no more, the manifest holds every file's digest, so that a refusal can name it


def spent(mode: str) -> tuple[str, ...]:
    """Folders of shard files that the files written at the end take the place of."""
    return ("counts", "documents") if mode == "all" else ("counts", "documents", "firings")


def refuse_foreign(out: Path) -> None:
    """Raises ValueError unless `out` is new, empty, or a collection's folder."""
    refuse_file(out)
    if not out.is_dir() or begun(out):
        return
    manifest = out / "manifest.json"
    ours = (".lock", DIGESTS)
    others = sorted(path.name for path in out.iterdir() if path.name not in ours and left_over(path) != manifest)
    if others:
        raise ValueError(
            f"out: expected a new or empty folder or a collection of writesae, got {out} with {', '.join(others[:5])} "
            "and no manifest.json"
        )


def read(path: Path) -> dict:
    """A manifest whose entries are what the rest of the package takes for granted.

    Raises:
        ValueError: missing, damaged, of another format, or with an impossible entry; names the file.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a collection of writesae (another format)")
    version = manifest.get("version")
    if version == VERSION:
        manifest = read_sealed(path)
    elif version != 1:
        raise ValueError(f"{path}: expected format {FORMAT} 1 or {VERSION}, got {version!r}: of a newer writesae?")
    if manifest.get("mode") not in MODES:
        raise ValueError(f"{path}: mode: expected one of {', '.join(MODES)}, got {manifest.get('mode')!r}")
    for name in ("context", "n", "shard_passages", *(("unit",) if "unit" in manifest else ())):
        if not is_integer(manifest.get(name), 1, _MOST):
            raise ValueError(f"{path}: {name}: expected a whole number >= 1, got {manifest.get(name)!r}")
    sites = manifest.get("sites")
    if not isinstance(sites, list) or not sites or not all(
        isinstance(site, list) and len(site) == 4 and all(is_integer(x, 0, _MOST) for x in site[:3]) for site in sites
    ):  # fmt: skip
        raise ValueError(f"{path}: sites: expected lists of layer, head, features and k")
    return manifest


def activations(manifest: dict) -> str:
    """Of a manifest: whether activations are stored "exact" or "packed", rounded."""
    source = manifest.get("source")
    return source.get("activations", "exact") if isinstance(source, dict) else "exact"


def make(out: Path, content: dict) -> None:
    """Writes a new manifest, one for several workers unless another was first. `restore` copies it."""
    write = write_first if "unit" in content else write_bytes
    write(out / "manifest.json", sealed({"format": FORMAT, "version": VERSION, **content}).encode(), out)


def in_units(out: Path) -> bool:
    """Whether a folder's manifest says that it is filled by units."""
    for path in (out / "manifest.json", out / COPY):
        try:
            return "unit" in read(path)
        except ValueError:
            pass
    return False


def begun(out: Path) -> bool:
    """Whether a folder holds a collection's manifest, or a copy of it."""
    return (out / "manifest.json").exists() or (out / COPY).exists()


def restore(out: Path) -> None:
    """Makes the manifest and its copy, of which one may be missing or damaged, the same again."""
    pair = out / "manifest.json", out / COPY
    for path, other in (pair, pair[::-1]):
        if _sound(path) and not _sound(other):
            write_bytes(other, path.read_bytes(), out)


def _sound(path: Path) -> bool:
    try:
        return read(path)["version"] == VERSION
    except ValueError:
        return False


def check(out: Path, asked: dict) -> tuple[dict, str]:
    """(the manifest of a folder, the digest of its bytes), if it is of what is asked.

    Raises:
        ValueError: it is damaged, too old, or of other arguments, each named.
    """
    path = out / "manifest.json"
    try:
        manifest = read(path)
    except ValueError as error:
        raise ValueError(f"out: {error}; restore the file from a copy, or collect into another folder") from error
    if manifest["version"] != VERSION:
        raise ValueError(
            f"out: {out} was made by an older writesae, without digests: it can be read, but not gone on with; use "
            "another folder"
        )
    differing = _differences({name: manifest.get(name) for name in asked}, asked)
    if differing:
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(f"out: {out} holds a collection with other arguments: {'; '.join(differing[:8])}{more}")
    return manifest, sha256(path)


def _differences(stored: dict, asked: dict, prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*stored, *asked}):
        a, b = stored.get(name), asked.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} is {a!r} there, {b!r} here")
    return found


class Watched:
    """A corpus whose files must stay as they are: their digests, and whether a file is still the one that had it.

    Args: out: the folder of several workers, who share the reading.

    Attributes:
        pinned: what the manifest keeps of the corpus.
    """

    def __init__(self, corpus, progress: bool = False, out: Path | None = None):
        self._files = [(path, name) for path, name, *_ in getattr(corpus, "files", ())]
        if len({name for _, name in self._files}) < len(self._files):
            self._files = [(path, str(path)) for path, _ in self._files]
        self._stamps = {name: stamp(path) for path, name in self._files}
        with digest_bar("reading the corpus", sum(s[3] for s in self._stamps.values()), progress) as tell:
            if not self._files:
                self._digests = _digest(corpus, tell)
            else:
                of_all = cached_digests if out is None else partial(shared_digests, out)
                self._digests = of_all(self._files, tell)
        whole = hashlib.sha256(json.dumps(sorted(self._digests.items())).encode()).hexdigest()
        self.pinned = {**(corpus.totals() if self._files else corpus.fingerprint()), "sha256": whole}
        if len(self._digests) <= _FEW_FILES:
            self.pinned["digests"] = self._digests
        self.check_all()

    def check_all(self) -> None:
        """`check` of every file."""
        self.check(0, len(self._files) - 1)

    def check(self, first: int, last: int) -> None:
        """Raises ValueError, naming it, if one of the files `first` to `last` is no longer what was digested."""
        for path, name in self._files[first : last + 1]:
            try:
                now = stamp(path)
                if now == self._stamps[name]:
                    continue
                same = sha256(path) == self._digests.get(name) and stamp(path) == now
            except OSError as error:
                raise ValueError(f"corpus: {name} cannot be read any more: {error.strerror}") from error
            if not same:
                raise ValueError(
                    f"corpus: {name} changed while it was being collected; what was read of it since is not kept. Put "
                    "it back, or collect into another folder"
                )
            self._stamps[name] = now


def _digest(corpus, progress) -> dict[str, str]:
    """Of a corpus that is no files: what it says itself."""
    return corpus.digest(progress) if hasattr(corpus, "digest") else {}


def tokenizer_files(tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer, by name; none for a function."""
    if not hasattr(tokenizer, "save_pretrained"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}

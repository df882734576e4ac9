"""A repository of the Hugging Face hub at one commit, and what goes wrong with one, said in a line.

What a stranger's repository lists is looked at before anything of it is downloaded: a file larger than its reader would
take is refused by name. Needs huggingface_hub, which comes with transformers; nothing is asked at import.
"""

from __future__ import annotations

import errno
import fnmatch
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..untrusted import JSON_LIMIT, first_line, shown

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_FILES, _JSON = 10_000, 64 * JSON_LIMIT  # files, and bytes of JSON, that are downloaded of a repository at once


class Repository:
    """What is in a repository, and its files in the cache of huggingface_hub.

    With HF_HUB_OFFLINE=1 nothing is asked of the hub, and what was downloaded before is used.

    Args:
        name: owner/name. revision: branch, tag or commit; None: main.

    Attributes:
        commit: the full id of the commit that all files come from; None until something was fetched offline.
        sizes: {path: bytes} of every file there, or None offline.

    Raises:
        FileNotFoundError: no such repository or revision, or offline and not in the cache.
        PermissionError: a gated repository, or one that may not be read.
        ConnectionError: the hub is not reached, or the download broke off.
    """

    def __init__(self, name: str, revision: str | None = None):
        if not is_repository(name):
            raise FileNotFoundError(f"{name}: no such folder or file (a Hugging Face repository would be owner/name)")
        from huggingface_hub import HfApi, constants

        self.name, self.revision = name, revision
        self.commit: str | None = None
        self._pinned = False
        self.sizes: dict[str, int | None] | None = None
        if not constants.HF_HUB_OFFLINE:
            with told(name, revision):
                info = HfApi().model_info(name, revision=revision, files_metadata=True)
            self.commit = info.sha
            self.sizes = {file.rfilename: file.size for file in info.siblings or ()}

    def fetch(self, *patterns: str, limits: Mapping[str, int] | None = None, progress: bool = False) -> Path:
        """The folder of the snapshot, with the files of these patterns in it.

        Args:
            patterns: as of fnmatch, whose * goes through folders.
            limits: {path: most bytes}; of *.json otherwise what `untrusted.read_json` takes.
            progress: show the bars of huggingface_hub.
        Raises:
            ValueError: more files, or larger ones, than are taken.
        """
        from huggingface_hub import snapshot_download

        limits = limits or {}
        if self.sizes is not None:
            wanted = [path for path in self.sizes if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)]
            if len(wanted) > _FILES:
                raise ValueError(f"{self.name}: expected at most {_FILES:,} files to download, got {len(wanted):,}")
            for path in wanted:
                most = limits.get(path, JSON_LIMIT if path.endswith(".json") else None)
                size = self.sizes[path]
                if most is not None and size is not None and size > most:
                    raise ValueError(
                        f"{self.name}: {shown(path)[1:-1]}: expected at most {most:,} bytes, got {size:,}; it was "
                        "not downloaded"
                    )
            plain = sum(self.sizes[path] or 0 for path in wanted if path.endswith(".json"))
            if plain > _JSON:
                raise ValueError(f"{self.name}: expected at most {_JSON:,} bytes of configurations, got {plain:,}")
        revision = self.commit if self._pinned else self.revision  # by name once, so that the cache knows the name
        with told(self.name, self.revision):
            bar = None if progress else NoBar
            folder = Path(
                snapshot_download(self.name, revision=revision, allow_patterns=list(patterns), tqdm_class=bar)
            )
        if self.commit not in (None, folder.name):
            raise ValueError(
                f"{self.name}: {self.revision or 'main'} went from commit {self.commit[:12]} to {folder.name[:12]} "
                "meanwhile: ask again, or name a commit as revision"
            )
        self.commit, self._pinned = folder.name, True
        return folder

    def folders(self, *files: str) -> list[str]:
        """Folders of the repository with one of these files in them, sorted; "" is its top. Offline none are known."""
        found = {path.rpartition("/")[0] for path in self.sizes or () if path.rpartition("/")[2] in files}
        return sorted(found)


class NoBar(tqdm):
    def __init__(self, *args, **options):
        options.pop("name", None)  # by which huggingface_hub switches its own bars
        super().__init__(*args, **{**options, "disable": True})


def is_repository(name: str) -> bool:
    """Whether a text may be the name of a repository rather than a path."""
    return _NAME.fullmatch(name) is not None and not name.endswith(".pt") and "--" not in name and ".." not in name


@contextmanager
def told(name: str, revision: str | None = None, sending: bool = False) -> Iterator[None]:
    """Whatever huggingface_hub raises inside becomes one line that says what to do; `sending`: a commit, else a
    download."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.GatedRepoError, errors.DisabledRepoError) as error:
        raise PermissionError(
            f"{name}: a gated or disabled repository: ask for access on its page on the hub, then say who you are with "
            f"`hf auth login` ({first_line(error)})"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: {'' if sending else 'not a local folder, and '}no such repository on the hub, or a private one "
            f"(`hf auth login` says who you are): {first_line(error)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: no revision {shown(revision)} in that repository") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            raise ConnectionError(_broken(name, error, sending)) from error
        if sending:
            raise ConnectionError(f"{name}: HF_HUB_OFFLINE is set: nothing can be sent") from error
        raise FileNotFoundError(
            f"{name}: not a local folder, and HF_HUB_OFFLINE is set while what is asked for was not downloaded before "
            f"(revision {revision or 'main'})"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"repo: expected owner/name, got {shown(name)}: {first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise PermissionError(
                f"{name}: the hub refuses, status {status}: `hf auth login` with a token that may do this: "
                f"{first_line(error)}"
            ) from error
        if status in (409, 412) and sending:
            raise ConnectionError(f"{name}: someone else committed meanwhile: nothing was sent, ask again") from error
        raise ConnectionError(_broken(name, error, sending)) from error
    except Exception as error:  # of the network in many kinds, which depend on the client's version; or of the disk
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise ConnectionError(_broken(name, error, sending)) from error


def _broken(name: str, error: BaseException, sending: bool) -> str:
    if sending:
        return (
            f"{name}: the hub was not reached or broke off: {type(error).__name__}: {first_line(error)}. Nothing was "
            "committed, unless the hub did and could not say so; ask again"
        )
    return (
        f"{name}: not a local folder, and the hub was not reached or broke off: {type(error).__name__}: "
        f"{first_line(error)}. Files that came whole are kept, the same call goes on; HF_HUB_OFFLINE=1 uses those alone"
    )

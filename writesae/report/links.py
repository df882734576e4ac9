"""Where an atom's page is in a feature browser (`writesae browse`), seen from a report."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, urlsplit


class Links:
    """Addresses of features in a browser that is served, or in one that was written as files.

    Args:
        browser: the address of a served one ("http://127.0.0.1:8000"), that of a written one's index.html, or the
            folder of a written one; None: there is none, and what names a feature stays text.
        page: the folder that the report is written to.

    Raises:
        ValueError: neither an address of http or https, nor a folder with an index.html.
    """

    def __init__(self, browser: str | Path | None = None, page: Path = Path()):
        self._base, self._static = None, False
        if browser is None:
            return
        text = str(browser)
        if "://" in text:
            parts = urlsplit(text)
            plain = text.isascii() and text.isprintable() and not set(text) & set(" \"'<>\\^`{}|")
            if (
                parts.scheme not in ("http", "https")
                or not parts.hostname
                or parts.query
                or parts.fragment
                or not plain
            ):
                raise ValueError(f"browse: expected an address such as http://127.0.0.1:8000, got {text!r}")
            self._static = parts.path.endswith("/index.html")
            self._base = text.removesuffix("/index.html").rstrip("/")
            return
        if not (Path(text) / "index.html").is_file():
            raise ValueError(
                f"browse: expected the address of a browser, or a folder that `writesae browse --static` wrote, got "
                f"{text!r} without index.html"
            )
        self._static = True
        self._base = quote(Path(os.path.relpath(Path(text).resolve(), page.resolve())).as_posix())

    def __call__(self, layer: int, head: int, feature: int) -> str | None:
        """The address of a feature's page, or None."""
        if self._base is None:
            return None
        # As `writesae.browse.link` says, which this folder may not import: it must run where nothing is compiled.
        place = f"L{layer}H{head}/{feature}.html" if self._static else f"{layer}/{head}/{feature}"
        return f"{self._base}/{place}"

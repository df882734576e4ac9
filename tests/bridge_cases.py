"""What the tests of bridges share: a collection of the embedded model, made once a process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from writesae.cli import main
from writesae.collect import Store

SITE = (5, 3)  # of the embedded dictionary
TEXTS = (
    "import os\nfor name in os.listdir('.'):\n    print(name, 'naïve café – 日本語')\n" * 3,
    "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 4,
)


@cache
def real_store() -> Store:
    """Of a few hundred tokens, passages of 64, the last of each document shorter; mode all."""
    root = Path(mkdtemp(prefix="bridges-"))
    (root / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (root / "text" / f"{i}.py").write_text(text)
    out = ["--out", str(root / "store"), "--context", "64", "--shard-passages", "2", "--yes"]
    assert main(["collect", str(root / "text"), *out]) == 0
    return Store(root / "store")

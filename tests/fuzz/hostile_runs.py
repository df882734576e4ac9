"""A stranger's run with script in every string and number, one at a time: `injected(seed, count, root, marker)`.

A case is accepted only if its page, parsed, has no element or attribute that the untouched run's page has not.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from watch import Case, in_child

PAYLOADS = (
    "<script>document.documentElement.setAttribute('data-owned', 1)</script>",
    "\"><img src=x onerror=document.documentElement.setAttribute('data-owned',1)>",
    "' onmouseover='x' style='x",
    "</style></title><svg onload=document.documentElement.setAttribute('data-owned',1)>",
    "1 onload=x",
    "javascript:document.documentElement.setAttribute('data-owned',1)",
    "{{ ''.__class__ }}{% for x in [1] %}owned{% endfor %}",
    "<iframe srcdoc=\"<script>parent.document.documentElement.setAttribute('data-owned',1)</script>\">",
)


class Elements(HTMLParser):
    """Names of elements with their attributes' names, and of attributes their values but pictures."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.found: set[tuple[str, tuple]] = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        kept = ((name, "picture" if name in ("src", "srcset") else value) for name, value in attributes)
        self.found.add((tag, tuple(sorted(kept, key=str))))

    handle_startendtag = handle_starttag


def places(value, path: tuple = ()) -> Iterator[tuple]:
    """Paths of every leaf of a JSON value, and of every key, whose path ends in `KEY`."""
    if isinstance(value, dict):
        for name, x in value.items():
            yield (*path, name, KEY)
            yield from places(x, (*path, name))
    elif isinstance(value, list):
        for i, x in enumerate(value):
            yield from places(x, (*path, i))
    else:
        yield path


KEY = "\0key"


def inject(summary: dict, path: tuple, payload: str) -> dict:
    """A copy of the summary with the payload there."""
    out = copy.deepcopy(summary)
    at, key = out, path[-1] == KEY
    path = path[:-1] if key else path
    for name in path[:-1]:
        at = at[name]
    if key:
        at[payload] = at.pop(path[-1])
    else:
        at[path[-1]] = payload
    return out


def without(summary: dict, path: tuple) -> dict:
    """A copy of the summary with what is there left out."""
    out = copy.deepcopy(summary)
    at, path = out, path[:-1] if path[-1] == KEY else path
    for name in path[:-1]:
        at = at[name]
    del at[path[-1]]
    return out


def everything(summary: dict, table: dict, payload: str) -> tuple[dict, dict]:
    """The payload in every text of a run that may be any text."""
    out, columns = copy.deepcopy(summary), dict(table)
    out["model"] = payload
    out["versions"] = {f"{payload}{i}": payload for i in range(3)}
    for record in out["settings"]["sites"].values():
        record["kind"] = payload
    record = next(iter(out["heads"].values()))
    out["heads"] = {payload: {**record, "n": 2, "heads": {payload: 0.5, payload + "2": 0.5}}}
    for name in ("document", "context"):
        columns[name] = table[name].copy()
    columns["document"][:] = payload
    for i, tokens in enumerate(columns["context"]):
        columns["context"][i] = [payload] * len(tokens)
    return out, columns


def write(folder: Path, summary: dict, table: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    columns = {}
    for name, column in table.items():
        if column.ndim == 2:
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
        else:
            columns[name] = pa.array(column.tolist() if column.dtype == object else column)
    pq.write_table(pa.table(columns), folder / "firings.parquet")


def injected(seed: int, count: int, root: Path, marker: Path) -> Iterator[Case]:
    """`count` runs with a payload in one place each; columns of the table first, then the whole of every text."""
    from test_report import made_up

    from writesae.report import load_run
    from writesae.report.html import render

    result = made_up(40, ("native", "atom", "delete", "random", "codebook", "zero"), reads=("after",))
    summary = json.loads(json.dumps({"model": "a model", **result.summary(50)}))
    usual = Elements(render(summary, result.table, {})).found
    draw = random.Random(seed)

    def check(page: str) -> str | None:
        strange = Elements(page).found - usual
        return f"elements of its own: {sorted(map(str, strange))[:3]}" if strange else None

    wanted = [("column", name) for name in result.table] + [("all", payload) for payload in PAYLOADS]
    leaves = list(places(summary))
    draw.shuffle(leaves)
    wanted += [(what, leaf) for leaf in leaves for what in ("leaf", "less")]
    for i, (what, at) in enumerate(wanted[:count]):
        payload = PAYLOADS[i % len(PAYLOADS)]
        folder = root / f"run{i}"
        if what == "column":
            column = np.empty(len(result), object)
            column[:] = payload
            write(folder, summary, {**result.table, at: column})
        elif what == "all":
            write(folder, *everything(summary, result.table, at))
        elif what == "less":
            write(folder, without(summary, at), result.table)
        else:
            write(folder, inject(summary, at, payload), result.table)

        def load(folder=folder):
            found, table = load_run(folder)
            return render(found, table, {})

        yield Case(f"{i}: {what} {at!r}"[:200], folder, load, check)
        shutil.rmtree(folder)


def main(seed: int = 0, count: int = 10_000) -> int:
    found = in_child("hostile_runs", "injected", seed, count)
    print(json.dumps({"runs": {**found, "bad": len(found["bad"]), "taken": len(found["taken"])}}))
    for name, why in found["bad"]:
        print(f"  {name}: {why}")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

"""Top 100 contexts of one feature out of 50 million stored firings, cold, from a fresh process.

    python bench/store_query.py [--store FOLDER] [--firings 50000000] [--model default] [--sae FOLDER]

The store is a real run, repeated (documents renumbered) until it holds that many firings, with its index built anew.
Cold: before each question the files are written back and dropped from the page cache (posix_fadvise), and a new Python
process opens the store. Timed inside it: from `Store(path)` to the last decoded context; and without the index, the
same question answered from the log.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import COLLECT, add_model, end, model_options, row

from writesae.collect import Store, build_index, files
from writesae.collect.marks import PARTS, mark
from writesae.collect.source import Site
from writesae.files import SEAL, entry, sha256, write_sealed

QUESTION = """
import json, sys, time
began = time.perf_counter()
from writesae.collect import Store
loaded = time.perf_counter()
store = Store(sys.argv[1])
layer, head, feature = map(int, sys.argv[2:5])
decode = None
if sys.argv[5] != "none":
    from tokenizers import Tokenizer
    decode = Tokenizer.from_file(sys.argv[5]).decode
    loaded = time.perf_counter()
found = store.contexts(layer, head, feature, 100, tokenizer=decode)
done = time.perf_counter()
assert len(found) == 100
log = store._log(layer, head, feature)
print(json.dumps({"answer": done - loaded, "imports": loaded - began, "log": time.perf_counter() - done,
                  "firings": len(log), "first": found[0].activation}))
"""


def repeat(source: Path, out: Path, wanted: int) -> None:
    """Writes a store of at least `wanted` firings by repeating a finished one."""
    store = Store(source)
    have = store.summary()["firings"]
    times = -(-wanted // have)
    for folder in ("firings", "tokens", "done"):
        (out / folder).mkdir(parents=True)
    parts = sorted((source / "firings").iterdir())
    documents = int(store.documents["document"].to_numpy().max()) + 1
    size = store.manifest["shard_passages"]
    write_sealed(out / "manifest.json", {name: x for name, x in store.manifest.items() if name != SEAL})
    manifest = sha256(out / "manifest.json")
    if times > 1:  # the last shard, seldom full, would shift what comes behind it
        parts = parts[:-1]
        kept = [json.loads((source / "done" / f"{p.stem}.json").read_text())["firings"] for p in parts]
        times = -(-wanted // sum(kept))
    number = 0
    for copy in range(times):
        for part in parts:
            name = f"part-{number:06d}"
            for folder, rows in (("firings", files.ROW_GROUP), ("tokens", files.TOKEN_ROWS)):
                table = _shift(pq.read_table(source / folder / part.name), "document", copy * documents)
                files.write_table(out / folder / f"{name}.parquet", table, rows)
            made = json.loads((source / "done" / f"{part.stem}.json").read_text())
            files_of = {folder: made["files"][f"{folder}/{part.name}"] for folder in PARTS}  # two are spent
            files_of |= {folder: entry(out / folder / f"{name}.parquet") for folder in ("firings", "tokens")}
            made |= {"shard": number, "manifest": manifest}
            made["files"] = {f"{folder}/{name}.parquet": x for folder, x in files_of.items()}
            write_sealed(out / "done" / f"{name}.json", {key: x for key, x in made.items() if key != SEAL})
            number += 1
    # Those of the dropped last shard too: some of them began before it.
    tables = [
        _shift(_shift(store.documents, "document", copy * documents), "first_passage", copy * len(parts) * size)
        for copy in range(times)
    ]
    files.write_table(out / "documents.parquet", pa.concat_tables(tables))
    sites = [Site(*site) for site in store.manifest["sites"]]
    counts = sum(_counts(path, sites) for path in sorted((out / "firings").iterdir()))
    build_index(out, sorted((out / "firings").iterdir()), sites, counts, store.manifest["n"])
    for path in sorted((out / "index").iterdir()):
        mark(out, path.stem, [path], manifest)
    mark(out, "tokenizer", [], manifest)
    integrity = {"manifest": manifest, "files": {"documents.parquet": entry(out / "documents.parquet")}}
    write_sealed(
        out / "summary.json", {"firings": int(counts.sum()), "shards": number, "integrity": integrity}
    )  # fmt: skip


def _shift(table: pa.Table, name: str, by: int) -> pa.Table:
    at = table.schema.get_field_index(name)
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array(table[name].to_numpy() + by, field.type))


def _counts(path: Path, sites: list[Site]) -> np.ndarray:
    table = pq.read_table(path, columns=["layer", "head", "feature"])
    columns = [table[name].to_numpy() for name in table.column_names]
    found = []
    for site in sites:
        here = (columns[0] == site.layer) & (columns[1] == site.head)
        found.append(np.bincount(columns[2][here], minlength=site.features))
    return np.concatenate(found)


def drop_cache(folder: Path) -> None:
    """Writes the folder's files back and asks the system to forget their pages."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--firings", type=int, default=50_000_000)
    parser.add_argument("--store", help="a finished collection to repeat; default: collect 200,000 tokens first")
    add_model(parser)
    parser.add_argument("--tokenizer", help="tokenizer.json to decode with; default that of the model's folder")
    parser.add_argument("--questions", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(args.store or f"{scratch}/real")
        if args.store is None:
            command = [*COLLECT, "stdlib:train", *model_options(args), "--max-tokens", "200000"]
            command += ["--out", str(source), "--yes"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out = Path(scratch) / "store"
        repeat(source, out, args.firings)
        tokenizer = Path(args.tokenizer or Path(args.model) / "tokenizer.json")
        if args.model == "default" and not args.tokenizer:
            import writesae

            tokenizer = Path(writesae.__file__).parent / "default" / "model" / "tokenizer.json"
        store = Store(out)
        total = store.summary()["firings"]
        layer, head, size, _ = store.manifest["sites"][0]
        counts = sum(_counts(p, [Site(layer, head, size, None)]) for p in sorted((out / "firings").iterdir()))
        ranked = np.argsort(-counts)[: int((counts >= 100).sum())]
        asked = ranked[np.linspace(0, len(ranked) - 1, args.questions).astype(int)].tolist()
        answers = []
        for feature in asked:
            drop_cache(out)
            command = [sys.executable, "-c", QUESTION, str(out), str(layer), str(head), str(feature)]
            done = subprocess.run(
                [*command, str(tokenizer) if tokenizer.exists() else "none"], capture_output=True, text=True, check=True
            )
            answers.append(json.loads(done.stdout))
            print(f"feature {feature} ({counts[feature]:,} firings): {answers[-1]}", flush=True)
            assert answers[-1]["firings"] == counts[feature]
        disk = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    times = [a["answer"] for a in answers]
    spread = [min(times), statistics.median(times), max(times)]
    what = f"top 100 contexts of a feature, {total} firings, cold (slowest of {len(times)} features)"
    rows = [
        row(what, max(times), "s", "<= 1", max(times) <= 1, spread=spread),
        row("all firings of a feature from the log (slowest)", max(a["log"] for a in answers), "s"),
        row("imports before the question", statistics.median(a["imports"] for a in answers), "s"),
        row("disk", disk / total, "bytes a firing", "<= 5", disk / total <= 5),
    ]
    end("store_query", rows)


if __name__ == "__main__":
    main()

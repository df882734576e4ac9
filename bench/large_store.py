"""A store of 1 G firings: what finishing it takes, and what each question costs cold, at 100 M, 300 M and 1 G.

    python bench/large_store.py [--sizes 100M 300M 1G] [--tokens 400000] [--folder /var/tmp] [--sae FOLDER]

No model runs for so long here. A real collection (400,000 tokens of the default model and its dictionary) is the pool:
documents are drawn from it at random, with all that fired in them, every activation changed by about 5 % so that the
largest are spread over the whole store, and go through the collection's own shard writer. Which features fire where,
how often and together, and what they take on disk, is so as in the real one; that a document comes again is not.
The store grows from size to size. At each, another process takes the shards up and finishes (totals, documents, the
index), as `writesae collect` does after an interruption; then every question is asked by a new process each, of files
dropped from the page cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import COLLECT, add_model, end, model_options, row
from store_query import drop_cache

from writesae.collect import Store, files
from writesae.collect.assemble import features_of
from writesae.collect.finish import finish
from writesae.collect.marks import PARTS, mark
from writesae.collect.modes import Columns
from writesae.collect.shard import Progress, Shard
from writesae.files import SEAL, entry, make_folder, sha256, write_sealed
from writesae.options import count
from writesae.text.passages import Cursor, DocumentEnd, Passage

QUESTIONS = {
    "top 100 contexts": "len(store.contexts(layer, head, feature, 100))",
    "counts": "store.counts(layer, head).num_rows",
    "at": "store.at(document, position).num_rows",
    "tokens of a document": "len(store.tokens(document))",
    "firings of a document": "sum(map(len, store.firings(document=document)))",
    "firings of a feature": "sum(map(len, store.firings(layer, head, feature)))",
    "first 1,000 firings of a feature": "len(next(store.firings(layer, head, feature, batch=1000)))",
}
ASK = """
import json, resource, sys, time
from writesae.collect import Store
import tokenizers
began = time.perf_counter(), time.process_time()
layer, head, feature, document, position = map(int, sys.argv[2:7])
store = Store(sys.argv[1])
found = {question}
ended = time.perf_counter(), time.process_time()
print(json.dumps({{"seconds": ended[0] - began[0], "processor": ended[1] - began[1], "found": found,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}))
"""


class Pool:
    """Documents of a real store, and what fired in each."""

    def __init__(self, folder: Path):
        self.store = Store(folder)
        self.features = features_of(self.store.manifest)
        ended = self.store.documents.to_pylist()
        self.documents = [d["document"] for d in ended if d["sha256"] is not None and d["passages"]]
        self.records = {d["document"]: d for d in ended}
        parts = [Columns.empty()]
        for table in self.store.firings():
            c = {name: files.numbers(table[name]) for name in table.column_names}
            key = self.features.key(c["layer"], c["head"], c["feature"])
            parts.append(Columns(key, c["document"], c["row"], c["position"], c["activation"]))
        found = Columns.cat(parts)
        found = found.take(np.argsort(found.document, kind="stable"))
        at = np.searchsorted(found.document, np.arange(max(self.records) + 2))
        self.firings = {d: found.take(slice(at[d], at[d + 1])) for d in self.documents}
        self.tokens = {d: self.store.tokens(d) for d in self.documents}


class Filling:
    """Writes shards until there are as many firings as asked for; goes on from where it was."""

    def __init__(self, pool: Pool, out: Path, seed: int = 0):
        self.pool, self.out = pool, out
        self.random = np.random.default_rng(seed)
        content = {name: x for name, x in pool.store.manifest.items() if name != SEAL}
        for name in (*PARTS, "done", "index"):
            make_folder(out, name)
        write_sealed(out / "manifest.json", content)
        write_sealed(out / "done" / "manifest.json", content)
        self.digest = sha256(out / "manifest.json")
        mark(out, "tokenizer", [], self.digest)
        self.progress = Progress(out, pool.features, None, self.digest)
        self.size, self.context = content["shard_passages"], content["context"]
        self.passages = self.documents = self.tokens = 0
        self.left: list[tuple[Passage, Columns]] = []  # of a document that did not fit in the shard before

    def until(self, firings: int) -> None:
        while self.progress.firings < firings:
            self.progress.write(self._shard())

    def _shard(self) -> Shard:
        shard, found = Shard(self.progress.shards), []
        while len(shard.passages) < self.size:
            if not self.left:
                shard.ends.append(self._draw())
            passage, columns = self.left.pop(0)
            shard.passages.append(passage)
            found.append(columns)
        columns = Columns.cat(found)
        place = np.repeat(np.arange(len(found)), [len(x) for x in found])
        order = np.argsort((columns.key * self.size + place) * self.context + columns.position)
        shard.stored = columns.take(order)
        jitter = np.exp(self.random.normal(0, 0.05, len(order))).astype(np.float32)
        shard.stored.activation = shard.stored.activation * jitter
        if self.pool.store.activations == "packed":
            from torch import from_numpy

            from writesae.models.grid import rounded

            widest = max(site.features for site in self.pool.features.sites)
            shard.stored.activation = rounded(from_numpy(shard.stored.activation), widest).numpy()
        return shard

    def _draw(self) -> DocumentEnd:
        """Another document into `left`; its row of the table, which may be a shard early."""
        drawn = int(self.random.choice(self.pool.documents))
        columns, tokens = self.pool.firings[drawn], self.pool.tokens[drawn]
        record = self.pool.records[drawn]
        first = self.passages
        for at in range(record["passages"]):
            held = tokens[at * self.context : (at + 1) * self.context]
            self.passages += 1
            self.tokens += len(held)
            after = Cursor(document=self.documents, passages=self.passages, tokens=self.tokens)
            here = columns.take(columns.row == at)
            here.document = np.full(len(here), self.documents, np.int32)
            self.left.append((Passage(self.documents, at, held, after), here))
        self.documents += 1
        name = f"{self.documents - 1}/{record['source']}"
        return DocumentEnd(
            self.documents - 1, name, record["sha256"], record["tokens"], record["passages"], first
        )  # fmt: skip


def complete(out: Path) -> dict:
    """Takes the shards up and finishes, as `collect` does; seconds of the processor, and the most memory."""
    content = json.loads((out / "manifest.json").read_text())
    digest = sha256(out / "manifest.json")
    progress = Progress(out, features_of(content), None, digest)

    def remake(wrong: str) -> Shard:
        raise AssertionError(wrong)

    began = time.process_time(), time.perf_counter()
    progress.load(remake)
    loaded, loaded_at = time.process_time(), peak()
    finish(progress, content["n"], lambda: None)
    ended = time.process_time(), time.perf_counter()
    entries = {name: entry(out / name) for name in ("documents.parquet", "features.parquet")}
    sums = {name: getattr(progress, name) for name in ("shards", "documents", "tokens", "firings")}
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file() and p.parent.name not in ("counts", "documents"))
    integrity = {"manifest": digest, "shards": progress.digest, "files": entries}
    write_sealed(
        out / "summary.json", {"complete": True, **sums, "kept": progress.firings, "bytes": size,
                               "bytes_per_firing": size / progress.firings, "integrity": integrity}
    )  # fmt: skip
    return {
        **sums, "bytes": size, "taking up": loaded - began[0], "finishing": ended[0] - loaded,
        "wall": ended[1] - began[1], "peak taking up": loaded_at, "peak": peak(),
    }  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def questions(out: Path) -> dict:
    """{question: {feature or place: answer}}, each by a process of its own, cold."""
    store = Store(out)
    counts = store.counts()
    number = files.numbers(counts["count"])
    ranked = np.argsort(-number, kind="stable")
    fired = int((number > 0).sum())
    enough = int((number >= 100).sum())
    asked = {"most frequent": ranked[0], "median": ranked[enough // 2], "rarest with 100": ranked[enough - 1],
             "rarest": ranked[fired - 1]}  # fmt: skip
    documents = store.summary()["documents"]
    found: dict = {}
    for name, question in QUESTIONS.items():
        of_feature = "feature)" in question or "feature," in question
        for what, at in asked.items() if of_feature else {"a place": ranked[0]}.items():
            layer, head, feature = (counts[n][int(at)].as_py() for n in ("layer", "head", "feature"))
            drop_cache(out)
            place = [layer, head, feature, int(documents * 0.7), 0]
            command = [sys.executable, "-c", ASK.format(question=question), str(out), *map(str, place)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(name, {})[what] = {**json.loads(done.stdout), "fired": int(number[at])}
            print(f"  {name}, {what}: {found[name][what]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=count, default=[10**8, 3 * 10**8, 10**9])
    parser.add_argument("--tokens", type=int, default=400_000, help="of the real collection")
    parser.add_argument("--folder", help="where the store is made, 5 bytes a firing; removed at the end")
    parser.add_argument("--finish", help=argparse.SUPPRESS)  # what another process is asked for
    add_model(parser)
    args = parser.parse_args()
    if args.finish:
        print(json.dumps(complete(Path(args.finish))))
        return
    scratch = Path(tempfile.mkdtemp(dir=args.folder))
    found = {}
    try:
        command = [*COLLECT, "stdlib:train", *model_options(args), "--max-tokens", str(args.tokens), "--yes"]
        subprocess.run([*command, "--out", str(scratch / "pool")], check=True, stdout=subprocess.DEVNULL)
        filling = Filling(Pool(scratch / "pool"), scratch / "store")
        for firings in args.sizes:
            began = time.process_time()
            (scratch / "store" / "summary.json").unlink(missing_ok=True)
            filling.until(firings)
            print(f"{firings:,}: written in {time.process_time() - began:.0f} s of the processor", flush=True)
            command = [sys.executable, __file__, "--finish", str(scratch / "store")]
            made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"  {made}", flush=True)
            found[firings] = {**made, "questions": questions(scratch / "store")}
    finally:
        shutil.rmtree(scratch)
    rows = []
    for made in found.values():
        for name, answers in made["questions"].items():
            slowest = max(x["seconds"] for x in answers.values())
            bound = None if name == "firings of a feature" else "<= 1"
            rows.append(
                row(f"{name}, {made['firings']:,} firings, cold (slowest)", slowest, "s", bound,
                    None if bound is None else slowest <= 1, spread=[x["seconds"] for x in answers.values()])
            )  # fmt: skip
        rows.append(row(f"finishing {made['firings']:,} firings", made["finishing"], "s of the processor"))
        rows.append(row(f"memory at most, {made['firings']:,} firings", made["peak"] / 1e6, "MB"))
        rows.append(row(f"disk, {made['firings']:,} firings", made["bytes"] / made["firings"], "bytes a firing",
                        "<= 4.5", made["bytes"] / made["firings"] <= 4.5))  # fmt: skip
    end("large_store", rows, sizes={str(firings): made for firings, made in found.items()})


if __name__ == "__main__":
    main()

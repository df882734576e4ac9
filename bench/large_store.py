"""A store of 1 G firings: what finishing it takes, and what each question costs cold, at 100 M, 300 M and 1 G.

    python bench/large_store.py [--sizes 100M 300M 1G] [--tokens 300000] [--pool FOLDER] [--folder /var/tmp]

No model runs for so long here. The shards of a real collection (default: 300,000 tokens of the default model and its
dictionary, 2.4 M firings) come again and again as other documents, every activation changed by about 5 % so that the
largest are spread over the whole store, through the collection's own shard writer (but no fsync). Which features fire
where, how often and together, and what they take on disk, is so as in the real one; that a text comes again is not.
The store grows from size to size. At each, another process takes the shards up and finishes (totals, documents, the
index), as `writesae collect` does after an interruption; then every question is asked by a new process each, of files
dropped from the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import COLLECT, add_model, end, model_options, row
from store_query import drop_cache

from writesae import files as plain
from writesae.collect import Store, files
from writesae.collect.assemble import features_of
from writesae.collect.finish import finish
from writesae.collect.marks import PARTS, mark, part_name
from writesae.collect.modes import Columns
from writesae.collect.shard import Progress, Shard, read_columns
from writesae.files import SEAL, entry, make_folder, sha256, write_sealed
from writesae.models.grid import feature_bits
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
import json, sys, time
from writesae.collect import Store
import tokenizers
began = time.perf_counter(), time.process_time()
layer, head, feature, document, position = map(int, sys.argv[2:7])
store = Store(sys.argv[1])
found = {question}
ended = time.perf_counter(), time.process_time()
print(json.dumps({{"seconds": ended[0] - began[0], "processor": ended[1] - began[1], "found": found,
                  "peak": int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024}}))
"""


class Filling:
    """Writes shards until there are as many firings as asked for; goes on from where it was.

    Args: pool: the real store, of which whole shards are used. out: a new folder.
    """

    def __init__(self, pool: Store, out: Path, activations: str, seed: int = 0):
        self.random = np.random.default_rng(seed)
        content = {name: x for name, x in pool.manifest.items() if name != SEAL}
        content["source"] = {**content["source"], "activations": activations}
        self.size, self.context = content["shard_passages"], content["context"]
        for name in (*PARTS, "done", "index"):
            make_folder(out, name)
        write_sealed(out / "manifest.json", content)
        shutil.copyfile(out / "manifest.json", out / "done" / "manifest.json")
        mark(out, "tokenizer", [], sha256(out / "manifest.json"))
        features = features_of(content)
        self.bits = feature_bits(max(site.features for site in features.sites)) if activations == "packed" else 1
        self.progress = Progress(out, features, None, sha256(out / "manifest.json"))
        self.shards = [self._shard(pool, number) for number in range(pool.summary()["shards"] - pool.complete)]
        self.passages, self.documents = self._ends(pool)
        self.written = 0

    def _shard(self, pool: Store, number: int) -> tuple[Columns, list]:
        """(firings, [(document, row, tokens)]) of a shard."""
        columns = read_columns(pool.file(f"firings/{part_name(number)}"), self.progress.features)
        table = files.read_table(pool.file(f"tokens/{part_name(number)}"), files.TOKENS)
        c = {name: files.numbers(table[name]) for name in table.column_names}
        start = np.flatnonzero(c["position"] == 0)
        held = np.split(c["token"], start[1:])
        return columns, list(zip(c["document"][start].tolist(), c["row"][start].tolist(), held, strict=True))

    def _ends(self, pool: Store) -> tuple[int, int]:
        """Puts each document's row to the shard it ends in, its last one's where it does not; (passages, documents)."""
        sources = dict(enumerate(pool.documents["source"].to_pylist()))
        last: dict[int, list] = {}  # shard, tokens, passages, first passage
        passage = 0
        for number, (_, passages) in enumerate(self.shards):
            for document, _, held in passages:
                found = last.setdefault(document, [number, 0, 0, passage])
                found[0], found[1], found[2] = number, found[1] + len(held), found[2] + 1
                passage += 1
        self.ends: list[list] = [[] for _ in self.shards]
        for document, (number, *counts) in last.items():
            self.ends[number].append((document, sources.get(document, "cut.py"), counts))
        return passage, max(last) + 1

    def until(self, firings: int) -> None:
        while self.progress.firings < firings or self.written % len(self.shards):  # or a document would not end
            copy, at = divmod(self.written, len(self.shards))
            self.progress.write(self._copy(copy, at))
            self.written += 1

    def _copy(self, copy: int, at: int) -> Shard:
        columns, passages = self.shards[at]
        by, first = copy * self.documents, copy * self.passages
        jitter = self.random.standard_normal(len(columns), np.float32) * np.float32(0.05)
        activation = columns.activation * np.exp(jitter)
        half = (1 << (self.bits - 1)) >> 1
        rounded = (activation.view(np.int32) + half) & -(1 << (self.bits - 1))
        shard = Shard(self.written)
        shard.stored = Columns(
            columns.key, columns.document + np.int32(by), columns.row, columns.position, rounded.view(np.float32)
        )  # fmt: skip
        number = self.written * self.size
        for document, row_, held in passages:
            number += 1
            shard.passages.append(Passage(document + by, row_, held, Cursor(passages=number)))
        shard.ends = [
            DocumentEnd(document + by, f"{copy}/{source}", "0" * 64, tokens, count_, first_ + first)
            for document, source, (tokens, count_, first_) in self.ends[at]
        ]
        return shard


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
    """Resident bytes at most; not getrusage's, which count the process that started this one."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


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
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(name, {})[what] = {**json.loads(done.stdout), "fired": int(number[at])}
            print(f"  {name}, {what}: {found[name][what]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=count, default=[10**8, 3 * 10**8, 10**9])
    parser.add_argument("--tokens", type=int, default=300_000, help="of the real collection")
    parser.add_argument("--pool", help="a real collection, finished or not; default: one is made")
    parser.add_argument("--activations", choices=("packed", "exact"), default="packed")
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
        pool = args.pool or str(scratch / "pool")
        if args.pool is None:
            command = [*COLLECT, "stdlib:train", *model_options(args), "--max-tokens", str(args.tokens), "--yes"]
            command += ["--activations", "exact", "--out", pool]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        plain._sync = lambda path: None
        filling = Filling(Store(pool), scratch / "store", args.activations)
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
            busy = max(x["processor"] for x in answers.values())
            bound = None if name == "firings of a feature" else "<= 1"
            rows.append(
                row(f"{name}, {made['firings']:,} firings, cold (slowest)", slowest, "s", bound,
                    None if bound is None else slowest <= 1, spread=[x["seconds"] for x in answers.values()])
            )  # fmt: skip
            rows.append(row(f"{name}, {made['firings']:,} firings (slowest)", busy, "s of the processor"))
        rows.append(row(f"finishing {made['firings']:,} firings", made["finishing"], "s of the processor"))
        rows.append(row(f"memory at most, {made['firings']:,} firings", made["peak"] / 1e6, "MB"))
        rows.append(row(f"disk, {made['firings']:,} firings", made["bytes"] / made["firings"], "bytes a firing",
                        "<= 4.5", made["bytes"] / made["firings"] <= 4.5))  # fmt: skip
    end("large_store", rows, sizes={str(firings): made for firings, made in found.items()})


if __name__ == "__main__":
    main()

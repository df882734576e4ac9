"""What storing costs a collection: whole runs of `collect` against the same hooked passes with nothing kept.

The embedded model and dictionary on the Python standard library's sources. Ours is the whole of a `collect` call: text
read and tokenised, hooked passes, shards, index, summary. One peer does the same without storing (the target); the
other has its batches of tokens ready in memory and only runs the hooked model. Both sides see the same passages in the
same batches, and what is stored must be what the passes gave.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .case import Case, Disagree, Options, Row
from .timing import interleaved, ratio_row

FORWARD, READY = "the same without storing", "hooked passes on tokens in memory"


def overhead(options: Options) -> Iterator[Row]:
    from ..collect import Corpus, ModelSource, collect
    from ..collect.estimate import batches
    from ..models import load
    from ..sae import SAE
    from ..text.passages import Passage, passages
    from ..text.tokens import tokenizing

    tokens = 8_000 if options.quick else 100_000
    context, batch, shard = 512, 16, 64
    model, tokenizer = load("default")
    (folder,) = (Path(__file__).parents[1] / "default" / "sae").iterdir()
    sae = SAE.from_pretrained(folder)
    source = ModelSource(model, {(sae.layer, sae.head): sae}, accelerate=True)
    corpus = Corpus.from_name("stdlib:train")
    tokenize, first = tokenizing(tokenizer)

    def read() -> Iterator[list]:
        """The batches of each shard."""
        held = []
        for event in passages(corpus, tokenize, context, first, tokens):
            if isinstance(event, Passage):
                held.append(event)
            if len(held) == shard:
                yield list(batches(held, batch))
                held = []
        if held:
            yield list(batches(held, batch))

    def passes(shards) -> tuple[int, float]:
        """(firings, sum of activations) of every batch."""
        count, total = 0, 0.0
        with source:
            for shard in shards:
                for _, ids, mask in shard:
                    found = source.firings(ids, mask)
                    count, total = count + len(found.activation), total + float(found.activation.double().sum())
        return count, total

    ready = list(read())
    scratch = Path(tempfile.mkdtemp(prefix="writesae-bench-"))
    out = scratch / "out"

    def ours():
        shutil.rmtree(out, ignore_errors=True)
        summary = collect(corpus, tokenizer, source, out, context=context, batch=batch, max_tokens=tokens,
                          shard_passages=shard)  # fmt: skip
        assert summary["complete"]
        return summary

    try:
        summary = ours()
        count, total = passes(read())
        kept, activations = 0, 0.0
        for path in sorted((out / "firings").iterdir()):
            column = _activations(path)
            kept, activations = kept + len(column), activations + float(column.sum())
        if not (kept == count == summary["firings"] and abs(activations - total) <= 1e-6 * total):
            raise Disagree(f"stored {kept} firings of sum {activations}, the passes gave {count} of sum {total}")
        runs = [ours, lambda: passes(read()), lambda: passes(ready)]
        whole, reading, bare = interleaved(runs, options.rounds(5), warmup=0)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    name = f"collection of {summary['tokens']:,} tokens, {count:,} firings, whole run"
    row = ratio_row(name, FORWARD, "x time", whole, reading, target=1.1, aim=1.03)
    row.note = f"{summary['tokens'] / row.seconds:,.0f} tokens a second"
    yield row
    yield ratio_row(name, READY, "x time", whole, bare)


def _activations(path: Path):
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["activation"])["activation"].to_numpy().astype("float64")


CASES = [Case("collect", "collection, whole run", overhead, FORWARD)]

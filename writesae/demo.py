"""`writesae demo`: the embedded model and dictionary, end to end, on text neither has seen.

Collects the firings of the held-out text, shows the strongest atoms, runs the replacement test of the dictionary of
states and of those of writes, codes every write of the latter's heads in closed loop, and writes `summary.json`,
pictures and self-contained pages, `report.html` first.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from .files import refuse_link, write_json

_CONTEXTS = 4
_TRAIN_TOKENS = 60_000  # for a codebook of native writes
_PASSAGES, _CONTEXT = 32, 128  # of the closed loop, whose time goes with the latter
_SUMMARY = (
    "model site tokens tokens_per_second firings n headline atom_vs_codebook atom_vs_codebook_ci95 win_rate "
    "win_rate_ci95 strict_chain kl_median native_kl_max fvu l0 backend seconds"
).split()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder to write to; an earlier demo there is redone")  # fmt: skip
    parser.add_argument("--firings", type=int, default=1500, help="firings of the held-out text to test")
    parser.add_argument("--atoms", type=int, default=8, help="atoms to print, the strongest first")
    parser.add_argument("--horizon", type=int, default=8, help="tokens followed after the edit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of firings and of what is drawn")


def run(args: argparse.Namespace) -> int:
    """Prints what it finds as it goes. Returns 0."""
    began = time.perf_counter()
    _need_extras()
    from . import report
    from .collect import ModelSource, Store, collect
    from .default import load_default, load_dictionaries
    from .experiments import passages_of, run_replacement
    from .experiments.command import about
    from .experiments.replace import select_tokens
    from .ops import _dispatch
    from .text import Corpus

    model, tokenizer, saes = load_default()
    (site, sae), *_ = saes.items()
    backend = "cpu" if _dispatch.can_run("cpu", "encode", {}) else "reference"
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"model: {parameters / 1e6:.1f} M parameters, Qwen3.5 architecture, trained on the Python standard library\n"
        f"site: layer {site[0]}, head {site[1]}; state {sae.K} x {sae.V}; dictionary of {sae.F:,} rank-1 atoms, "
        f"{sae.k} active a token; backend {backend}"
    )

    if args.out.exists():
        _refuse_foreign(args.out)
        shutil.rmtree(args.out)
    corpus = Corpus.from_name("stdlib:test")
    print(f"\n1. firings of {len(corpus)} held-out modules")
    source = ModelSource(model, {site: sae}, accelerate=True)
    collected = collect(corpus, tokenizer, source, args.out / "firings", context=512, progress=True)
    if not collected["complete"]:
        raise KeyboardInterrupt
    print(
        f"   {collected['firings']:,} firings of {collected['tokens']:,} tokens at "
        f"{collected['tokens_per_second']:,.0f} tokens/s; {collected['bytes_per_firing']:.2f} bytes a firing"
    )

    print("\n2. what the strongest atoms fire on")
    store = Store(args.out / "firings")
    _show_atoms(store, site, tokenizer, args.atoms)

    print(f"\n3. replacement test: {args.firings:,} held-out firings")
    select = passages_of(
        Corpus.from_name("stdlib:validation"), tokenizer, max_tokens=select_tokens(args.firings), seed=args.seed
    )  # fmt: skip
    train = passages_of(Corpus.from_name("stdlib:train"), tokenizer, max_tokens=_TRAIN_TOKENS, seed=args.seed)
    result = run_replacement(
        model, tokenizer, sae, tested := passages_of(corpus, tokenizer), select=select, train=train, read="both",
        natives=("increment",), firings=args.firings, horizon=args.horizon, seed=args.seed, out=args.out / "parts",
    )  # fmt: skip
    quality = _evaluate(model, tokenizer, sae, corpus)
    train = passages_of(Corpus.from_name("stdlib:train"), tokenizer, max_tokens=_TRAIN_TOKENS // 3, seed=args.seed)
    of_writes = load_dictionaries("write")
    writes = _writes(model, tokenizer, of_writes, corpus, train, args)
    closed_loop = _closed_loop(model, tokenizer, of_writes, corpus, args)
    extra = {
        "model": "writesae default", "site": f"{site[0]}:{site[1]}", "firings": collected["firings"],
        "fvu": quality["fvu"], "l0": quality["l0"], "alive": quality["alive"], "dictionary": quality,
        "backend": backend, "corpus": "stdlib:test", "select": "stdlib:validation",
        "train": "stdlib:train", "writes": writes, "closed_loop": closed_loop,
        "atoms": about(model, tokenizer, {site: sae}, result, tested),
    }  # fmt: skip
    summary = result.save(args.out, **extra)
    # Of the collection, whose tokens and speed these are, not of the test's part of them.
    summary["tokens"], summary["tokens_per_second"] = collected["tokens"], collected["tokens_per_second"]
    page = report.build((summary, report.load_run(args.out)[1]), args.out)
    summary["seconds"] = time.perf_counter() - began
    ordered = {name: summary[name] for name in _SUMMARY}
    ordered.update({name: value for name, value in summary.items() if name not in ordered})
    write_json(args.out / "summary.json", ordered)
    _show_result(summary, page)
    return 0


def _writes(model, tokenizer, saes, corpus, train, args) -> dict:
    """The replacement test of the dictionaries of writes, at tokens drawn from all; what the first page says of it."""
    from . import report
    from .experiments import passages_of, run_replacement

    each = -(-args.firings // (4 * len(saes)))
    print(f"\n4. the same with dictionaries of writes, at the {len(saes)} heads with the longest memory, {each} each")
    out = args.out / "writes"
    conditions = ("native", "atom", "delete", "codebook", "reconstruction", "codebook_reconstruction")
    result = run_replacement(
        model, tokenizer, saes, passages_of(corpus, tokenizer), train=train, natives=("increment",),
        scales=("matched",), conditions=conditions, firings=each, horizon=args.horizon, seed=args.seed, out=out,
    )  # fmt: skip
    summary = result.save(out, model="writesae default", corpus="stdlib:test", train="stdlib:train")
    report.build(out, out)
    rows = {row["condition"]: row for row in summary["pooled"]}
    record = {
        "n": summary["n"], "heads": len(saes), "atom_vs_codebook": summary["atom_vs_codebook"],
        "atom_vs_codebook_ci95": summary["atom_vs_codebook_ci95"], "win_rate": summary["win_rate"],
        "win_rate_ci95": summary["win_rate_ci95"], "k": max(sae.k for sae in saes.values()),
        "all_atoms": rows["reconstruction"]["upper"]["rate"], "all_atoms_ci95": rows["reconstruction"]["upper"]["ci95"],
    }  # fmt: skip
    print(
        f"   one atom, at the write's norm, after the read, is closer than\n"
        f"      an untrained codebook   {_rate(record, 'atom_vs_codebook')}\n"
        f"      deletion                {_rate(record, 'win_rate')}\n"
        f"   {record['k']} atoms, where deletion costs more than its median, are closer than\n"
        f"      deletion                {_rate(record, 'all_atoms')}"
    )
    return record


def _closed_loop(model, tokenizer, saes, corpus, args) -> dict:
    """Every write of those heads coded; what the first page says of it."""
    from .experiments import run_recovered
    from .experiments.recovered_result import printed
    from .report import recovered as page
    from .sae import Passages
    from .text import Corpus

    print(f"\n5. every write of all {len(saes)} coded, closed loop, on {_PASSAGES * _CONTEXT:,} held-out tokens")
    draw, _ = corpus.shuffled(args.seed)
    text = Passages.from_corpus(draw, tokenizer, _CONTEXT, max_tokens=2 * _PASSAGES * _CONTEXT)
    other, _ = Corpus.from_name("stdlib:train").shuffled(args.seed)
    book = Passages.from_corpus(other, tokenizer, _CONTEXT, max_tokens=_TRAIN_TOKENS // 3)
    out = args.out / "recovered"
    result = run_recovered(
        model, saes, Passages(text.ids[:_PASSAGES]), codebook=book, ks=(1, 8), by=("all",), read="before",
        batch=_PASSAGES, seed=args.seed, out=out,
    )  # fmt: skip
    summary = result.save(out, model="writesae default", corpus="stdlib:test", train="stdlib:train")
    page.build(summary, out)
    print("   " + printed(summary).replace("\n", "\n   "))
    last = summary["groups"][-1]
    return {
        "read": last["read"], "heads": last["heads"], "plain": summary["plain"], "deleted": last["deleted"],
        "arms": [{name: arm[name] for name in ("condition", "k", "share", "ci95")} for arm in last["arms"]],
    }  # fmt: skip


def _rate(record: dict, name: str) -> str:
    low, high = record[f"{name}_ci95"]
    return f"{record[name]:.1%} ({low:.1%} to {high:.1%})"


def _evaluate(model, tokenizer, sae, corpus) -> dict:
    from .sae import ModelStream, Passages, evaluate
    from .sae.block import Block

    passages = Passages.from_corpus(corpus, tokenizer, 256)
    with ModelStream(model, passages, [(sae.layer, sae.head)]) as stream:
        parts = list(stream.writes(range(0, len(passages), 3)))
    return evaluate(sae, Block([part[sae.layer] for part in parts], sae.head), states=20_000)


def _need_extras() -> None:
    """Says which extra is missing before minutes of work, not after."""
    from importlib.util import find_spec

    missing = [name for name in ("scipy", "statsmodels", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; pip install 'writesae[experiments]'")


def _refuse_foreign(out: Path) -> None:
    ours = {
        "firings", "firings.browse", "parts", "plots", "writes", "recovered", "summary.json", "firings.parquet",
        "report.html",
    }  # fmt: skip
    refuse_link(out)
    others = sorted(path.name for path in out.iterdir() if path.name not in ours) if out.is_dir() else [out.name]
    if others:
        raise ValueError(f"out: expected a new folder or an earlier demo's, got {out} with {', '.join(others[:5])}")


def _show_atoms(store, site: tuple[int, int], tokenizer, number: int) -> None:
    """Prints the atoms with the largest total activation, each with its strongest contexts of different passages."""
    import pyarrow.compute as pc

    counts = store.counts(*site)
    order = pc.sort_indices(counts, [("sum", "descending"), ("feature", "ascending")])
    for feature in counts["feature"].take(order[:number]).to_pylist():
        row = counts.filter(pc.equal(counts["feature"], feature)).to_pylist()[0]
        print(f"   atom {feature}: {row['count']:,} firings, strongest {row['max']:.3g}")
        seen = set()
        for c in store.contexts(*site, feature, n=40, width=10, tokenizer=tokenizer):
            if (c.document, c.row) in seen:
                continue
            seen.add((c.document, c.row))
            flat = [x.replace("\n", "⏎").replace("\t", " ") for x in (c.before, c.token, c.after)]
            print(f"      {c.activation:7.3f}  {flat[0][-34:]:>34}[{flat[1]}]{flat[2][:22]:22}  {c.source}")
            if len(seen) == _CONTEXTS:
                break


def _show_result(summary: dict, page: Path) -> None:
    def rate(x: dict) -> str:
        return f"{x['rate']:.1%} ({x['ci95'][0]:.1%} to {x['ci95'][1]:.1%})"

    print(f"\n   {summary['n']:,} firings; share with the atom closer, and its 95 % interval")
    print(f"   {'state changed, size of the atom':34}{'than an untrained codebook':32}than deletion")
    for read in summary["settings"]["reads"]:
        for scale, text in (("coef", "its own"), ("matched", "the write's")):
            test = summary["tests"][f"{read}/increment/{scale}"]["mean"]["forward"]
            name = f"{read} the read, {text}"
            print(f"   {name:34}{rate(test['atom_against']['codebook']):32}{rate(test['win_rate'])}")
    names = {"delete": "deletion", "zero": "state emptied"}
    medians = "\n".join(f"      {names.get(c, c):14} {x:.2e}" for c, x in summary["kl_median"].items())
    print(
        f"   median KL in nats, changed after the read, own size:\n{medians}\n"
        f"   atom < deletion < random:  {summary['strict_chain']:.1%}\n"
        f"   the paper, another model:  atom closer than deletion {summary['paper']['win_rate']:.1%}, chain "
        f"{summary['paper']['strict_chain']:.1%}; no codebook\n"
        f"   native write put back:     largest KL {summary['native_kl_max']}\n"
        f"   dictionary on this text:   FVU {summary['fvu']:.3f}, L0 {summary['l0']:.1f}, {summary['alive']} alive"
    )
    for name, site in summary["settings"]["sites"].items():
        if site["chosen_of"]:
            print(f"   site {name} was chosen by its outcome, of {site['chosen_of']}: it speaks for no other")
    print(f"\nreport: {page}   ({summary['seconds']:.0f} s)")

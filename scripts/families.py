"""The replacement test on the stand-ins of every family of write rules: one table.

    python scripts/families.py [--models writesae/default/families] [--work runs/families] [--family mamba2 ...]

For each model: the heads whose writes last longest are its sites, by the decays on the training split and nothing
else; dictionaries of writes are trained at all of them and, where the gate is scalar, dictionaries of states; each is
put to the replacement test on the test split, features chosen on the validation split. The settings were not chosen by
any result, and hold for every family, but that under an element gate and for RWKV-7, which erases by a write of its
own, there is no readers' metric. DeltaNet has no decays: there all heads tie, and the first two of layer 0 are its
sites. RWKV-7's write is the new one of its two. Models of flash-linear-attention need it to be installed. What is
there already is not made again; --firings and --steps make a quicker, rougher table.

The paper's rows are of other models and other dictionaries. They stand beside, and are no target.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from writesae.cli import main as writesae
from writesae.experiments import passages_of
from writesae.experiments.sites import longest_memory, memory
from writesae.files import write_json
from writesae.interrupt import script
from writesae.models import layers, load
from writesae.text import Corpus

# J. Young, arXiv 2605.12770: share of firings at which the atom disturbs less than deletion.
PAPER = {"Mamba-2": 0.881, "RWKV-7": 0.453, "DeltaNet": 0.483, "Gated DeltaNet": 0.924}
COMMON = [
    "-F", "1024", "--batch", "8", "--block", "128", "--prepare", "64", "--max-tokens", "600000", "--eval-passages",
    "32", "--watch-passages", "0", "--quiet",
]  # fmt: skip
TARGETS = {  # as the embedded model's dictionaries are trained, with fewer atoms and steps
    "write": ["--target", "write", "--sparsity", "pursuit", "--metric", "readers", "--balance", "1", "-k", "8",
              "--also-k", "1", "--states", "512", "--lr", "0.01", "--lr-end", "0.0001", "--dead-after", "30",
              "--resample-every", "50"],
    "state": ["--target", "state", "-k", "32", "--lr", "0.001", "--lr-end", "0.0001"],
}  # fmt: skip


def sites_of(model, tokenizer, number: int) -> dict[tuple[int, int], float]:
    """The heads with the longest memory on the training split, with it in tokens."""
    text = [p.tokens for p in passages_of(Corpus.from_name("stdlib:train"), tokenizer, max_tokens=30_000)]
    every = memory(model, text)
    return {site: every[site] for site in longest_memory(model, text, number)}


def run(command: list[str]) -> None:
    if status := writesae(command):
        raise SystemExit(status)


def settings(target: str, readers: bool) -> list[str]:
    """Of a dictionary's training. Readers are followed under a scalar or channel gate without an erase of its own."""
    return [word if word != "readers" or readers else "frobenius" for word in TARGETS[target]]


def tested(folder: Path, place: Path, target: str, readers: bool, sites: dict, args) -> dict:
    """Summary of the replacement test of one kind of dictionary of a model, made where it is not there."""
    trained, out = place / target, place / f"replace-{target}"
    if not (out / "summary.json").exists():
        if not (trained / "metrics.json").exists():
            where = [word for layer, head in sorted(sites) for word in ("--site", f"{layer}:{head}")]
            resume = ["--resume"] if (trained / "checkpoint.pt").exists() else []
            run(["train", "--model", str(folder), *where, *settings(target, readers), *COMMON, "--steps",
                 str(args.steps), "--out", str(trained), *resume])  # fmt: skip
        several = trained if len(sites) > 1 else Path("{}:{}={}".format(*next(iter(sites)), trained))
        run(["replace", "--model", str(folder), "--sae", str(several), "--firings", str(args.firings), "--native",
             "increment", "--out", str(out)])  # fmt: skip
    return json.loads((out / "summary.json").read_text())


def row(family: str, rule: str, target: str, sites: dict, loss: float | None, summary: dict) -> dict:
    keys = ("n", "win_rate", "win_rate_ci95", "atom_vs_codebook", "atom_vs_codebook_ci95", "strict_chain", "kl_median",
            "cosine_median", "native_kl_max", "features")  # fmt: skip
    return {
        "family": family, "rule": rule, "dictionary": target, "validation_loss": loss,
        # A write that nothing fades lasts for ever: None.
        "sites": {f"{at[0]}:{at[1]}": round(tokens, 1) if tokens < 1e9 else None for at, tokens in sites.items()},
        "write": sorted({found["write"] for found in summary["settings"]["sites"].values()}),
        **{key: summary[key] for key in keys},
        "by_site": {site: found["rate"] for site, found in summary["sites"].items()},
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""

    def percent(rate, interval=None):
        if rate is None:
            return "–"
        return f"{100 * rate:.1f} %" + (f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})" if interval else "")

    lines = [
        "| model | rule | dictionary of | firings | beats deletion (95 %) | beats the codebook (95 %) | chain | "
        "median KL: atom, deletion, codebook, random | cosine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        kl = ", ".join(f"{r['kl_median'][c]:.2e}" for c in ("atom", "delete", "codebook", "random"))
        lines.append(
            f"| {r['family']} | {r['rule']} | {r['dictionary']}s | {r['n']} | "
            f"{percent(r['win_rate'], r['win_rate_ci95'])} | "
            f"{percent(r['atom_vs_codebook'], r['atom_vs_codebook_ci95'])} | {percent(r['strict_chain'])} | {kl} | "
            f"{r['cosine_median']:.2f} |"
        )
    lines += [f"| paper: {name} | | states | | {percent(rate)} | | | | |" for name, rate in PAPER.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", type=Path, default=Path("writesae/default/families"), help="folder of the stand-ins"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/families"))
    parser.add_argument("--family", nargs="+", help="these only (default: all in --models)")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="dictionaries of what")
    parser.add_argument("--sites", type=int, default=2, help="heads of a model, those of the longest memory")
    parser.add_argument("--steps", type=int, default=200, help="training steps of a dictionary")
    parser.add_argument("--firings", type=int, default=200, help="firings tested at each site")
    args = parser.parse_args()
    names = args.family or sorted(path.parent.name for path in args.models.glob("*/config.json"))
    if not names:
        parser.error(f"--models: expected a folder of models in {args.models}, got none")
    rows = []
    for name in names:
        folder, place = args.models / name, args.work / name
        model, tokenizer = load(folder)
        binding = layers(model)[0].binding
        sites = sites_of(model, tokenizer, args.sites)
        losses = folder / "training.json"
        loss = json.loads(losses.read_text()).get("validation", {}).get("loss") if losses.exists() else None
        for target in args.target:
            if target == "state" and binding.gate != "scalar":
                continue  # the paper has states of this gate alone
            rule = f"{binding.rule.name}, {binding.gate} gate"
            readers = binding.gate != "element" and not binding.erases_apart
            rows.append(row(name, rule, target, sites, loss, tested(folder, place, target, readers, sites, args)))
            write_json(args.work / "families.json", {"rows": rows, "paper": PAPER})
    print(table(rows))


if __name__ == "__main__":
    script(main)

"""`writesae paper`: the paper's experiments, each by name, or all of them in one report."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ..options import add_device, add_dictionaries, add_model, dictionaries, require_device
from ..text.arguments import NAMED
from .lab import SPLITS, TEXTS, Lab
from .study import Setting, Study, remember, save, studies


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", metavar="NAME", help="studies to run; --list says which there are")
    parser.add_argument("--all", action="store_true", help="run every study and write one report of them")
    parser.add_argument("--list", action="store_true", help="list the studies with their settings and stop")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that all runs (about 15 minutes "
                        "for all on two cores)")  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="[STUDY.]NAME=VALUE", help="another value for a "
                        "setting of --list, as JSON or text; repeatable (default: that of --list)")  # fmt: skip
    what = parser.add_argument_group("what is studied")
    add_model(what)
    add_dictionaries(what)
    for split in SPLITS:
        what.add_argument(
            f"--{split}", default=TEXTS[split], metavar="CORPUS", help=f"text of the {split} split: {NAMED}"
        )
    what.add_argument(
        "--field", default="text", help="field of JSON, or column of Parquet or a data set, with the text"
    )
    what.add_argument("--no-bos", action="store_true", help="do not begin documents with the first token")
    how = parser.add_argument_group("how")
    how.add_argument("--seed", type=int, default=0, help="seed of every draw")
    add_device(how)
    how.add_argument("--out", metavar="DIR", default="runs/paper", help="folder to write to, one folder a study in it; "
                     "the same command on it resumes")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints each study's answers. Returns 0, or 1 where a study of --all failed."""
    known = studies()
    if args.list:
        print(listed(known.values()))
        return 0
    wrong = [name for name in args.name if name not in known]
    if wrong or bool(args.name) == args.all:
        got = ", ".join(wrong) if wrong else "both" if args.all else "neither"
        raise ValueError(f"name: expected some of {', '.join(known)}, or --all, got {got}")
    chosen = [known[name] for name in (known if args.all else dict.fromkeys(args.name))]
    settings = {study.name: dict(_settings(study, args.quick)) for study in chosen}
    for text in args.set:
        _override(text, settings, {study.name: study.settings for study in chosen})
    require_device(args.device)
    import torch

    from ..models import load

    found = dictionaries(args)
    if not args.sae:  # the embedded model's own, of both kinds
        written = dictionaries(args, "write")
    else:
        written = {site: sae for site, sae in found.items() if sae.target == "write"}
        found = {site: sae for site, sae in found.items() if sae.target == "state"}
    for study in chosen:
        if study.needs and not {"state": found, "write": written}[study.needs]:
            raise ValueError(f"sae: {study.name} takes dictionaries of {study.needs}s, got none")
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.trust_remote_code)
    model = model.to(args.device)
    saes, writes = ({site: sae.to(args.device) for site, sae in x.items()} for x in (found, written))
    failed: dict[str, str] = {}
    for study in chosen:
        folder = Path(args.out) / study.name
        lab = Lab(
            model, tokenizer, saes, writes, texts={split: getattr(args, split) for split in SPLITS},
            settings=settings[study.name], folder=folder, quick=args.quick, seed=args.seed, any_model=args.any_model,
            name=study.name, field=args.field, bos=not args.no_bos,
        )  # fmt: skip
        try:
            told(study, one(study, lab, folder, _record(args, study, settings[study.name])))
        except (ValueError, RuntimeError) as error:
            if not args.all:
                raise
            failed[study.name] = str(error)
            print(f"writesae paper {study.name}: {error}", file=sys.stderr)
    remember(Path(args.out), known.values(), {study.name for study in chosen}, failed)
    if args.all:
        from ..report import paper

        print(f"report: {paper.build(args.out)}")
    if failed:
        print(f"writesae paper: failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def one(study: Study, lab: Lab, folder: Path, record: dict) -> dict:
    """Runs a study and writes it down; returns its summary."""
    from ..experiments.result import versions
    from ..models.quiet import quiet

    start = time.perf_counter()
    with quiet():
        findings = study.run(lab)
    seconds = round(time.perf_counter() - start, 1)
    return save(study, findings, folder, {**record, "seconds": seconds, "versions": versions()})


def told(study: Study, summary: dict) -> None:
    """Prints the answers, a line a claim."""
    print(f"{study.title} ({summary['seconds']:.0f} s)")
    for claim, answer in zip(study.claims, sorted(summary["answers"], key=_order(study)), strict=True):
        interval = "" if answer["ci95"] is None else " [{:.3g}, {:.3g}]".format(*answer["ci95"])
        print(f"  {claim.says}\n    paper: {claim.paper}\n    here: {answer['ours']}{interval}, n = {answer['n']:,} "
              f"{answer['of']}: {answer['verdict']}\n    null models: {answer['nulls']}")  # fmt: skip


def _order(study: Study):
    keys = [claim.key for claim in study.claims]
    return lambda answer: keys.index(answer["claim"])


def listed(known) -> str:
    """Every study with its settings, for a terminal."""
    lines = []
    for study in known:
        lines.append(f"{study.name:22}{study.title}")
        lines += [f"    --set {study.name}.{name}={_shown(s.full)}  {s.help} (quick: {_shown(s.quick)})"
                  for name, s in study.settings.items()]  # fmt: skip
    return "\n".join(lines)


def _shown(value) -> str:
    return json.dumps(value).replace(" ", "") if not isinstance(value, str) else value


def _settings(study: Study, quick: bool) -> dict:
    return {name: setting.quick if quick else setting.full for name, setting in study.settings.items()}


def _override(text: str, settings: dict[str, dict], known: Mapping[str, Mapping[str, Setting]]) -> None:
    """Puts one --set in its place: in the study named, or in every chosen study that has it."""
    where, equals, value = text.partition("=")
    study, dot, name = where.rpartition(".")
    if not equals or (dot and study not in known):
        raise ValueError(f"set: expected [STUDY.]NAME=VALUE of a study that is run, got {text!r}")
    places = [study] if dot else [s for s in known if name in known[s]]
    if not places or name not in known[places[0]]:
        have = sorted({f"{s}.{n}" for s in known for n in known[s]})
        raise ValueError(f"set: expected one of {', '.join(have)}, got {where}")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    for place in places:
        default = settings[place][name]
        new = tuple(parsed) if isinstance(parsed, list) else parsed
        if isinstance(default, float) and type(new) is int:
            new = float(new)
        if default is not None and type(new) is not type(default):
            raise ValueError(f"set: {place}.{name}: expected a value like {_shown(default)}, got {value}")
        settings[place][name] = new


def _record(args: argparse.Namespace, study: Study, settings: dict) -> dict:
    shown = ["writesae", "paper", study.name, *(["--quick"] if args.quick else [])]
    for name, default in _settings(study, args.quick).items():
        if settings[name] != default:
            shown += ["--set", f"{study.name}.{name}={_shown(settings[name])}"]
    for option in ("model", *SPLITS, "field"):
        value, default = getattr(args, option), {"model": "default", "field": "text", **TEXTS}[option]
        shown += [] if value == default else [f"--{option}", str(value)]
    shown += [word for path in args.sae for word in ("--sae", path)] + (["--seed", str(args.seed)] if args.seed else [])
    return {
        "command": shlex.join(shown), "model": str(args.model), "seed": args.seed, "quick": args.quick,
        "settings": settings, "texts": {split: getattr(args, split) for split in SPLITS},
    }  # fmt: skip

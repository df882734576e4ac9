"""`writesae export`: a dictionary, a collection or a prompt in the format of another tool."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files import refuse_file, whole_folder
from ..options import add_dictionaries, add_model, dictionaries
from ..progress import tqdm

FORMATS = {  # what SOURCE is, and the options that each takes
    "saelens": ("a dictionary, or a folder of them", ()),
    "delphi": ("a collection", ("site", "splits", "pad")),
    "neuronpedia": ("a collection", ("site", "features", "width", "name", "model_id", "model", "sae")),
    "sae-dashboard": ("a collection", ("site", "features", "width", "name", "model_id", "model", "sae")),
    "circuit-tracer": ("a prompt, its text", ("model", "sae", "top", "logits", "name", "model_id")),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    add("format", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add("source", metavar="SOURCE", help="saelens: a dictionary, or a folder of them, or default; delphi, neuronpedia "
        "and sae-dashboard: a collection, of mode all; circuit-tracer: the text of a prompt")  # fmt: skip
    add("out", type=Path, metavar="OUT", help="a new or empty folder; all of it appears, or nothing")
    stored = parser.add_argument_group("of a collection")
    add = stored.add_argument
    add("--site", type=_site, action="append", metavar="LAYER:HEAD", help="only this site; repeatable (default: all)")
    add("--features", type=int, help="neuronpedia, sae-dashboard: of a site at most so many atoms, the most frequent "
        "ones (default: all that fired)")  # fmt: skip
    add("--width", type=int, help="neuronpedia, sae-dashboard: tokens shown either side of a firing (default: 16)")
    add("--splits", type=int, help="delphi: files a site, by ranges of atoms, the tokens in each; it reads one at a "
        "time (default: 5)")  # fmt: skip
    add("--pad", type=int, help="delphi: token id behind the end of short passages, where no firings are (default: 0)")
    names = parser.add_argument_group("names that the other tool shows")
    add = names.add_argument
    add("--name", help="of the set of dictionaries (default: writesae); of the graph (default: prompt)")
    add("--model-id", help="of the model (default: as the collection, or --model, calls it)")
    model = parser.add_argument_group(
        "model", "circuit-tracer runs it; neuronpedia and sae-dashboard, where it is given, show the tokens that each "
        "feature promotes.",
    )  # fmt: skip
    add_model(model)
    add_dictionaries(model)
    add = model.add_argument
    add("--top", type=int, help="circuit-tracer: firings that become nodes, those with the largest influence (default: "
        "200)")  # fmt: skip
    add("--logits", type=int, help="circuit-tracer: next tokens that become nodes, the likeliest (default: 5)")
    parser.set_defaults(model=None)


def run(args: argparse.Namespace) -> int:
    """Exports, prints what it made as JSON. Returns the exit status."""
    _refuse_misplaced(args)
    _refuse_full(args.out)
    with whole_folder(args.out) as folder:
        made = _EXPORTERS[args.format](args, folder)
    print(json.dumps({"format": args.format, "out": str(args.out), **made}, indent=2))
    return 0


def _refuse_misplaced(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that the format does not know."""
    known = FORMATS[args.format][1]
    for name in sorted({name for _, names in FORMATS.values() for name in names}):
        if getattr(args, name, None) not in (None, []) and name not in known:
            takes = ", ".join(f for f, (_, names) in FORMATS.items() if name in names)
            raise ValueError(f"{name.replace('_', '-')}: expected with {takes}, got it with {args.format}")


def _refuse_full(out: Path) -> None:
    refuse_file(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, got {out}, which holds {next(out.iterdir()).name}")


def _site(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(":")
    if not (layer.isdecimal() and head.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected LAYER:HEAD, got {text!r}")
    return int(layer), int(head)


def _given(args: argparse.Namespace, *names: str, **renamed: str) -> dict:
    """Those of the options that were given, by the exporters' names."""
    pairs = {**{name: name for name in names}, **renamed}
    return {there: getattr(args, here) for there, here in pairs.items() if getattr(args, here) is not None}


def _saelens(args: argparse.Namespace, out: Path) -> dict:
    from ..default import dictionaries as embedded
    from ..sae import SAE
    from ..sae.checkpoint import dictionaries as inside
    from ..sae.saelens_layout import save

    if args.source == "default":
        source, folders = None, list(embedded("state").values())
    else:
        source = Path(args.source)
        if not source.is_dir():
            raise FileNotFoundError(f"source: expected a dictionary or a folder of them, got {source}: no such folder")
        folders = inside(source) if not (source / "cfg.json").exists() else []
    for folder in tqdm(folders, unit="dictionary", disable=len(folders) < 2, leave=False):
        save(SAE.from_pretrained(folder), out / folder.name)
    if not folders:
        save(SAE.from_pretrained(args.source), out)
    return {"dictionaries": max(len(folders), 1)}


def _delphi(args: argparse.Namespace, out: Path) -> dict:
    from .delphi import export

    return export(args.source, out, **_given(args, "splits", "pad", sites="site"), progress=True)


def _pages(args: argparse.Namespace, out: Path) -> dict:
    from .neuronpedia import export

    writes = None
    if args.model is not None:
        from ..models import load

        writes = (load(args.model, trust_remote_code=args.trust_remote_code)[0], dictionaries(args))
    elif args.sae:
        raise ValueError("sae: expected it with --model, got it alone")
    options = _given(args, "features", "width", "name", sites="site", model="model_id")
    return export(args.source, out, args.format, **options, writes=writes, progress=True)


def _circuit_tracer(args: argparse.Namespace, out: Path) -> dict:
    from ..models import load
    from .circuit_tracer import export

    if not args.source:  # before the model is loaded
        raise ValueError("source: expected the text of a prompt, got none")
    args.model = args.model or "default"
    model, tokenizer = load(args.model, trust_remote_code=args.trust_remote_code)
    options = _given(args, "top", "logits", slug="name", scan="model_id")
    return export(args.source, out, model, tokenizer, dictionaries(args), **{"scan": Path(args.model).name, **options})


_EXPORTERS = {
    "saelens": _saelens, "delphi": _delphi, "neuronpedia": _pages, "sae-dashboard": _pages,
    "circuit-tracer": _circuit_tracer,
}  # fmt: skip

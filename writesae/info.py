"""`writesae info`: what is installed, what is built, what can run here and why not; `--models`: which models are
attached to, each class tried on a tiny random instance."""

from __future__ import annotations

import dataclasses
import json
import os
import platform

from ._installed import version_of

PACKAGES = ("torch", "transformers", "safetensors", "pyarrow", "numpy")
# What each extra of `pip install 'writesae[EXTRA]'` brings.
EXTRAS = {
    "experiments": ("scipy", "statsmodels", "scikit-learn", "matplotlib", "jinja2"),
    "datasets": ("datasets",),
    "pandas": ("pandas",),
    "sql": ("duckdb",),
    "mamba": ("mamba-ssm", "causal-conv1d", "einops", "triton"),
}

_TRANSITIONS = {"none": "nothing erased", "delta": "erases what its key reads", "low rank": "low-rank erase"}


def gather() -> dict:
    """Versions, backends (`{name: None when usable, else the reason}`), write rules with their kernels, and the CPU's
    instruction sets."""
    import torch

    from . import __version__
    from ._library import backends, cpu_isa
    from .models import versions
    from .ops import RULES

    return {
        "writesae": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "transformers": {
            "installed": versions.installed(), "tested": list(versions.TESTED), "in_tested_range": versions.in_range(),
        },
        "extras": {name: version_of(name) for names in EXTRAS.values() for name in names},
        "backends": backends(),
        "rules": {name: _rule(rule) for name, rule in RULES.items()},
        "cpu": {
            "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(), **cpu_isa(),
        },
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def _rule(rule) -> dict:
    """Of each backend: the reason it is not usable, and, where it has a kernel, what gates that takes and which of them
    with a gradient. The reference runs what it does not take."""
    from .ops._dispatch import BACKENDS, kernel_error

    found: dict[str, dict] = {}
    for backend in BACKENDS:
        found[backend] = {"error": kernel_error(rule.name, backend)}
        limits = rule.limits.get(backend)
        if backend == "reference":
            found[backend] |= {"gates": rule.gates, "gradient": rule.gates}
        elif limits is not None:
            found[backend] |= {"gates": limits.gates, "gradient": limits.gradient, "largest": dict(limits.largest)}
    return {"gates": rule.gates, "transition": rule.transition, "arguments": rule.arguments, "backends": found}


def configure(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--models", action="store_true",
        help="list the classes of models that are attached to, and try each on a tiny random instance (about half a "
        "minute); status 1 if one fails",
    )  # fmt: skip


def _models(as_json: bool) -> int:
    """Tries every class and prints what was found, each as soon as it is known."""
    from .models.tiny import absent
    from .models.trial import Tried, trials

    found: list[Tried] = []
    missing = absent()
    for tried in trials():
        if not as_json:
            if not found:
                print(f"{'model':32} {'layers':12} {'rule':34} {'library':27} tried")
            rule = f"{tried.rule} ({tried.gate} gate)"
            library = f"{tried.library} {tried.release or ''}"
            status = "pass" if tried.passed else "FAIL"
            print(f"{tried.model:32} {tried.layers:12} {rule:34} {library:27} {status}", flush=True)
            for check, what in tried.checks.items():
                if what is not None:
                    print(f"    {check}: {what}", flush=True)
        found.append(tried)
    failed = [tried.model for tried in found if not tried.passed]
    if as_json:
        rows = [{**dataclasses.asdict(tried), "passed": tried.passed} for tried in found]
        print(json.dumps({"models": rows, "not_installed": missing}, indent=2))
    else:
        checks = ", ".join(found[0].checks) if found else "nothing"
        print(f"{len(found) - len(failed)} of {len(found)} classes pass ({checks})")
        for library in dict.fromkeys(tried.library for tried in found):
            releases = next(tried.releases for tried in found if tried.library == library)
            print(f"{library}: tests run with {', '.join(releases)}")
        for library, names in missing.items():
            print(f"{library}: not installed, so not tried: {', '.join(names)}")
    return int(bool(failed))


def run(args) -> int:
    from .models import versions

    if args.models:
        return _models(args.json)

    info = gather()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"writesae {info['writesae']}   Python {info['python']}   {info['platform']}")
    print(f"{'packages:':19}" + _listed(info["packages"]))
    print(f"{'transformers:':19}{versions.remark()}")
    for extra, names in EXTRAS.items():
        found = {name: info["extras"][name] for name in names}
        missing = "" if all(found.values()) else f"   (pip install 'writesae[{extra}]')"
        print(f"extra {extra + ':':13}" + _listed(found) + missing)
    for name, reason in info["backends"].items():
        print(f"backend {name + ':':11}{'usable' if reason is None else reason}")
    for name, rule in info["rules"].items():
        gates = " or ".join(rule["gates"])
        print(f"rule {name + ':':18}{gates} gate, {_TRANSITIONS[rule['transition']]}; {_kernels(rule)}")
    print(f"{'cpu:':19}" + _listed(info["cpu"]))
    print(f"{'gpu:':19}{info['cuda_device'] or 'none seen by torch'}")
    return 0


def _kernels(rule: dict) -> str:
    """Which backends have a kernel, and what that does not take, in words."""
    words = []
    for backend, found in rule["backends"].items():
        if backend == "reference" or "gates" not in found:
            continue
        lacks = [] if found["error"] is None else ["not usable here"]
        lacks += [f"no {gate} gate" for gate in rule["gates"] if gate not in found["gates"]]
        lacks += [f"no gradient of a {gate} gate" for gate in found["gates"] if gate not in found["gradient"]]
        words.append(backend + (f" ({', '.join(lacks)})" if lacks else ""))
    return f"kernels: {', '.join(words)}" if words else "reference only"


def _listed(versions: dict) -> str:
    return "  ".join(f"{k} {v or '(not installed)'}" for k, v in versions.items())

"""Which sources are compiled into which library; for setup.py and scripts/build_twin.py."""

from pathlib import Path

CSRC = Path(__file__).resolve().parent


def both_sides() -> list[str]:
    """Names of the operators on tensors (csrc/*.cpp) that have CUDA kernels (csrc/cuda/*.cu): compiled once a side."""
    return sorted(path.name for path in CSRC.glob("*.cpp") if (CSRC / "cuda" / path.name).with_suffix(".cu").exists())


def kernels() -> list[str]:
    """Names of the files of CUDA kernels, the longest to compile first, so that all cores are busy to the end."""
    longest = (
        "ssd", "dplr_low_rank_", "dplr_additive_", "gated_delta_rule_backward_", "gated_delta_rule_f",
        "gated_delta_rule_", "encode_",
    )  # fmt: skip
    rank = lambda name: next((i for i, start in enumerate(longest) if name.startswith(start)), len(longest))  # noqa: E731
    return sorted((path.name for path in (CSRC / "cuda").glob("*.cu")), key=lambda name: (rank(name), name))

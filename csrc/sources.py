"""Which sources are compiled into which library; for setup.py and scripts/build_twin.py."""

from pathlib import Path

CSRC = Path(__file__).resolve().parent

# What the CUDA kernels are compiled for unless WRITESAE_CUDA_ARCHITECTURES says otherwise. Code for an architecture
# runs on later ones of its generation, too ("80" on sm_86 and sm_89, "100" on sm_103); "90-ptx" is what a driver
# compiles for everything after that, sm_120 among it, when it is first used. Files that need what one alone has are in
# ONLY.
ARCHITECTURES = "80 90 100 90-ptx"
# {file of csrc/cuda: its architectures, in place of the build's}
ONLY = {"encode_product_hopper.cu": "90a"}


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


def architecture_flags(architectures: str) -> list[str]:
    """One `-gencode` for all architectures that share their PTX.

    nvcc's front end takes longer than ptxas, and PTX made for an older architecture serves later ones: it is made once
    for the oldest before 90, and once for the oldest from 90 on, where kernels round to tf32 by an instruction that
    the others have not. What names its own features ("90a") is made by itself.
    """
    groups: dict[str, list[str]] = {}
    names = [name.partition("-") for name in architectures.split()]
    plain = sorted((number for number, _, form in names if form != "ptx" and number.isdigit()), key=int)
    for number, _, form in names:
        own = form == "ptx" or not number.isdigit()  # what is embedded keeps the name that was asked for
        virtual = number if own else next(x for x in plain if (int(x) < 90) == (int(number) < 90))
        groups.setdefault(virtual, []).append(f"{'compute' if form == 'ptx' else 'sm'}_{number}")
    return [f"-gencode=arch=compute_{virtual},code=[{','.join(codes)}]" for virtual, codes in groups.items()]

"""`writesae bench`: every figure of speed beside its peer. One file a subject, `bench_<stem>.py`, with its `CASES`.

What is run by hand, from a clone, is in the repository's folder bench/, whose README says what.

A case is a few rows measured together in a process of its own; each writes one JSON file, and tables and the picture
are made from those files. Cases take their inputs from `writesae.testing`, as the tests do, and raise `Disagree` rather
than yield a ratio where their result is not the peer's.
"""

# In the order of the table.
STEMS = (
    "gated_delta_rule", "backward", "ssd", "dplr", "selective_scan", "causal_conv", "rms_norm", "encode", "model",
    "policy", "collect", "replace", "sae_training", "training_sites", "accuracy",
)  # fmt: skip
MODULES = tuple(f"writesae.bench.bench_{stem}" for stem in STEMS)

# Of a CUDA device, for `writesae bench --gpu` (bench/gpu.sh).
GPU_MODULES = tuple(f"writesae.bench.bench_gpu_{stem}" for stem in ("scan", "peers", "channels", "encode", "model"))

#!/usr/bin/env bash
# One wheel under several torch versions: builds it once with the first Python, installs it beside each, runs the ops' tests.
#   scripts/check_wheel.sh PYTHON [PYTHON...]      each a Python with torch, numpy, pyarrow, safetensors, transformers, pytest
# The first also needs setuptools, wheel and ninja; with WRITESAE_CUDA=1 the CUDA kernels are in, else not.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 PYTHON [PYTHON...]"; exit 2; }
pythons=()
for python in "$@"; do pythons+=("$(cd "$(dirname "$(command -v "$python")")" && pwd)/$(basename "$python")"); done
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${pythons[0]}" -m pip wheel -q --no-build-isolation --no-deps -w "$work" .
ls "$work"/*.whl
cp -r tests pyproject.toml "$work"
failed=0
for python in "${pythons[@]}"; do
  rm -rf "$work/site"
  "$python" -m pip install -q --no-deps --no-index --target "$work/site" "$work"/*.whl
  printf '%s: ' "$("$python" -c 'import torch; print("torch", torch.__version__)')"
  (cd "$work" && PYTHONPATH="$work/site" "$python" -c '
import torch, writesae
from writesae._library import CPU_ERROR, CUDA_ERROR
assert writesae.__file__.startswith("'"$work"'"), writesae.__file__
keys = [k for k in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key("writesae::gated_delta_rule", k)]
print("kernels for", ", ".join(keys) + (f" (CUDA: {CUDA_ERROR})" if CUDA_ERROR else ""))
assert CPU_ERROR is None, CPU_ERROR')
  (cd "$work" && PYTHONPATH="$work/site" "$python" -m pytest -q -p no:cacheprovider tests/test_rules.py \
    tests/test_rules_backward.py tests/test_rules_operators.py tests/test_gated_delta_rule.py tests/test_encode.py \
    tests/test_encode_precision.py tests/test_encode_gradient.py tests/test_causal_conv.py tests/test_rms_norm.py tests/test_sae_training_kernel.py tests/test_writes.py tests/test_ssd.py \
    tests/test_dplr.py tests/test_selective_scan.py \
    2>&1 | tail -1) || failed=1
done
exit $failed

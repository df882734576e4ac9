#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with CUDA, nvcc and torch: build, tests, compute-sanitizer, benchmark.
#   bench/gpu.sh [--dry] FOLDER
# FOLDER gets gpu.json (every figure), summary.txt and the logs. Wheels in .whl/ (flash-linear-attention and what else the
# machine lacks) are installed into a folder of their own first. --dry runs all of it without a GPU, on the CUDA kernels'
# host twin and tiny sizes; it claims no number. A step that fails is named at the end, and the others still run.
set -uo pipefail
dry=0
[ "${1:-}" = --dry ] && { dry=1; shift; }
out=$(mkdir -p "${1:?expected an output folder}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=()
began=$SECONDS

step() {  # step NAME LIMIT COMMAND...: logged, timed, at most LIMIT seconds and 30 to stop
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout -k 30 "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)" | tee -a "$out/summary.txt"
  else
    echo "FAILED  $name ($((SECONDS - start)) s): $(tail -n 1 "$out/$name.log")" | tee -a "$out/summary.txt"
    failed+=("$name")
  fi
}

: >"$out/summary.txt"
if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl && export PYTHONPATH=$PYTHONPATH:$site
fi

if [ $dry = 1 ]; then
  twin=${TWIN:-$("$python" scripts/build_twin.py 2>"$out/build.log")} || { tail "$out/build.log"; exit 1; }
  step tests 300 "$python" -m pytest -q -p no:cacheprovider --targets twin --twin "$twin" \
    tests/test_rules.py tests/test_rules_backward.py tests/test_encode_gradient.py tests/test_cuda_encode.py \
    -k "test_sizes and (32- or test_cuda_encode)"
  echo "skipped compute-sanitizer (dry run)" | tee -a "$out/summary.txt"
  step benchmark 300 "$python" -m writesae.cli bench --gpu --dry "$twin" --fresh --out "$out/rows"
else
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee -a "$out/summary.txt"
  card=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a >= 9))') || exit 1
  step build 240 env WRITESAE_CUDA=1 WRITESAE_CUDA_ARCHITECTURES="$card" "$python" setup.py build_ext --inplace
  step tests 200 "$python" -m pytest -q -p no:cacheprovider --targets cuda \
    tests/test_rules.py tests/test_rules_backward.py tests/test_gated_delta_rule.py tests/test_encode.py \
    tests/test_encode_gradient.py tests/test_cuda_*.py
  # Small cases: the sanitizers run kernels some hundred times slower.
  few='test_lengths or test_packed or test_edit_kinds or (test_against_states and (T65 or edits or few))'
  for tool in memcheck racecheck initcheck; do
    step $tool 90 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -x -p no:cacheprovider --targets cuda tests/test_rules.py \
      tests/test_rules_backward.py tests/test_encode.py -k "$few"
  done
  step benchmark 300 "$python" -m writesae.cli bench --gpu --fresh --out "$out/rows"
fi

# One file of figures, since some machines give few files back.
"$python" - "$out" <<'PYTHON'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
records = [json.loads(p.read_text()) for p in sorted((out / "rows").glob("*.json"))] if (out / "rows").is_dir() else []
(out / "gpu.json").write_text(json.dumps(records, indent=1) + "\n")
print(f"{sum(len(r['rows']) for r in records)} rows of {len(records)} cases in {out / 'gpu.json'}")
PYTHON
tail -n 60 "$out/benchmark.log"
rm -rf "$out/rows"
echo "took $((SECONDS - began)) s; failed: ${failed[*]:-nothing}" | tee -a "$out/summary.txt"
[ ${#failed[@]} = 0 ]

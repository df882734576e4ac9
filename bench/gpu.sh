#!/usr/bin/env bash
# Everything that needs a GPU, in three calls that end in under nine minutes each; docs/gpu.md says what each finds.
#   bench/gpu.sh 1|2|3 [--dry] FOLDER
#     1  builds for this card; smoke tests, scan, encode, step, counters of ncu, hooked model, backward, the rest
#     2  all tests on the device, then other packages' kernels
#     3  compute-sanitizer: memcheck, racecheck, synccheck
# FOLDER gets callN.jsonl (every figure and step, each written at once, so that a kill loses nothing), callN.txt (the
# steps and the table), callN.log (what every step said) and, from 1, call1.ncu.csv. No step may pass GPU_DEADLINE
# (default 510) seconds after the start: each has what is left or its own limit, whichever is less, and one that cannot
# begin is named. --dry goes through every step without a GPU, on the CUDA kernels' host twin (TWIN, default: built
# here) and tiny sizes; it claims no number. Wheels in .whl/ (scripts/gpu_wheels.sh) are installed beside the rest first.
set -uo pipefail
call=${1:-}
case $call in
  1 | 2 | 3) shift ;;
  *) echo "gpu.sh: expected 1, 2 or 3 and then [--dry] FOLDER, got '$*'" >&2; exit 2 ;;
esac
dry=0
[ "${1:-}" = --dry ] && { dry=1; shift; }
[ $# = 1 ] || { echo "gpu.sh: expected one FOLDER to write to, got '$*'" >&2; exit 2; }
began=$SECONDS
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
deadline=${GPU_DEADLINE:-510}
grace=${GPU_GRACE:-10}  # seconds from the first signal to the last, and the least that is worth starting a step for
rows=$out/call$call.jsonl summary=$out/call$call.txt log=$out/call$call.log counted=$out/call$call.ncu.csv
: >"$rows"; : >"$summary"; : >"$log"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Where the toolkit puts what it does not put on PATH.
for folder in /usr/local/cuda/bin /opt/nvidia/nsight-compute/*; do [ -d "$folder" ] && PATH=$PATH:$folder; done
failed=() waiting=()

note() {  # note STATUS NAME SECONDS WORDS: of a step, to all who read
  local words
  words=$(tr -d '\000-\037"\\' <<<"$4" | cut -c1-300)
  printf '%-9s %s (%d s)%s\n' "$1" "$2" "$3" "${words:+: $words}" | tee -a "$summary"
  printf '{"what": "step", "call": %d, "name": "%s", "status": "%s", "seconds": %d, "note": "%s"}\n' \
    "$call" "$2" "$1" "$3" "$words" >>"$rows"
  case $1 in ok | skipped) ;; *) failed+=("$2") ;; esac
}

step() {  # step NAME LIMIT COMMAND...: logged and timed; interrupted at its limit, killed `grace` later
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - grace - (SECONDS - began))) status words
  shift 2
  if [ "$left" -lt "$grace" ]; then
    note "not run" "$name" 0 "$((left > 0 ? left : 0)) s are left of $deadline"
    return 1
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  timeout -s INT -k "$grace" "$limit" "$@" >>"$log" 2>&1
  status=$?
  words=$(tail -n 1 "$log")
  case $status in
    0) note ok "$name" $((SECONDS - start)) "" ;;
    124 | 137) note "cut short" "$name" $((SECONDS - start)) "after its $limit s; what it had found is kept" ;;
    *) note FAILED "$name" $((SECONDS - start)) "status $status: $words" ;;
  esac
  return $status
}

have() {  # have TOOL STEP: whether it is on PATH; the step is named where it is not
  command -v "$1" >/dev/null || { note "not run" "$2" 0 "$1 is not on PATH"; return 1; }
}

measure() {  # measure STEP LIMIT CASE...; a dry run has all cases in one process, since most of its time is starting them
  local name=$1 limit=$2
  shift 2
  if [ $dry = 1 ]; then waiting+=("$@"); return; fi
  step "$name" "$limit" "$python" bench/gpu_call.py case "$rows" "$@"
}

ended() {  # the table, the last words, the status
  local words
  if [ $dry = 0 ]; then
    timeout -k 5 20 "$python" bench/gpu_call.py show "$rows" 2>>"$log" | tee -a "$summary" | tail -c 9000
  fi
  words=$(printf ', %s' "${failed[@]:-nothing}")
  echo "took $((SECONDS - began)) s; failed, cut short or not run: ${words:2}" | tee -a "$summary"
  [ ${#failed[@]} = 0 ]
  exit
}

if compgen -G ".whl/*.whl" >/dev/null && [ "$call" = 2 ]; then
  site=$(mktemp -d)
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl &&
    export PYTHONPATH=$PYTHONPATH:$site
fi

if [ $dry = 1 ]; then
  twin=${TWIN:-$("$python" scripts/build_twin.py 2>>"$log")} || { tail "$log"; exit 1; }
  target=(--targets twin --twin "$twin")
  step machine 60 "$python" bench/gpu_call.py begin "$rows" --call "$call" --dry "$twin"
  note skipped build 0 "dry run"
else
  target=(--targets cuda)
  for tool in nvidia-smi nvcc "$python"; do
    command -v "$tool" >/dev/null || echo "missing: $tool is not on PATH" | tee -a "$summary"
  done
  "$python" - <<'PYTHON' 2>&1 | tee -a "$summary"
from importlib.util import find_spec
for name in ("torch", "transformers", "pytest", "pyarrow", "safetensors", "numpy", "setuptools", "ninja"):
    if find_spec(name) is None:
        print(f"missing: the Python package {name}")
PYTHON
  card=$(timeout 60 "$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') || {
    note FAILED card 0 "torch sees no GPU"; ended; }
  # What is built is used again where sources and card are the same: its own from the call before, or what was carried.
  sources=$(find csrc setup.py -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16)
  built=build/gpu-library stamp="$card $sources"
  if [ -f .whl/library.tar.gz ] && [ "$(cat "$built" 2>/dev/null)" != "$stamp" ]; then
    tar -xzf .whl/library.tar.gz 2>>"$log"
  fi
  if [ "$(cat "$built" 2>/dev/null)" = "$stamp" ] && compgen -G "writesae/_C_cuda*.so" >/dev/null; then
    note ok build 0 "compiled before, for the same sources and $card"
  else
    rm -f "$built"
    export WRITESAE_CUDA_ARCHITECTURES=$card
    # Both libraries' objects at once: one after the other takes nearly twice as long.
    step build 240 bash -c '
      objects="import sys; sys.argv[1:] = [\"--version\"]; import pathlib, setup
setup.compile_cuda(setup.CUDA, pathlib.Path(\"build/temp/_C_cuda/cuda\"))"
      WRITESAE_CUDA=1 "$0" -c "$objects" & kernels=$!
      WRITESAE_CUDA=0 "$0" setup.py build_ext --inplace && wait $kernels &&
        WRITESAE_CUDA=1 "$0" setup.py build_ext --inplace' "$python" || { tail -n 40 "$log"; ended; }
    mkdir -p build && echo "$stamp" >"$built"
  fi
  step machine 60 "$python" bench/gpu_call.py begin "$rows" --call "$call" ||
    { tail -n 40 "$log"; ended; }  # nothing that follows could run
fi

# Tests that meet each kernel once and soon: lengths around a chunk, packed sequences, edits, one token, gradients.
few='test_lengths and 65 or test_packed or test_one_token and True or test_against_states and (T65 or edits) or test_parts'
pytest=("$python" -m pytest -v -p no:cacheprovider --tb=short "${target[@]}")
all=(tests/test_rules.py tests/test_encode.py tests/test_rules_backward.py tests/test_encode_gradient.py)
case $call in
  1)
    if [ $dry = 1 ]; then
      step smoke 120 "${pytest[@]}" "${all[@]}" -k "$few" --collect-only -q
    else
      step smoke 60 env OMP_NUM_THREADS=4 "${pytest[@]}" "${all[@]}" -k "$few"
    fi
    measure scan 60 gpu-scan gpu-step
    measure encode 60 gpu-encode
    if [ $dry = 1 ]; then
      step counters 60 "$python" bench/gpu_call.py launch scan encode --dry "$twin"
    elif have ncu counters; then
      asked=$(mktemp)
      step "counters that ncu has" 30 "$python" bench/gpu_call.py metrics "$asked"
      for name in scan encode; do
        one=$(mktemp)
        step "counters of $name" 60 ncu --clock-control none --profile-from-start off --launch-count 30 --csv --page raw \
          --metrics "$(cat "$asked")" --log-file "$one" "$python" bench/gpu_call.py launch $name
        cat "$one" >>"$counted"
        step "counters of $name, read" 20 "$python" bench/gpu_call.py counters "$rows" "$one"
      done
    fi
    measure prototype 30 gpu-product
    measure model 90 gpu-model
    measure backward 60 gpu-scan-backward gpu-encode-backward
    measure writes 40 gpu-scan-writes
    measure channels 50 gpu-channels gpu-channels-backward
    measure collect 60 gpu-collect
    ;;
  2)
    if [ $dry = 1 ]; then
      step tests 120 "${pytest[@]}" tests/test_rules_backward.py tests/test_encode_gradient.py tests/test_cuda_encode.py \
        -k "test_sizes and (32- or test_cuda_encode)"
    else
      cores=$(nproc) spread=()
      "$python" -c 'import xdist' 2>/dev/null && spread=(-n "$((cores > 16 ? 8 : (cores + 1) / 2))" --dist worksteal)
      step tests 150 env OMP_NUM_THREADS=2 "${pytest[@]}" "${spread[@]}" \
        "${all[@]}" tests/test_gated_delta_rule.py tests/test_encode_gates.py tests/test_selective_scan.py tests/test_cuda_*.py \
        tests/test_edits_after.py tests/test_attach_gradients.py tests/test_sae_training_kernel.py
    fi
    measure "peer fla" 180 gpu-peer-fla
    measure "peer FlashQLA" 90 gpu-peer-flashqla
    measure "peer FlashInfer" 60 gpu-peer-flashinfer
    measure "model against fla" 80 gpu-model-fla
    measure "peers' steps" 130 gpu-peer-step gpu-peer-backward
    ;;
  3)
    # Small cases: a kernel runs some hundred times slower. No initcheck: tests fill what torch allocates with NaN, so
    # that nothing is uninitialised to it, and an element that nobody wrote spoils the result. Status 9 is a sanitizer's,
    # 1 that of a test whose result was off.
    if [ $dry = 1 ]; then
      step "cases of the sanitizers" 120 "${pytest[@]}" -x tests/test_rules.py tests/test_encode.py \
        -k "test_lengths and 65 and dplr or test_against_states and T65"
      note skipped compute-sanitizer 0 "dry run"
    elif have compute-sanitizer "memcheck, racecheck, synccheck"; then
      check() {  # check TOOL LIMIT KEYWORDS OPTION...
        local tool=$1 limit=$2 keywords=$3
        shift 3
        step "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=4 compute-sanitizer --tool "$tool" \
          --error-exitcode 9 --print-limit 20 "$@" "${pytest[@]}" "${all[@]}" -k "$keywords"
      }
      check memcheck 160 "$few" --report-api-errors no
      check racecheck 140 'test_lengths and 65 or test_against_states and T65'
      check synccheck 80 'test_lengths and 65 or test_against_states and T65'
    fi
    ;;
esac
[ ${#waiting[@]} = 0 ] ||
  step cases 300 "$python" bench/gpu_call.py case "$rows" --dry "$twin" "${waiting[@]}"
ended

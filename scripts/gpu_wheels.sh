#!/usr/bin/env bash
# What a machine with a GPU and no network needs for bench/gpu.sh 2, into .whl/: wheels for Python 3.12 on Linux x86-64.
#   scripts/gpu_wheels.sh [PEER ...]      fla (default), FlashQLA, FlashInfer
# Each peer is taken whole or not at all: one whose wheels are not to be had, or would take .whl/ and the tracked files
# together over LIMIT MiB (default 64), is named and left out; its rows of the benchmark then say that it is not there.
# .whl/commit says what the clone is at, since what is copied to such a machine often has no .git.
#   LIBRARY=1 scripts/gpu_wheels.sh       packs writesae/_C_*.so too, where they are built for the card (build/gpu-library
#                                         says so: "90" and the sources' digest), so that nothing is compiled there
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=$((${LIMIT:-64} * 1048576))
mkdir -p .whl
tag() { for n in "$@"; do printf -- '--platform manylinux_2_%s_x86_64 ' "$n"; done; }
options=(-q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
read -ra platforms <<<"$(tag 39 35 34 31 28 27 24 17 12 5) --platform manylinux2014_x86_64 --platform manylinux1_x86_64"

# What each needs that a machine with torch, triton, transformers, einops, numpy and tqdm lacks.
needs() {
  case $1 in
    fla) echo "flash-linear-attention==0.6.0 fla-core==0.6.0" ;;
    FlashQLA) echo "flash-qla==0.1.3 tilelang==0.1.15 apache-tvm-ffi==0.1.12 torch-c-dlpack-ext==0.1.5 z3-solver==4.15.4.0" ;;
    FlashInfer)
      echo "flashinfer-python==0.7.2.post1 apache-tvm-ffi==0.1.15.post2 nvidia-cutlass-dsl==4.8.1" \
        "nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1" \
        "nvidia-cudnn-frontend==1.32.0 cuda-tile" ;;
    *) echo "gpu_wheels.sh: expected fla, FlashQLA or FlashInfer, got $1" >&2; exit 2 ;;
  esac
}

bytes() { find "$@" -type f -printf '%s\n' | awk '{ n += $1 } END { print n + 0 }'; }
tree() { git ls-files -z | { xargs -0 stat -c %s 2>/dev/null || true; } | awk '{ n += $1 } END { print n + 0 }'; }
mib() { awk -v n="$1" 'BEGIN { printf "%.1f MiB", n / 1048576 }'; }

git rev-parse --short=12 HEAD >.whl/commit
tracked=$(tree)
echo "tracked files: $(mib "$tracked"); limit with .whl/: $(mib "$limit")"
for peer in "${@:-fla}"; do
  list=$(needs "$peer")
  fetched=$(mktemp -d) lacking=()
  for package in $list; do
    "$python" -m pip download "${options[@]}" "${platforms[@]}" -d "$fetched" "$package" >"$fetched/log" 2>&1 ||
      lacking+=("$package ($(grep -m 1 -E '^ERROR' "$fetched/log" | cut -c1-120 || true))")
  done
  rm -f "$fetched/log"
  size=$(bytes "$fetched") all=$((tracked + $(bytes .whl) + $(bytes "$fetched")))
  if [ ${#lacking[@]} != 0 ]; then
    echo "$peer: not available: no wheel of ${lacking[*]}"
  elif [ "$all" -gt "$limit" ]; then
    echo "$peer: left out: $(mib "$size") of wheels would make $(mib "$all")"
  else
    mv "$fetched"/*.whl .whl/
    echo "$peer: $(mib "$size")"
  fi
  rm -rf "$fetched"
done
if [ "${LIBRARY:-0}" = 1 ]; then
  [ -f build/gpu-library ] || { echo "library: build/gpu-library is not there: build for the card first" >&2; exit 1; }
  tar -czf .whl/library.tar.gz build/gpu-library writesae/_C_*.so
fi
[ "$((tracked + $(bytes .whl)))" -le "$limit" ] || echo "too large: $(mib $((tracked + $(bytes .whl)))) in all" >&2
ls -l .whl

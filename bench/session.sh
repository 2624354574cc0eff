#!/usr/bin/env bash
# One call of at most 9 minutes on a rented GPU with torch and Triton: bench/session.sh OUT
# CACHE=DIR takes kernels that `python -m bench.precompile --out DIR` compiled elsewhere, by the same
# Triton: 4 minutes on a core that the session then has for its own.
# Nothing is installed and no step ends the rest; OUT gets logs and results, and what was not run.
set -u
cd "$(dirname "$0")/.."
out=${1:?a folder for logs and results}
limit=${LIMIT:-540} device=${DEVICE:-cuda} python=${PYTHON:-python3}
mkdir -p "$out"
# the package as it installs
[ -e bngd_triton/kernels ] || ln -s ../kernels bngd_triton/kernels
export PYTHONPATH=$PWD
if [ -n "${CACHE:-}" ]; then
  "$python" -m bench.precompile --moved "$CACHE" && TRITON_CACHE_DIR=$(realpath "$CACHE")
  export TRITON_CACHE_DIR
fi

step() { # name, seconds, command
  local name=$1 most=$2
  shift 2
  local left=$((limit - SECONDS))
  [ "$most" -gt "$left" ] && most=$left
  if [ "$most" -lt 10 ]; then echo "not run: $name ($left s are left)"; return; fi
  local start=$SECONDS code=0
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: exit $code after $((SECONDS - start)) s of $most; $(tail -n 1 "$out/$name.log")"
}

bench=("$python" -m bench.run --device "$device" --out "$out")
step tests 140 "$python" -m pytest -q -x tests/kernels/test_gpu.py
step fp32 105 "${bench[@]}" --only host-300,resnet50,vit-b16,gpt2-124m,dry-run,fp32,bngd,torch-sgd-fused,torch-sgd-foreach,optimi-sgd,flashoptim-sgd
step rows 55 "${bench[@]}" --only resnet50,vit-b16,gpt2-124m,dry-run,fp32,bngd-row
step bf16 55 "${bench[@]}" --only gpt2-124m,dry-run,bf16,bf16-split,bngd,bngd-row,torch-sgd-fused
step forms 80 "${bench[@]}" --only resnet50,gpt2-124m,dry-run,fp32,bngd --tuning form=two-launch \
  --tuning form=single-launch,wave=2097152 --tuning form=single-launch,wave=4194304 \
  --tuning form=single-launch,wave=8388608
step hints 50 "${bench[@]}" --only resnet50,gpt2-124m,dry-run,fp32,bngd --tuning hints=False \
  --tuning form=single-launch --tuning form=single-launch,hints=False
step memcheck 55 compute-sanitizer --tool memcheck "$python" -m pytest -q -x tests/kernels/test_gpu.py -k bits

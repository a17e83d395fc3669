#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU; no network, no installation.
#   benchmarks/gpu_lane.sh --out DIR [--budget MINUTES] [--part NAME ...] [--wheels DIR] [--quick]
#   benchmarks/gpu_lane.sh --list
# Without a GPU, parts that need one are skipped and counted.
# Needs a Python with torch (CUDA build), triton, numpy, pytest, rich and ninja: $PYTHON, or .venv,
# or python3, whichever sees a GPU first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sees_gpu() {  # importing torch takes seconds, so first whether there is a driver at all
  { [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; } && command -v "$1" >/dev/null && "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
}

for python in ${PYTHON:+"$PYTHON"} .venv/bin/python python3; do
  if sees_gpu "$python"; then
    exec "$python" -m benchmarks.gpu_lane "$@"
  fi
done
for python in ${PYTHON:+"$PYTHON"} .venv/bin/python python3; do
  if command -v "$python" >/dev/null; then
    exec "$python" -m benchmarks.gpu_lane --no-gpu "$@"
  fi
done

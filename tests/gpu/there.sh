#!/usr/bin/env bash
# Runs on a GPU machine without a network, from where the archive of offline.sh was unpacked: tests/gpu, or other words
# for python, which are then in the project's folder. The first time it makes a virtual environment on top of PYTHON's
# packages (default: python3), of which torch is one, builds Horovod against it, and draws the sample.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VENV=$HERE/venv

install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-index "$@"; }

build_horovod() { # for one GPU or horovodrun over Gloo; no MPI is needed
  local cuda site nccl kinds
  cuda=${CUDA_HOME:-/usr/local/cuda}
  kinds=$("$VENV/bin/python" -c 'import torch; print(*sorted({"".join(map(str, torch.cuda.get_device_capability(i)))
    for i in range(torch.cuda.device_count())}), sep=",")')
  if [[ -z $kinds || ! -x $cuda/bin/nvcc ]]; then
    echo "no Horovod: it takes a GPU, and nvcc in $cuda (CUDA_HOME); tests/gpu run without it, train does not" >&2
    return
  fi
  site=$("$VENV/bin/python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
  nccl=$HERE/nccl
  mkdir -p "$nccl/lib"
  ln -sfn "$site/nvidia/nccl/include" "$nccl/include"
  ln -sf "$site/nvidia/nccl/lib/libnccl.so.2" "$nccl/lib/libnccl.so.2"
  ln -sf libnccl.so.2 "$nccl/lib/libnccl.so"
  echo "building Horovod: minutes; $HERE/horovod.log" >&2
  env PATH="$VENV/bin:$cuda/bin:$PATH" MAKEFLAGS="-j$(nproc)" CMAKE_POLICY_VERSION_MINIMUM=3.5 \
    CMAKE_TOOLCHAIN_FILE="$HERE/project/launch/cmake/toolchain.cmake" \
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 HOROVOD_WITHOUT_TENSORFLOW=1 \
    HOROVOD_WITHOUT_MXNET=1 HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED HOROVOD_NCCL_HOME="$nccl" \
    CUDA_HOME="$cuda" HOROVOD_CUDA_HOME="$cuda" CUDAToolkit_ROOT="$cuda" CUDACXX="$cuda/bin/nvcc" \
    HOROVOD_BUILD_CUDA_CC_LIST="$kinds" HOROVOD_RPATH="$site/torch/lib;$site/nvidia/nccl/lib;$site/nvidia/cu13/lib" \
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-index --no-build-isolation --no-deps \
    "$HERE"/horovod-*.tar.gz >"$HERE/horovod.log" 2>&1 || {
    tail -n 20 "$HERE/horovod.log"
    echo "no Horovod: its build failed, see $HERE/horovod.log. tests/gpu run without it"
  } >&2
}

if [[ ! -f $HERE/finished ]]; then
  "${PYTHON:-python3}" -m venv --system-site-packages "$VENV"
  install --find-links "$HERE/wheels" --requirement "$HERE/requirements.txt"
  install --find-links "$HERE/wheels" --no-deps tensorboard # offline.sh packs no more of it
  build_horovod
  cd "$HERE/project"
  "$VENV/bin/python" -m hvd_eurosat.prepare --source sample --out "$HERE/sample" --ratios 80,10,10 >/dev/null
  touch "$HERE/finished"
fi
cd "$HERE/project"
(($#)) || set -- -m pytest tests/gpu
OUT=${OUT:-$HERE} exec "$VENV/bin/python" "$@"

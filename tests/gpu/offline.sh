#!/usr/bin/env bash
# Packs what a GPU machine without a network needs to run tests/gpu, `train` and `benchmark gpu` from this commit.
#
#   tests/gpu/offline.sh                                                  offline.tar.xz, for Python 3.12
#   tests/gpu/offline.sh --python 3.11 --eurosat EuroSAT_RGB.zip --out pack.tar.xz
#
#   --python VERSION   the Python of that machine
#   --eurosat ZIP      put 2,000 of its patches in, 200 of each class
#   --out FILE         the archive; it may have 60 MB
#
# That machine has an NVIDIA driver, Python with pip and venv, a torch for CUDA 13 (2.11 or newer) and, to build
# Horovod, nvcc, g++ and make. There:
#
#   tar xf offline.tar.xz && offline/run.sh                  the tests; what they found is in offline/report.json, too
#   offline/run.sh -m hvd_eurosat.benchmark gpu --data.root ../sample
#
# launch/install.sh has set this clone up before, and pip fetches here what is missing there.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${SETUP_VENV:-$ROOT/.venv}/bin/python
MOST=60000000 # bytes
PATCHES=200   # of each class
# All that tests/gpu, train and benchmark import but torch, with cmake and what else builds Horovod. What the machine
# has is not installed.
NEEDED=(numpy pillow psutil pydantic pydantic-settings rich tomli-w prometheus-client jinja2 matplotlib h5py safetensors
  protobuf absl-py pytest pytest-timeout cloudpickle cffi packaging pyyaml 'setuptools<81' wheel cmake)
ALONE=tensorboard # with as much of what it requires as writes its files: the rest serves pages, in 20 MB

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

VERSION=3.12 EUROSAT='' OUT=offline.tar.xz
while (($#)); do
  case $1 in
    --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    --python | --eurosat | --out) (($# > 1)) || die "$1 needs a value" ;;
    *) die "unknown option $1 (--help lists them)" ;;
  esac
  case $1 in
    --python) VERSION=$2 ;;
    --eurosat) EUROSAT=$2 ;;
    --out) OUT=$2 ;;
  esac
  shift 2
done
[[ $VERSION =~ ^3\.[0-9]+$ ]] || die "--python $VERSION: a version like 3.12 is wanted"
[[ -z $EUROSAT || -f $EUROSAT ]] || die "--eurosat $EUROSAT is not there"
[[ -x $PYTHON ]] || die "there is no $PYTHON: make setup"

# As one command: bash reads a script as it goes, and this one may be edited meanwhile.
{
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
  PACK=$WORK/offline
  mkdir -p "$PACK/project" "$PACK/wheels"
  git -C "$ROOT" archive HEAD hvd_eurosat tests/__init__.py tests/gpu launch recipes pyproject.toml LICENSE |
    tar x -C "$PACK/project"
  cp "$PACK/project/tests/gpu/there.sh" "$PACK/run.sh"
  printf '%s\n' "${NEEDED[@]}" >"$PACK/requirements.txt"

  fetch() { "$PYTHON" -m pip download --quiet --disable-pip-version-check --dest "$PACK/wheels" "$@"; }
  PLATFORMS=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
  pinned() { # those of launch/constraints.txt, for that Python
    "$PYTHON" - "$ROOT/launch/constraints.txt" "$VERSION" <<'END'
import sys
from packaging.requirements import Requirement
wanted = {"python_version": sys.argv[2], "python_full_version": f"{sys.argv[2]}.0"}
for line in open(sys.argv[1]):
    if line.strip() and not line.startswith("#"):
        requirement = Requirement(line.strip())
        if not requirement.marker or requirement.marker.evaluate(wanted):
            print(f"{requirement.name}{requirement.specifier}")
END
  }
  pinned >"$WORK/constraints.txt"
  fetch --only-binary :all: --python-version "$VERSION" --implementation cp "${PLATFORMS[@]}" \
    --constraint "$WORK/constraints.txt" "${NEEDED[@]}"
  fetch --only-binary :all: --no-deps --constraint "$WORK/constraints.txt" "$ALONE"
  horovod=$(grep '^horovod==' "$WORK/constraints.txt")
  fetch --no-binary :all: --no-deps --no-build-isolation "$horovod"
  mv "$PACK"/wheels/horovod-*.tar.gz "$PACK"

  if [[ -n $EUROSAT ]]; then
    "$PYTHON" - "$EUROSAT" "$WORK/part.zip" "$PATCHES" <<'END'
import sys, zipfile
from collections import defaultdict
whole, count = zipfile.ZipFile(sys.argv[1]), int(sys.argv[3])
classes = defaultdict(list)
for name in sorted(whole.namelist()):
    if not name.endswith("/"):
        classes[name.split("/")[-2]].append(name)
with zipfile.ZipFile(sys.argv[2], "w") as part:
    for names in classes.values():
        for name in names[:count]:
            part.writestr(name, whole.read(name))
END
    (cd "$ROOT" && "$PYTHON" -m hvd_eurosat.prepare --source "$WORK/part.zip" --out "$PACK/EuroSAT_2000" >/dev/null)
  fi

  # Smaller by half: compressed as a whole, not file by file in each wheel, and without two programs as large as cmake
  # and TensorBoard's pages.
  "$PYTHON" - "$PACK"/wheels/*.whl <<'END'
import os, sys, zipfile
SPARED = ("cmake/data/bin/ctest", "cmake/data/bin/cpack", "tensorboard/webfiles.zip")
for path in sys.argv[1:]:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path + ".new", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not line.startswith(SPARED)).encode()
            if info.filename not in SPARED:
                info.compress_type = zipfile.ZIP_STORED
                new.writestr(info, content)
    os.replace(path + ".new", path)
END
  XZ_OPT=${XZ_OPT:--T0} tar cJ -C "$WORK" offline >"$OUT"
  SIZE=$(wc -c <"$OUT")
  COMMIT=$(git -C "$ROOT" rev-parse --short HEAD)
  printf '%s: %s, %d MB, for Python %s\n' "$OUT" "$COMMIT" "$((SIZE / 1000000))" "$VERSION"
  ((SIZE <= MOST)) || die "$OUT is larger than $((MOST / 1000000)) MB"
  exit
}

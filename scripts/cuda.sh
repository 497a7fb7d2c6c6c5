#!/bin/sh
# CUDA's compiler for the GPU kernels, without a GPU and without an installation of CUDA.
#
#   cuda.sh fetch       makes sure that nvcc is in the cache, and prints where it is
#   cuda.sh detect      the same on a machine with an NVIDIA GPU, else nothing; never fails
#   cuda.sh libraries   fetches cuBLASLt and NVRTC for a machine with a GPU and no CUDA, and prints their folder
#
# The build takes the nvcc that TIDEMILL_NVCC names, else this one, else that on the PATH. Without any, the sources
# are embedded and compiled on the GPU's machine. TIDEMILL_NO_NVCC=1 builds and tests so on purpose, and nothing is
# fetched then. Versions are those of CUDA 13.0: newer ones want newer drivers.
set -eu

VERSION=13.0.88
# The disassembler has no release of its own for 13.0, and reads all older code.
COMPILER="nvidia-cuda-nvcc==$VERSION nvidia-nvvm==$VERSION nvidia-cuda-crt==$VERSION nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37"
LIBRARIES="nvidia-cublas==13.1.0.3 nvidia-cuda-nvrtc==$VERSION"
CACHE=${TIDEMILL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tidemill}/cuda

NAME=cuda
. "$(dirname "$0")/common.sh"

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# Installs packages $2 into folder $1 of the cache unless it is there.
install() {
    [ ! -d "$CACHE/$1" ] || return 0
    python3 -m pip --version >/dev/null 2>&1 || { say "pip is missing: run 'make setup'"; return 1; }
    new=$CACHE/$1.$$
    mkdir -p "$CACHE"
    # shellcheck disable=SC2086 # one word for each package
    if ! python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --only-binary :all: \
        --no-deps --no-compile --target "$new" $2 >"$new.log" 2>&1; then
        tail -n 3 "$new.log" >&2
        rm -rf "$new" "$new.log"
        return 1
    fi
    # Only a whole folder has the name that is looked for; another process may have been quicker.
    mv -T "$new" "$CACHE/$1" 2>/dev/null || rm -rf "$new"
    rm -f "$new.log"
}

fetch() {
    if [ -n "${TIDEMILL_NO_NVCC:-}" ]; then
        say "TIDEMILL_NO_NVCC is set: kernels for GPUs are not compiled, their sources are embedded"
        return 0
    fi
    if [ -n "${TIDEMILL_NVCC:-}" ]; then
        [ -x "$TIDEMILL_NVCC" ] || { say "TIDEMILL_NVCC=$TIDEMILL_NVCC is no program"; return 1; }
        echo "$TIDEMILL_NVCC"
        return 0
    fi
    [ -d "$CACHE/$VERSION" ] || say "fetching nvcc $VERSION with pip (105 MB, once)"
    install "$VERSION" "$COMPILER" || {
        say "pip could not fetch nvcc: name one with TIDEMILL_NVCC, or set TIDEMILL_NO_NVCC=1 to go on without"
        return 1
    }
    echo "$CACHE/$VERSION/nvidia/cu13/bin/nvcc"
}

[ $# = 1 ] || usage
case $1 in
    fetch) fetch ;;
    detect)
        if [ -e /dev/nvidiactl ]; then
            fetch || say "the kernels will be compiled when the program starts"
        fi
        ;;
    libraries)
        [ -d "$CACHE/libraries" ] || say "fetching cuBLASLt and NVRTC with pip (500 MB, once)"
        install libraries "$LIBRARIES" || fail "pip could not fetch them: install CUDA 13 from NVIDIA's packages"
        echo "$CACHE/libraries/nvidia/cu13/lib"
        ;;
    *) usage ;;
esac

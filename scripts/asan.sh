#!/bin/sh
# Runs the tests of the kernels for GPUs on the CPU emulation, under AddressSanitizer: every array of the device is an
# allocation of its own there, so a kernel that reads or writes beside one is stopped.
set -eu
library=$(${CC:-cc} -print-file-name=libasan.so)
case $library in
/*) ;;
*)
    echo "asan: the C compiler has no AddressSanitizer; install libasan of its version (Debian: libgcc-12-dev or newer)" >&2
    exit 1
    ;;
esac
export TIDEMILL_EMULATION_ASAN=1
cargo test --locked --quiet -p tidemill-kernels --lib --no-run
# The compiler that runs the tests is not sanitized, so the library comes before all others; what Rust keeps until the
# end of a process is no leak.
LD_PRELOAD=$library ASAN_OPTIONS=detect_leaks=0 \
    "$(cargo test --locked --quiet -p tidemill-kernels --lib --no-run --message-format json |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)" gpu::tests:: --quiet --skip mistakes

#!/bin/sh
# Tests and benchmarks on a machine with an NVIDIA GPU that need not have Rust, nor this repository.
#
#   gpu_tests.sh build [DIR]     here: builds what is needed into DIR (out/gpu) and prints what to carry there
#   gpu_tests.sh run [RESULTS]   there, beside what was built: tests, the checks of compute-sanitizer, a soak, and
#                                benchmarks; writes a log of each and summary.json to RESULTS (results); fails if
#                                a step failed
#
# For `run`: libraries are looked for where TIDEMILL_CUDA_LIBRARIES says, else in the packages of python3, else where
# the system has them. SOAK_SECONDS (120) is how long the tests are repeated, STEP_SECONDS (240) how long any other
# step may take, BENCH_SECONDS (1800) the benchmarks of each of SHAPES (qwen3-8b llama-3.1-8b smollm2-135m), STEPS
# which of `test golden answers memcheck racecheck soak bench` are done (all). The real models are tested where they are
# in the cache there (tidemill models pull).
set -eu

here=$(cd "$(dirname "$0")" && pwd)

programs='kernel-tests golden_gpu answers_gpu tidemill'

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
say() { printf 'gpu_tests: %s\n' "$*" >&2; }

# Of the target $1, from what cargo says.
executable_of() {
    python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["target"]["name"] == sys.argv[1]: print(message["executable"])' "$1"
}

build() {
    cd "$here/.."
    dir=${1:-out/gpu}
    mkdir -p "$dir"
    sh scripts/cuda.sh fetch >/dev/null
    say "building the tests (some minutes when cold)"
    executable=$(cargo test --locked -p tidemill-kernels --lib --features cuda-tests --no-run --message-format=json \
        | executable_of tidemill_kernels)
    cp "$executable" "$dir/kernel-tests"
    for target in golden_gpu answers_gpu; do
        executable=$(cargo test --locked -p tidemill-tests --test $target --features cuda-tests --no-run \
            --message-format=json | executable_of $target)
        cp "$executable" "$dir/$target"
    done
    say "building the program"
    cargo build --release --locked -p tidemill --bin tidemill
    cp "${CARGO_TARGET_DIR:-target}/release/tidemill" "$dir/tidemill"
    for program in $programs; do
        strip "$dir/$program"
        gzip -9f "$dir/$program"
    done
    cp scripts/gpu_tests.sh scripts/gpu_bench.py "$dir"
    mkdir -p "$dir/peers"
    cp scripts/peers/transformers_batch.py "$dir/peers"
    # What tests read.
    rm -rf "$dir/sources"
    for folder in kernels/cuda kernels/src/gpu tests/reference/tiny; do
        mkdir -p "$dir/sources/$folder"
        cp -R "$folder/." "$dir/sources/$folder"
    done
    cp tests/reference/*.json "$dir/sources/tests/reference"
    say "carry this folder ($(du -sh "$dir" | cut -f 1)), then run there: sh $dir/gpu_tests.sh run RESULTS"
    ls "$dir"
}

# Folders of CUDA's libraries in the packages of Python, as PyTorch brings them.
python_libraries() {
    python3 -c '
import glob, site, sys
folders = [folder for path in sys.path + site.getsitepackages() for folder in glob.glob(path + "/nvidia/*/lib")]
print(":".join(dict.fromkeys(folders)))' 2>/dev/null || true
}

# step NAME SECONDS COMMAND...: at most so long, its output in NAME.log, its result in the summary.
step() {
    name=$1 seconds=$2
    shift 2
    case " ${STEPS:-test golden answers memcheck racecheck soak bench} " in *" ${name%%-*} "*) ;; *) return 0 ;; esac
    say "$name (at most $seconds s)"
    began=$(date +%s)
    rc=0
    timeout -k 10 "$seconds" "$@" >"$results/$name.log" 2>&1 || rc=$?
    took=$(($(date +%s) - began))
    result=failed
    [ $rc != 0 ] || result=passed
    # Under some containers the tool cannot be used, which says nothing of the kernels.
    ! grep -q 'Device not supported' "$results/$name.log" || result=refused
    [ $result != failed ] || { failures=$((failures + 1)); tail -n 20 "$results/$name.log" >&2; }
    counts=$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed;.*/\1 passed, \2 failed/p' \
        "$results/$name.log" | tail -n 1)
    say "$name: $result in $took s${counts:+, $counts}"
    printf '%s{"step": "%s", "result": "%s", "exit_status": %s, "seconds": %s, "tests": "%s"}' \
        "$separator" "$name" "$result" "$rc" "$took" "$counts" >>"$results/steps"
    separator=',
  '
}

# Again and again until the time is over.
soak() {
    until=$(($(date +%s) + $1))
    rounds=0
    while [ "$(date +%s)" -lt "$until" ]; do
        "$here/kernel-tests" gpu::tests --skip mistakes --quiet || return 1
        rounds=$((rounds + 1))
    done
    echo "$rounds rounds"
}

run() {
    results=${1:-results}
    mkdir -p "$results"
    results=$(cd "$results" && pwd)
    rm -f "$results/steps"
    failures=0 separator=''
    for program in $programs; do
        [ -e "$here/$program" ] || gunzip -k "$here/$program.gz"
    done
    : "${TIDEMILL_CUDA_LIBRARIES:=$(python_libraries)}"
    export TIDEMILL_CUDA_LIBRARIES TIDEMILL_SOURCES="$here/sources"
    limit=${STEP_SECONDS:-240}
    gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1) || true
    say "${gpu:-nvidia-smi says of no GPU}"

    # Mistakes are planted in the emulation, and looked for here.
    step test "$limit" "$here/kernel-tests" gpu::tests gpu::cuda --skip mistakes
    # Models that are not in the cache there cannot be tested.
    real=''
    "$here/tidemill" models list 2>/dev/null | grep -q 'smollm2-135m-instruct .*here' || real='--skip real_model'
    # shellcheck disable=SC2086 # no word or two
    for name in golden answers; do
        step $name "$limit" "$here/${name}_gpu" $real
    done
    if command -v compute-sanitizer >/dev/null 2>&1; then
        for tool in memcheck racecheck; do
            step $tool "$limit" compute-sanitizer --tool $tool --error-exitcode 9 \
                "$here/kernel-tests" gpu::tests --skip mistakes --test-threads 1
        done
    else
        say "compute-sanitizer is not there"
    fi
    step soak $((${SOAK_SECONDS:-120} + limit)) sh "$here/gpu_tests.sh" soak "${SOAK_SECONDS:-120}"
    for shape in ${SHAPES:-qwen3-8b llama-3.1-8b smollm2-135m}; do
        step "bench-$shape" "${BENCH_SECONDS:-1800}" env TIDEMILL="$here/tidemill" python3 "$here/gpu_bench.py" \
            --shape "$shape" --json "$results/bench-$shape.json"
        # The table, whatever became of the rest.
        [ ! -e "$results/bench-$shape.log" ] || cat "$results/bench-$shape.log"
    done
    printf '{"gpu": "%s", "steps": [\n  %s\n]}\n' "$gpu" "$(cat "$results/steps")" \
        >"$results/summary.json"
    rm -f "$results/steps"
    [ $failures = 0 ] || { say "$failures steps failed; the logs are in $results"; exit 1; }
}

[ $# -ge 1 ] && [ $# -le 2 ] || usage
command=$1
shift
case $command in
    build | run | soak) $command "$@" ;;
    *) usage ;;
esac

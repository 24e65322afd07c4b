#!/usr/bin/env bash
# Run the tests of the compiled engine under AddressSanitizer and UndefinedBehaviorSanitizer, then those with threads
# under ThreadSanitizer. Needs GCC; what is built goes to a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r qpdiff tests pyproject.toml "$folder"
rm -f "$folder"/qpdiff/engines/compiled/_*.so

run() {  # sanitizers, library to load first, tests
    cmake -S . -B "$folder/build-$2" -G Ninja -DQPDIFF_SANITIZE="$1" -DQPDIFF_LEVELS=3 \
        -DPython_EXECUTABLE="$(command -v python)" -Dnanobind_DIR="$(python -m nanobind --cmake_dir)"
    cmake --build "$folder/build-$2"
    cp "$folder/build-$2"/_*.so "$folder/qpdiff/engines/compiled/"
    # libstdc++ as well, whose exceptions the sanitizer looks for when it starts.
    local preload="$(g++ -print-file-name="$2") $(g++ -print-file-name=libstdc++.so)"
    (cd "$folder" && LD_PRELOAD="$preload" PYTHONPATH="$folder" python -m pytest -q -x "${@:3}")
}

export ASAN_OPTIONS=detect_leaks=0  # Python keeps memory to its end
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
small="not jax and not torch and not strict and not fork and not many_threads"
run address,undefined libasan.so -k "$small" tests/test_engines.py tests/test_groups.py tests/test_certificates.py \
    tests/test_warm_start.py tests/test_degenerate.py

# What is not ours is not instrumented: only reports that name the engine count.
printf 'called_from_lib:libscipy_openblas\nrace:libscipy_openblas\nrace:_dl_deallocate_tls\nrace:_multiarray\n' \
    > "$folder/suppressions"
export TSAN_OPTIONS="suppressions=$folder/suppressions halt_on_error=1 exitcode=66"
run thread libtsan.so -k "threads or progress or sums_over or lanes" tests/test_engines.py tests/test_groups.py

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
    # What tests compile is instrumented as well, but not the compiler.
    printf '#!/bin/sh\nexec env -u LD_PRELOAD g++ -fsanitize=%s "$@"\n' "$1" > "$folder/c++"
    chmod +x "$folder/c++"
    (
        cd "$folder"
        export LD_PRELOAD="$preload" PYTHONPATH="$folder" CXX="$folder/c++"
        # What goes before PYTHONPATH, as an editable installation does, is not instrumented.
        python -P -c "import qpdiff; assert qpdiff.__file__.startswith('$folder'), qpdiff.__file__"
        # Reports do not go to Python's standard error, and so come out.
        python -m pytest -q -x --capture=sys "${@:3}"
    )
}

export ASAN_OPTIONS=detect_leaks=0  # Python keeps memory to its end
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
small="not jax and not torch and not strict and not [array and not numpy-array and not fork and not many_threads"
run address,undefined libasan.so -k "$small" tests/engines/test_engines.py tests/engines/test_groups.py \
    tests/engines/test_certificates.py tests/engines/test_warm_start.py tests/engines/test_degenerate.py \
    tests/engines/test_threads.py tests/engines/test_interrupt.py tests/engines/test_sparse.py \
    tests/derivative/test_sparse.py tests/linalg/test_sparse.py \
    tests/engines/test_blocks.py 'tests/linalg/test_kernels.py::test_linear_algebra[3]'

# What is not ours is not instrumented: only reports that name the engine count. The first kind may match one library.
cat > "$folder/suppressions" << 'END'
called_from_lib:numpy.libs/libscipy_openblas
called_from_lib:scipy.libs/libscipy_openblas
race:libscipy_openblas
race:_dl_deallocate_tls
race:_multiarray
END
export TSAN_OPTIONS="suppressions=$folder/suppressions halt_on_error=1 exitcode=66"
run thread libtsan.so -k "(threads or progress or sums_over or lanes or sparse) and not fork and not child and not memory" \
    tests/engines/test_engines.py tests/engines/test_groups.py tests/engines/test_threads.py \
    tests/engines/test_sparse.py

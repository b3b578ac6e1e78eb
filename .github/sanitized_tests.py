"""Run tests with the compiled loops built under AddressSanitizer and UndefinedBehaviorSanitizer, which stop at faults.

    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0 XDG_CACHE_HOME=/tmp/sanitized python .github/sanitized_tests.py tests/ops
"""

import sys

import pytest

from diffusers_bitsfusion.native import library

# Python and torch themselves are not sanitized: leaks of theirs are not looked for, in the options above.
_SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

library._FLAGS = (*(flag for flag in library._FLAGS if flag != "-O3"), *_SANITIZERS)
if library.native_library() is None:
    sys.exit("The compiled loops cannot be built under the sanitizers.")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))

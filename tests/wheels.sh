#!/usr/bin/env bash
# Build the wheel with the native library and the pure one, install each into a fresh virtual
# environment, and run the kernel tests there on a copy of the committed sources without the packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git archive HEAD | tar -x -C "$work" --one-top-level=sources
cp -r "$work/sources" "$work/tests"
# what is tested must come out of the wheel
rm -r "$work/tests/bidistill" "$work/tests/kernels/bidistill_kernels"

expect() { # the library's state as the installed package tells it
  "$work/$1/bin/python" -c '
import sys
from bidistill_kernels._native.library import load
print("native library:", load().reason)
sys.exit((load().library is not None) != (sys.argv[1] == "native"))' "$1"
}

for variant in native pure; do
  echo "== $variant"
  if [[ $variant == pure ]]; then export BIDISTILL_PURE=1; fi
  "${PYTHON:-python3}" -m venv "$work/$variant"
  pip=("$work/$variant/bin/python" -m pip -qq --disable-pip-version-check)
  "${pip[@]}" wheel --no-deps --wheel-dir "$work/wheels-$variant" "$work/sources"
  "${pip[@]}" install -c constraints.txt "$work/wheels-$variant"/*.whl pytest pytest-benchmark hypothesis triton
  ls "$work/wheels-$variant"
  expect $variant
  (cd "$work/tests" && "$work/$variant/bin/python" -m pytest tests/kernels -q -p no:cacheprovider \
    --ignore=tests/kernels/triton/test_compile.py "$@")
done

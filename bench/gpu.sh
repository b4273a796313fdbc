#!/usr/bin/env bash
# All that needs a GPU in one command and under nine minutes: the kernel tests, ourselves and others
# side by side, a tuning sweep. The table comes last, everything goes to bench/results/ (and $OUT).
#
#   bench/gpu.sh              on a CUDA machine; see bench/README.md
#   bench/gpu.sh --dry-run    every step on the CPU with tiny shapes; measures no time
#
# Nothing is installed: the checkout and the wheels of bench/wheels.sh (if they are there) go on the
# path, the machine's own packages stay as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$PWD/kernels:$PWD:$site PYTHONUNBUFFERED=1

version=$("$PYTHON" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

# what only helps a peer or us along is left aside if the machine has it, or is of another Python
needed() {
  case $1 in
    pydantic_core-*)
      [[ $1 == *-$version-* ]] && ! "$PYTHON" -c "import pydantic" 2> /dev/null
      ;;
    jaxtyping-* | wadler_lindig-* | typing_extensions-* | annotated_types-* | typing_inspection-*)
      ! "$PYTHON" -c "import ${1%%-*}" 2> /dev/null
      ;;
    pydantic-*)
      ! "$PYTHON" -c "import pydantic" 2> /dev/null
      ;;
  esac
}
for wheel in .wheels/*.whl; do
  if [[ ! -e $wheel ]]; then
    echo "no wheels, so no peers; bench/wheels.sh fetches them where there is a network"
  elif needed "$(basename "$wheel")"; then
    # such wheels are installed by unpacking them
    "$PYTHON" -m zipfile -e "$wheel" "$site"
  fi
done

for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then
    # before any kernel is decorated; and no CUDA, should there be one
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
  fi
done

"$PYTHON" -m bench.gpu "$@"

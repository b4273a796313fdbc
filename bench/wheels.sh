#!/usr/bin/env bash
# Fetch into .wheels/ what a CUDA machine without a network lacks: the projects we compare with,
# jaxtyping, and pydantic for the trainer. They come without their dependencies: torch, triton,
# transformers and peft are the machine's own, and nothing else is imported. Only pydantic's core is
# not pure Python; it is fetched for each Python that the machine may have. Also notes the commit for
# machines to which the checkout is copied without .git.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi

mkdir -p .wheels
echo '*' > .wheels/.gitignore
echo "$(git rev-parse HEAD)$([[ -z $(git status --porcelain) ]] || echo -dirty)" > .wheels/commit

download() {
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest .wheels "$@"
}

pinned() {
  sed -n "s/^$1==\([^; ]*\).*/\1/p" constraints.txt
}

for name in liger-kernel trl orda-kernel cut-cross-entropy jaxtyping typing-extensions wadler-lindig \
  pydantic annotated-types typing-inspection; do
  release=$(pinned "$name")
  if ! compgen -G ".wheels/${name//-/_}-$release-*none-any.whl" > /dev/null; then
    download "$name==$release"
  fi
done

release=$(pinned pydantic-core)
for python in 10 11 12 13; do
  if ! compgen -G ".wheels/pydantic_core-$release-cp3$python-*.whl" > /dev/null; then
    download --python-version "3.$python" --implementation cp --platform manylinux2014_x86_64 \
      --platform manylinux_2_17_x86_64 "pydantic-core==$release"
  fi
done
du -sh .wheels

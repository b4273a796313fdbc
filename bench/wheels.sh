#!/usr/bin/env bash
# Fetch into .wheels/ what a CUDA machine without a network lacks: the projects we compare with and
# jaxtyping. All are pure Python and come without their dependencies: torch, triton and transformers
# are the machine's own, and nothing else is imported. Also notes the commit for machines to which
# the checkout is copied without .git.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi

mkdir -p .wheels
echo '*' > .wheels/.gitignore
echo "$(git rev-parse HEAD)$([[ -z $(git status --porcelain) ]] || echo -dirty)" > .wheels/commit

for name in liger-kernel trl orda-kernel cut-cross-entropy jaxtyping typing-extensions wadler-lindig; do
  package=$(sed -n "s/^$name==\([^; ]*\).*/$name==\1/p" constraints.txt)
  release=${package##*==}
  if ! compgen -G ".wheels/${name//-/_}-$release-*none-any.whl" > /dev/null; then
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest .wheels "$package"
  fi
done
du -sh .wheels

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

pinned() { sed -n "s/^$1==\([^; ]*\).*/$1==\1/p" constraints.txt; }
for package in liger-kernel==0.8.5 trl==1.16.0 orda-kernel==0.1.0 cut-cross-entropy==25.1.1 \
  "$(pinned jaxtyping)" "$(pinned typing-extensions)" wadler-lindig==0.1.8; do
  name=${package%%==*} release=${package##*==}
  if ! compgen -G ".wheels/${name//-/_}-$release-*none-any.whl" > /dev/null; then
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest .wheels "$package"
  fi
done
du -sh .wheels

#!/usr/bin/env bash
# The tables of peers in docs/performance.md. Each peer has the Python that its packages need.
set -euo pipefail
cd "$(dirname "$0")/.."

environments=runs/peers
mkdir -p "$environments"
prepare() { # NAME PYTHON REQUIREMENTS
  [ -x "$environments/$1/bin/python" ] && return
  "$2" -m venv "$environments/$1"
  "$environments/$1/bin/pip" install --quiet -r "$3"
}

prepare maxtext python3.12 scripts/peers/requirements-maxtext.txt
prepare litgpt python3.11 scripts/peers/requirements-litgpt.txt
prepare transformers python3.11 requirements-dev.txt
# A turn of all peers takes 2 seconds on two cores at the first shape, 20 at the second; of each,
# 20 steps or more are timed.
declare -A rounds=([tiny]=40 [small]=10)
for shape in tiny small; do
  for environment in none cpu; do
    "$environments/maxtext/bin/python" -m scripts.peers \
      --shape "$shape" --environment "$environment" --rounds "${rounds[$shape]}" --steps 2 \
      --python "litgpt=$environments/litgpt/bin/python" \
      "transformers=$environments/transformers/bin/python" \
      --output "$environments/${shape}_$environment.json" --page docs/performance.md
  done
done

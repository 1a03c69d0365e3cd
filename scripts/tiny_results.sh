#!/usr/bin/env bash
# The table and the picture of the README: three seeds, grown and from scratch, about twenty
# minutes on two cores. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."

for seed in 0 1 2; do
  for name in tiny tiny_scratch; do
    python -m stackjax.train --config "configs/$name.py" --seed "$seed" \
      --workdir "runs/$name-seed-$seed"
  done
done
python -m stackjax.analysis.plots runs/tiny-seed-0 runs/tiny_scratch-seed-0 --output docs/tiny.png

#!/usr/bin/env bash
# The table and the picture of the README: three seeds, grown and from scratch, compared; about seven
# minutes on two cores. What is finished is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."

for seed in 0 1 2; do
  for name in tiny tiny_scratch; do
    python -m stackjax.train --config "configs/$name.py" --seed "$seed" \
      --workdir "runs/$name-seed-$seed"
  done
done
python -m stackjax.compare runs/tiny_scratch-seed-* runs/tiny-seed-* --output runs/tiny-comparison
cp runs/tiny-comparison/loss_over_flops_6nd.png docs/tiny.png

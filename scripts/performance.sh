#!/usr/bin/env bash
# Every table of docs/performance.md, on this machine. A process each, so that peaks of memory are
# its own; what does not fit says so.
set -euo pipefail
cd "$(dirname "$0")/.."

results=runs/performance
mkdir -p "$results"
measure() { # NAME CONFIG [options and overrides]
  python -m scripts.benchmark "${@:2}" --out "$results/$1.json"
}

# 52M parameters, 32,000 tokens: the second shape that codebases are compared at.
small=(
  configs/tiny_scratch.py
  --model.vocab-size 32000 --model.num-layers 6 --model.embed-dim 512 --model.mlp-dim 1408
  --model.num-heads 8 --model.num-kv-heads 8 --model.head-dim 64
  --data.path data/none --data.corpus None --data.seq-len 512
  --stages.0.batch-size 4
)

measure tiny configs/tiny.py --sections loader growth checkpoint step ahead host --ablate
measure small "${small[@]}" --sections loader step host
measure use-tiny configs/tiny.py --sections inference
measure use-small "${small[@]}" --sections inference --evaluation.batch-size 8
# Growth from 6 to 24 layers of 1024 channels, and checkpoints of both.
measure growth-410m configs/gstack_410m.py --sections loader growth checkpoint
for phase in 0 1; do
  measure "step-1b-$phase" configs/gstack_1b.py --sections step --phases "$phase" \
    --stages.0.batch-size 16 --stages.0.accumulate 1 \
    --stages.1.batch-size 16 --stages.1.accumulate 1
done
measure growth-1b configs/gstack_1b.py --sections loader growth checkpoint
python -m scripts.benchmark_data --copies 0 --out "$results/mixtures.json"
python -m scripts.benchmark_data --seq-lens --out "$results/preparation.json"

python -m scripts.performance "$results"/*.json
scripts/peers.sh

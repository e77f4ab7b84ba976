#!/usr/bin/env bash
# Every figure of docs/performance.md, on an idle machine; results.json and a picture each under runs/bench-*.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive
few=floor,peft-lora,mj-lora,mj-lora-fa

measure() { # NAME OPTIONS...
    local name=$1
    shift
    "${BIN:-.venv/bin}/monkeyjump" bench --input-gradients --output "runs/bench-$name" "$@"
}

measure step --only step,saved,memory --memory-runs 3 --pairs 40 --candidates $few
measure dropout --only step,saved,memory --memory-runs 3 --pairs 40 --candidates $few --dropout 0.05
measure bfloat16 --only saved --dtype bfloat16 --candidates $few
measure rank16 --only step --pairs 12 --candidates $few --rank 16
measure rank16-dropout --only step --pairs 12 --candidates $few --rank 16 --dropout 0.05
measure wide --only step --pairs 12 --candidates $few \
    --hidden-size 1024 --heads 16 --kv-heads 16 --intermediate-size 2816
measure inference --only inference --pairs 12 --decode-tokens 32 --candidates $few
measure all --only step,saved,memory,size,kmeans --pairs 12
measure mixtures --only step,saved,memory,size --pairs 12 --candidates all
"${BIN:-.venv/bin}/python" benchmarks/router_share.py

#!/bin/bash
# Submits every run of 2026-11-20-lora-rank to Slurm, its evaluation after its training. Where chiplog is at hand,
# `chiplog submit-experiment 2026-11-20-lora-rank --engine slurm` does it in arrays, within your limits, and once only.
set -euo pipefail
cd "$(dirname "$0")/runs"

submit() ( # RUN SCRIPT [OPTION]: the job's id
  cd "$1"
  sbatch --parsable --kill-on-invalid-dep=yes "${@:3}" "$2" | cut -d ';' -f 1
)

note() { # RUN ID [ID OF ITS EVALUATION]: chiplog follows the jobs that it finds here
  local attempt=1 evaluation=null
  if [ -f ../jobs.jsonl ]; then attempt=$((1 + $(grep -c "\"run\":\"$1\"" ../jobs.jsonl || true))); fi
  if [ -n "${3:-}" ]; then evaluation="\"$3\""; fi
  echo "{\"run\":\"$1\",\"engine\":\"slurm\",\"job_id\":\"$2\",\"eval_job_id\":$evaluation,\"attempt\":$attempt}" >> ../jobs.jsonl
}

for run in 1B_rank4 1B_rank64 3B_rank4 3B_rank64; do
  job=$(submit "$run" run.sbatch)
  evaluation=$(submit "$run" eval.sbatch "--dependency=afterok:$job")
  note "$run" "$job" "$evaluation"
done
for run in 1B_base 3B_base; do
  note "$run" "$(submit "$run" run.sbatch)"
done

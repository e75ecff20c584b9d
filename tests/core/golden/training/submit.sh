#!/bin/bash
# Submits to Slurm every run of 2026-11-20-lr that jobs.jsonl does not name yet.
# Where chiplog is at hand, `chiplog submit-experiment 2026-11-20-lr --engine slurm` does it in arrays, within your
# limits, and submits again what failed.
set -euo pipefail
cd "$(dirname "$0")/runs"

is_new() { # RUN
  if ! grep -Fqs "\"run\":\"$1\"" ../jobs.jsonl; then return 0; fi
  echo "$1 was submitted before: chiplog, or sbatch in runs/$1, submits it again" >&2
  return 1
}

submit() ( # RUN SCRIPT [OPTION]: the job's id
  cd "$1" && sbatch --parsable --kill-on-invalid-dep=yes "${@:3}" "$2" | cut -d ';' -f 1
)

note() { # RUN ID [ID OF ITS EVALUATION]: chiplog follows the jobs that it finds here
  local evaluation=null
  if [ -n "${3:-}" ]; then evaluation="\"$3\""; fi
  echo "{\"run\":\"$1\",\"engine\":\"slurm\",\"job_id\":\"$2\",\"eval_job_id\":$evaluation,\"attempt\":1}" >> ../jobs.jsonl
}

for run in width64_lr0.001 width64_lr0.00316 width128_lr0.001 width128_lr0.00316; do
  is_new "$run" || continue
  job=$(submit "$run" run.sbatch)
  note "$run" "$job"
done

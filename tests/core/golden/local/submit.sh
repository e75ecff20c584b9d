#!/bin/bash
# Submits every run of 2026-11-20-lora-rank to Slurm.
# chiplog does not follow these jobs yet: squeue and their logs show how they stand.
# On a machine without Slurm: chiplog submit-experiment 2026-11-20-lora-rank
set -euo pipefail
cd "$(dirname "$0")/runs"

for run in 1B_rank4 1B_rank64 3B_rank4 3B_rank64 1B_base 3B_base; do
  (cd "$run" && sbatch run.sbatch)
done

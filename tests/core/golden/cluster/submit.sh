#!/bin/bash
# Submits every run of 2026-11-20-lora-rank to Slurm.
# On a machine without Slurm: chiplog submit-experiment 2026-11-20-lora-rank
set -euo pipefail
cd "$(dirname "$0")/runs"

for run in 1B_rank4 1B_rank64 3B_rank4 3B_rank64 1B_base 3B_base; do
  (cd "$run" && sbatch run.sbatch)
done

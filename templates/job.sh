# What every job does, read by runs/*/*.sbatch:
#   work COMMAND           runs it and hands signals on to it
#   work_together COMMAND  the same of one process for each task of the job, which meet at MASTER_ADDR and MASTER_PORT
#   left FILE              ends the job as failed where the command did not leave its result
# Where it ends with 75, which says that it saved its state and would go on, the job is put back into the queue.
set -euo pipefail
RESTARTS=10 # at most; submitting it again begins to count anew
work() {
  alone
  run 1 "$@"
  leave
}
work_together() {
  alone
  # A port that is free here, where the first process runs: a fixed one may be another job's.
  MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  if [ "${CHIPLOG_ENGINE:-slurm}" = slurm ]; then
    local first
    told=${told:-no}
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR MASTER_PORT told
    # One that ended early may be waited for, or the others would be killed while they save; one that hangs may not.
    run 1 srun --kill-on-bad-exit=0 --wait=60 --mpi=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
      bash "${BASH_SOURCE[0]}" "$@"
  else
    export MASTER_ADDR=127.0.0.1 MASTER_PORT
    run "$SLURM_NTASKS" "$@"
  fi
  leave
}
alone() { # two jobs would write one run: another queue of this machine may have one, or have left one behind
  if [ "${CHIPLOG_ENGINE:-slurm}" != local ] || ! command -v flock >/dev/null; then return; fi
  local held lock
  exec {lock}>>.running # until the last process that inherits it has ended
  held=0
  flock --timeout 5 --conflict-exit-code 42 "$lock" || held=$?
  if [ "$held" = 42 ]; then
    echo "error: another job works in $PWD: let it end or end it, then submit again" >&2
    exit 1
  fi
}
run() { # N COMMAND: that many processes of it; the highest of their exit statuses is in `code`
  local place child each children=()
  code=0 ended_from_outside=no
  for ((place = 0; place < $1; place++)); do
    ( # until it listens, the signal does not end it
      trap '' USR1
      if [ "$1" -gt 1 ]; then export SLURM_PROCID=$place SLURM_LOCALID=$place; fi
      exec "${@:2}"
    ) &
    children+=($!)
  done
  trap 'tell "${children[@]}"' USR1 # the time limit is near
  if [ "${told:-no}" = yes ]; then tell "${children[@]}"; fi
  trap 'ended_from_outside=yes; kill -TERM "${children[@]}" 2>/dev/null || true' TERM # cancelled, or preempted
  for child in "${children[@]}"; do
    while wait "$child" || true; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait`, not the command
    each=0
    wait "$child" || each=$?
    if [ "$each" -gt "$code" ]; then code=$each; fi
  done
  trap - USR1 TERM
}
tell() { # PID...: each once it listens, and once only, since a second signal would end it on its way out
  trap '' USR1
  local child
  for child in "$@"; do
    (while kill -0 "$child" && ! listens "$child"; do sleep 0.2; done && kill -USR1 "$child") 2>/dev/null &
  done
}
listens() { # PID: whether it catches SIGUSR1, the tenth bit of what the kernel tells; srun blocks it and waits for it
  local mask
  # Just forked, it is this script still, with its traps.
  if [ "$(tr -d '\0' <"/proc/$1/cmdline")" = "$(tr -d '\0' <"/proc/$$/cmdline")" ]; then return 1; fi
  for mask in $(sed -n 's/^Sig\(Cgt\|Blk\):\t//p' "/proc/$1/status"); do
    if ((0x$mask & 0x200)); then return 0; fi
  done
  return 1
}
leave() { # as the processes did
  if [ "$code" = 75 ] && [ "$ended_from_outside" = no ]; then requeue; fi
  if [ "$code" != 0 ]; then exit "$code"; fi
}
left() {
  if [ ! -f "$1" ]; then
    echo "error: it ended with exit status 0 and left no $1" >&2
    exit 1
  fi
}
requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
    echo "error: it was put back into the queue $RESTARTS times and is not done: submit it again to go on" >&2
    exit 76
  fi
  if [ "${CHIPLOG_ENGINE:-slurm}" = slurm ]; then
    # Not by SLURM_JOB_ID: the last element of an array has the id of the whole.
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}" && sleep 300
  fi
  exit 75 # which asks the local engine for the same
}
if [ "${BASH_SOURCE[0]}" = "$0" ]; then # one of the processes that srun starts
  trap told=yes USR1
  run 1 "$@"
  exit "$code"
fi
echo "job ${SLURM_JOB_ID:-?} on $(hostname), $(date +%FT%T%z)"

# What every job does, read by runs/*/*.sbatch: `work COMMAND` runs it, hands signals on to it, and where it ends with 75,
# which says that it saved its state and would go on, has the job put back into the queue.
set -euo pipefail
RESTARTS=10 # at most; submitting it again begins to count anew
echo "job ${SLURM_JOB_ID:-?} on $(hostname), $(date +%FT%T%z)"

work() {
  local child code=0 ended_from_outside=no
  (trap '' USR1 && exec "$@") & # until it listens, the signal does not end it
  child=$!
  trap 'tell "$child"' USR1 # the time limit is near
  if [ "${told:-no}" = yes ]; then tell "$child"; fi
  trap 'ended_from_outside=yes; kill -TERM "$child" 2>/dev/null || true' TERM # cancelled, or preempted
  while wait "$child" || true; kill -0 "$child" 2>/dev/null; do :; done # a signal ends `wait`, not the command
  wait "$child" || code=$?
  trap - USR1 TERM
  if [ "$code" = 75 ] && [ "$ended_from_outside" = no ]; then requeue; fi
  if [ "$code" != 0 ]; then exit "$code"; fi
}

tell() { # PID: once it listens, and once only, since a second signal would end it on its way out
  (while kill -0 "$1" && ! listens "$1"; do sleep 0.2; done && kill -USR1 "$1") 2>/dev/null &
}

listens() { # PID: whether it catches SIGUSR1, the tenth bit of what the kernel tells
  local caught
  caught=$(sed -n 's/^SigCgt:\t//p' "/proc/$1/status") && ((0x${caught:-0} & 0x200))
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

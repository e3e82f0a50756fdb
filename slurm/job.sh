# shellcheck shell=bash
# One attempt of one stage, sourced by every sbatch file after env.sh.
#
# What happens next depends on the exit code of the command:
#   0        the job has succeeded and the next stage starts
#   85       it saved and stopped early: requeue (lopd_megatron.errors.EXIT_REQUEUE)
#   2        wrong input: the job fails at once
#   other    it failed: requeue LOPD_MAX_RETRIES times, then the job fails
# After a signal (time limit, preemption) any exit code but 0 means requeue. No job is requeued more than
# LOPD_MAX_RESTARTS times. An early stop must never end in 0: afterok would start the next stage.

: "${LOPD_LOGS:=logs}" "${LOPD_MAX_RESTARTS:=8}" "${LOPD_MAX_RETRIES:=1}"
EXIT_USER_ERROR=2
EXIT_REQUEUE=85
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
stopping=0

say() { echo "$(date +%T) job $job attempt ${SLURM_RESTART_COUNT:-0}: $*"; }

# A folder for each attempt, so nothing is overwritten, and a link to the last: log_folder STAGE
log_folder() {
  local attempt=$job.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$LOPD_LOGS/$1/$attempt" &&
    ln -sfn "$attempt" "$LOPD_LOGS/$1/latest${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" &&
    echo "$LOPD_LOGS/$1/$attempt"
}

# Where the nodes of this job meet. The address of the node record also works where node names do not resolve.
# The port is free, lies below the kernel's own range (no outgoing connection takes it meanwhile), and the
# search starts from the job id, so jobs that share a node look in different places.
rendezvous() {
  local port=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 10000))
  PET_MASTER_ADDR=$(scontrol show node "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" -o |
    sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
  if [ -z "$PET_MASTER_ADDR" ]; then
    say "Slurm does not tell the address of the first node of $SLURM_JOB_NODELIST"
    return 1
  fi
  while (: <"/dev/tcp/$PET_MASTER_ADDR/$port") 2>/dev/null; do port=$((port + 1)); done
  export PET_MASTER_ADDR PET_MASTER_PORT=$port
}

# One task on each node, in the container when there is one. --kill-on-bad-exit: when one node fails the others
# are ended, instead of waiting for it in a collective. --cpu-bind=none: the task's processes share all CPUs.
# --export=ALL: some sites export nothing (SLURM_EXPORT_ENV). Becomes srun, so that signals reach it: call it in a subshell or in the background.
step() {
  local container=()
  if [ -n "${LOPD_CONTAINER_IMAGE:-}" ]; then
    container=(--container-image="$LOPD_CONTAINER_IMAGE" --container-workdir="$PWD" --no-container-mount-home
      --container-mounts="$PWD:$PWD${LOPD_CONTAINER_MOUNTS:+,$LOPD_CONTAINER_MOUNTS}")
  fi
  exec srun --kill-on-bad-exit=1 --cpu-bind=none --export=ALL "${container[@]}" "$@"
}

# Every GPU, disk and clock, and one all-reduce over all ranks; names the bad node: check_nodes LOGS
check_nodes() {
  [ "$LOPD_HEALTH_CHECK" = 1 ] || return 0
  local code=0 where=(--standalone) bad nodes gpus=${SLURM_GPUS_ON_NODE:-0}
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  [ "$SLURM_NNODES" = 1 ] || where=(--nnodes "$SLURM_NNODES")
  [ "$gpus" -gt 0 ] && where+=(--nproc-per-node "$gpus")
  (step --output="$1/health-%n.log" python -m lopd_megatron.launch.torchrun "${where[@]}" \
    -m lopd_megatron.launch.node_check --nodes "$nodes" --gpus "$gpus" --folder "$LOPD_LOGS") || code=$?
  [ "$code" = 0 ] && return
  bad=$(cat "$1"/health-*.log | grep '^node ' | sort -u) || bad="exit code $code, see $1"
  say "health check failed: $bad"
  return "$code"
}

# Run a command to its end and judge its exit code: run_stage LOGS COMMAND...
run_stage() {
  local logs=$1 code=0 srun=
  shift
  # USR1 and not TERM: srun passes USR1 on to the tasks, TERM makes it kill them on the spot.
  trap 'stopping=1; say "told to stop"; [ -z "$srun" ] || kill -s USR1 "$srun" || true' USR1 TERM
  [ $stopping = 0 ] || finish $EXIT_REQUEUE
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # Not SLURM_ARRAY_TASK_COUNT, which is 1 for a worker that somebody submits again with --array=3.
    set -- "$@" --worker "$SLURM_ARRAY_TASK_ID/$((SLURM_ARRAY_TASK_MAX + 1))"
  fi
  say "$*"
  step --output="$logs/node-%n.log" "$@" &
  srun=$!
  [ $stopping = 0 ] || { sleep 1 && kill -s USR1 "$srun" || true; } # told while srun was starting
  while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done # wait also ends when a trap has run
  wait "$srun" || code=$?
  finish "$code"
}

finish() {
  local code=$1 failures="$LOPD_LOGS/.failures.$job"
  trap '' USR1 # the warning changes nothing any more; unless ignored it would end this shell
  trap - TERM
  if [ "$code" = 0 ]; then
    say "done"
    exit 0
  fi
  if [ "$code" = $EXIT_USER_ERROR ]; then
    say "wrong input (exit code $code): not tried again"
    exit "$code"
  fi
  if [ "$code" != $EXIT_REQUEUE ] && [ $stopping = 0 ]; then
    echo "$code" >>"$failures"
    if [ "$(wc -l <"$failures")" -gt "$LOPD_MAX_RETRIES" ]; then
      say "failed with exit code $code after $LOPD_MAX_RETRIES retries"
      exit "$code"
    fi
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$LOPD_MAX_RESTARTS" ]; then
    say "exit code $code, and $LOPD_MAX_RESTARTS restarts are used up"
    exit "$code"
  fi
  say "exit code $code: requeue"
  for _ in {1..6}; do # a busy controller may not answer at once
    if scontrol requeue "$SLURM_JOB_ID"; then
      sleep 120 # Slurm ends this shell; leaving first would end the job
      break
    fi
    sleep 10
  done
  exit "$code"
}

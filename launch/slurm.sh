#!/usr/bin/env bash
# A run on the GPUs of a Slurm cluster, one task a GPU; requeued when a host is lost or the job preempted.
#
#   launch/slurm.sh [start]             submits the run
#   launch/slurm.sh smoke | doctor      submits `lemur smoke` with the words in SMOKE, or `lemur doctor`, in its place,
#                                       waits, and prints what it has found
#
# --settings FILE   default launch/settings.sh; see launch/settings.example.sh
# --dry-run         prints the command and the batch script, and submits nothing
#
# Exit status of `smoke` and `doctor`: 0 all is well, 2 something would stop the run.
# Settings: RUN, CONFIG, WORKDIR, OVERRIDES, SMOKE, ENVIRONMENT, SECRETS_FILE, NODES, GPUS_PER_NODE, SLURM_FLAGS, as in
# launch/settings.example.sh. The code and .venv must lie where every node sees them.
set -euo pipefail
cd "$(dirname "$0")/.."

verb='' settings=launch/settings.sh dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --settings)
      settings=${2:?--settings needs a file}
      shift
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    start | smoke | doctor)
      if [ -n "$verb" ]; then
        echo "slurm.sh: one verb at a time: $verb or $1?" >&2
        exit 2
      fi
      verb=$1
      ;;
    *)
      echo "slurm.sh: unknown argument $1; see launch/slurm.sh --help" >&2
      exit 2
      ;;
  esac
  shift
done
if [ ! -f "$settings" ]; then
  echo "slurm.sh: there is no $settings: copy launch/settings.example.sh there and fill it in" >&2
  exit 2
fi
# shellcheck source=launch/settings.example.sh
source launch/settings.example.sh # defaults of whatever the file leaves out
unset SMOKE                       # a string would become the first word of the list that is there
# shellcheck source=launch/settings.example.sh
source "$settings"
declare -p SMOKE &>/dev/null || SMOKE=()
if [[ $(declare -p SMOKE) != 'declare -a'* ]]; then
  echo "slurm.sh: SMOKE in $settings is one string: write SMOKE=(WORD WORD ...)" >&2
  exit 2
fi
for name in RUN CONFIG WORKDIR; do
  if [ -z "${!name}" ]; then
    echo "slurm.sh: $name is empty in $settings" >&2
    exit 2
  fi
done

words=(--config "$CONFIG" --workdir "$WORKDIR" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
printf -v here '%q' "$PWD"
exports=''
for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
  printf -v exports '%sexport %s=%q\n' "$exports" "${pair%%=*}" "${pair#*=}"
done
if [ -n "$SECRETS_FILE" ]; then
  printf -v exports '%sset -a; source %q; set +a\n' "$exports" "$SECRETS_FILE"
fi

# The batch scripts go in by standard input: nothing of them is seen in `ps`.
top="#!/usr/bin/env bash
cd $here
export PATH=$here/.venv/bin:\$PATH
export LEMUR_RELAUNCH=1
$exports"
train="${top}srun --kill-on-bad-exit=1 lemur train $(printf '%q ' "${words[@]}")
status=\$?
# 75: a host was lost (cluster/watchdog.py); above: a task was killed or aborted. The run goes on from the newest
# checkpoint. 1 and 2 are mistakes that come again.
if [ \$status -ge 75 ] && [ \${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]; then
  scontrol requeue \$SLURM_JOB_ID
fi
exit \$status
"

# submit SCRIPT FLAG...
submit() {
  local command=(sbatch --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE"
    "${@:2}" ${SLURM_FLAGS[@]+"${SLURM_FLAGS[@]}"})
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    printf "<<'SCRIPT'\n%sSCRIPT\n" "$1"
  else
    "${command[@]}" <<<"$1"
  fi
}

start() {
  submit "$train" --job-name="$RUN" --requeue --open-mode=append --output="$RUN-%j.log" --signal=TERM@120
}

# examine VERB WORD...
examine() {
  local log=$RUN-$1.log status=0
  [ -n "$dry_run" ] || rm -f "$log"
  # Every task fails where one check does: none must end the first one before it has printed what it found.
  submit "${top}srun --kill-on-bad-exit=0 lemur $(printf '%q ' "$@")
" --job-name="$RUN-$1" --no-requeue --wait --output="$log" || status=$?
  # What all tasks say alike is said once.
  if [ -z "$dry_run" ] && [ -f "$log" ]; then awk '!said[$0]++' "$log"; fi
  return "$status"
}

doctor() { examine doctor "${words[@]}"; }

smoke() {
  if [ ${#SMOKE[@]} -eq 0 ]; then
    echo "slurm.sh: SMOKE is empty in $settings: say which checkpoint and mesh, as for lemur smoke" >&2
    exit 2
  fi
  examine smoke "${SMOKE[@]}"
}

"${verb:-start}"

#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, through XPK (https://github.com/AI-Hypercomputer/xpk; pip install xpk).
#
#   launch/gke.sh start                 submits the run as a workload of the cluster
#   launch/gke.sh smoke | doctor        submits `lemur smoke` with the arguments in SMOKE, or `lemur doctor` for the run
#   launch/gke.sh status | logs         lists the workloads of the cluster | prints the log of the first host
#   launch/gke.sh delete                deletes the workload: hosts get SIGTERM and 120 s, in which the run saves
#
# --settings FILE   default launch/settings.sh; see launch/settings.example.sh
# --dry-run         prints the command and runs nothing; XPK's own dry run: add (--dry-run --output-manifest-file=FILE)
#                   to XPK_FLAGS
#
# The run restarts after exit status 75 (a host was lost, or the run saved on SIGTERM) and after signals, at most
# MAX_RESTARTS times. Status 1 and 2 (the config or data are wrong) fail the workload at once.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/settings_reader.sh
read_settings gke.sh "$@"
require RUN CONFIG WORKDIR ACCELERATOR PROJECT ZONE CLUSTER IMAGE
[ -z "$SECRETS_FILE" ] || fail "SECRETS_FILE is read by pod.sh alone: leave it empty"

name=$RUN restarts=$MAX_RESTARTS
case $verb in
  start | doctor) command=(lemur "${verb/start/train}" --config "$CONFIG" --workdir "$WORKDIR" ${OVERRIDES[@]+"${OVERRIDES[@]}"}) ;;
  smoke) require_smoke && command=(lemur smoke "${SMOKE[@]}") ;;
esac
[ "$verb" = start ] || name=$RUN-$verb restarts=0

place=(--project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER")
case $verb in
  start | doctor | smoke)
    case $PROVISIONING in
      on-demand) tier=(--on-demand) ;;
      spot) tier=(--spot) ;;
      *) fail "PROVISIONING is $PROVISIONING: it must be on-demand or spot here; pass --reservation in XPK_FLAGS" ;;
    esac
    variables=(--env=LEMUR_JOIN=1 --env=LEMUR_RELAUNCH=1)
    for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do variables+=(--env="$pair"); done
    # `exec`: XPK sends SIGTERM to the shell that it starts, so the run must replace that shell.
    execute xpk workload create "${place[@]}" --workload="$name" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
      "${tier[@]}" --docker-image="$IMAGE" "${variables[@]}" --max-restarts="$restarts" --restart-on-exit-codes=75 \
      --termination-grace-period-seconds=120 ${XPK_FLAGS[@]+"${XPK_FLAGS[@]}"} --command="exec $(quoted "${command[@]}")"
    ;;
  status) execute xpk workload list "${place[@]}" ;;
  logs) execute kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$RUN,batch.kubernetes.io/job-completion-index=0" ;;
  delete) execute xpk workload delete "${place[@]}" --workload="$RUN" ;;
  *) fail "name one of: start, smoke, doctor, status, logs, delete; see launch/gke.sh --help" ;;
esac

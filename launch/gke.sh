#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster. The cluster's JobSet controller starts it again after a lost host or an
# eviction, so nothing here has to watch it.
#
#   launch/gke.sh smoke | doctor        runs `lemur smoke` with the words in SMOKE, or `lemur doctor` for the run, in a set
#                                       of its own, and prints what it has found; needs the nodes, so before `start`
#   launch/gke.sh start                 makes the manifest of a JobSet (launch/gke.py) and hands it to kubectl
#   launch/gke.sh status | logs         the JobSet and its pods | follows the log of the first host
#   launch/gke.sh delete                ends it: the hosts get SIGTERM and 120 s, in which the run saves
#
# --settings FILE   default launch/settings.sh; see launch/settings.example.sh
# --dry-run         prints the commands exactly as they would be executed, and executes none
#
# Exit status of `smoke` and `doctor`: 0 all is well, 2 something would stop the run.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "gke.sh: $1" >&2
  exit 2
}

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
    -*) fail "unknown argument $1; see launch/gke.sh --help" ;;
    *)
      [ -z "$verb" ] || fail "one verb at a time: $verb or $1?"
      verb=$1
      ;;
  esac
  shift
done
[ -f "$settings" ] || fail "there is no $settings: copy launch/settings.example.sh there and fill it in"
# shellcheck source=launch/settings.example.sh
source launch/settings.example.sh # defaults of whatever the file leaves out
unset SMOKE                       # a string would become the first word of the list that is there
# shellcheck source=launch/settings.example.sh
source "$settings"
declare -p SMOKE &>/dev/null || SMOKE=()
[[ $(declare -p SMOKE) == 'declare -a'* ]] || fail "SMOKE in $settings is one string: write SMOKE=(WORD WORD ...)"
for name in RUN CONFIG WORKDIR ACCELERATOR IMAGE NAMESPACE; do
  [ -n "${!name}" ] || fail "$name is empty in $settings"
done
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES is $SLICES in $settings: it must be a whole number, 1 or above"
[ -z "$SECRETS_FILE" ] || fail "SECRETS_FILE is for machines: make a Kubernetes secret of it and name that in SECRET"

words=(--config "$CONFIG" --workdir "$WORKDIR" --topology "$ACCELERATOR" --slices "$SLICES"
  --image "$IMAGE" --name "$RUN" --namespace "$NAMESPACE" --max-restarts "$MAX_RESTARTS"
  --service-account "$SERVICE_ACCOUNT" --secret "$SECRET")
[ "$PROVISIONING" != spot ] || words+=(--spot)
for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do words+=(--env "$pair"); done
words+=(${OVERRIDES[@]+"${OVERRIDES[@]}"})

execute() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

here=(--namespace "$NAMESPACE")
set_of=jobset.sigs.k8s.io/jobset-name
first_host=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0

# make WORD...: the manifest, with further words for launch/gke.py, which names what is wrong and ends with 2.
make() {
  "${PYTHON:-python}" launch/gke.py --help &>/dev/null ||
    fail "${PYTHON:-python} cannot import lemur_jax: activate the environment it is installed in, or set PYTHON"
  "${PYTHON:-python}" launch/gke.py "$@" "${words[@]}"
}

# apply MANIFEST
apply() {
  if [ -n "$dry_run" ]; then
    printf "kubectl apply -f - <<'MANIFEST'\n%s\nMANIFEST\n" "$1"
  else
    kubectl apply -f - <<<"$1"
  fi
}

# `lemur doctor` or `lemur smoke` in a set of its own, without restarts.
examination=$RUN-$verb
first=(--selector "$set_of=$examination,$first_host")
clean() { execute kubectl delete jobset "$examination" "${here[@]}" --ignore-not-found; }
pod() { execute kubectl get pods "${here[@]}" "${first[@]}" --output \
  'jsonpath={.items[*].status.phase} {.items[*].status.containerStatuses[*].state.waiting.reason}'; }
# A set that fails takes the pods that still run with it: so the log is followed, and not read at the end.
table() { execute kubectl logs --follow --tail=-1 "${here[@]}" "${first[@]}"; }
ended() { execute kubectl get jobset "$examination" "${here[@]}" --output \
  'jsonpath={.status.conditions[?(@.status=="True")].type}'; }

examine() {
  local manifest
  words+=(--name "$examination" --max-restarts 0)
  manifest=$(make --verb "$verb" "$@") # before anything is deleted
  clean                                # what was left behind
  apply "$manifest"
  if [ -n "$dry_run" ]; then
    pod && table && ended && clean
    return
  fi
  trap clean EXIT
  # Other conditions of a set have names like StartupPolicyCompleted.
  local over='(^| )(Completed|Failed)( |$)' now end='' before=''
  while true; do
    now=$(pod)
    end=$(ended)
    [[ ! $now =~ Running|Succeeded|Failed && ! $end =~ $over ]] || break
    [ "$now" = "$before" ] || echo "$(date -u +%T) $examination: ${now/# /no pod yet}"
    before=$now
    sleep "$POLL_SECONDS"
  done
  table
  until [[ $end =~ $over ]]; do
    sleep "$((POLL_SECONDS / 6))"
    end=$(ended)
  done
  [ "${BASH_REMATCH[2]}" = Completed ] || exit 2
}

case $verb in
  start)
    manifest=$(make)
    apply "$manifest"
    ;;
  doctor) examine ;;
  smoke)
    [ ${#SMOKE[@]} -gt 0 ] || fail "SMOKE is empty in $settings: say which checkpoint and mesh, as for lemur smoke"
    examine "${SMOKE[@]/#/--word=}"
    ;;
  status)
    execute kubectl get jobset "$RUN" "${here[@]}"
    execute kubectl get pods "${here[@]}" --selector "$set_of=$RUN"
    ;;
  logs) execute kubectl logs --follow "${here[@]}" --selector "$set_of=$RUN,$first_host" ;;
  delete) execute kubectl delete jobset "$RUN" "${here[@]}" ;;
  *) fail "say smoke, doctor, start, status, logs or delete; see launch/gke.sh --help" ;;
esac

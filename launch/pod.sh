#!/usr/bin/env bash
# A run on Cloud TPU slices, through queued resources.
#
#   launch/pod.sh watch                 all steps below: creates, sets up and starts, and restarts after
#                                       preemptions and crashes until the run is finished
#   launch/pod.sh create                requests the slices and waits until they are ready
#   launch/pod.sh push | setup          copies `git archive HEAD` to every worker | installs it there
#   launch/pod.sh smoke | doctor        `lemur smoke` with the arguments in SMOKE, `lemur doctor` for the run: on
#                                       every worker of every slice at once, after `push` and `setup`
#   launch/pod.sh start | stop          starts the run on every worker | stops it (SIGTERM)
#   launch/pod.sh status | logs         one word a worker | follows the log of worker 0
#   launch/pod.sh delete                deletes the slices
#
# --settings FILE   default launch/settings.sh; see launch/settings.example.sh
# --dry-run         prints the commands and executes none
#
# Exit status: 0 done; 2 an error in the settings or the run's config, or found by `smoke` or `doctor`;
# 3 no quota; 4 a worker cannot be reached; 5 the run crashes too often.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/settings_reader.sh

check_settings() {
  require RUN CONFIG WORKDIR PROJECT ZONE ACCELERATOR RUNTIME
  case $PROVISIONING in
    on-demand) tier=() ;;
    spot) tier=(--spot) ;;
    reserved) tier=(--reserved) ;;
    *) fail "PROVISIONING is $PROVISIONING: it must be on-demand, spot or reserved" ;;
  esac
  if [ -n "$SECRETS_FILE" ]; then
    [ -f "$SECRETS_FILE" ] || fail "SECRETS_FILE: there is no file $SECRETS_FILE"
    [ -z "$(find "$SECRETS_FILE" -perm /077)" ] || fail "others can read $SECRETS_FILE: chmod 600 it"
    unix_lines "$SECRETS_FILE"
    bash ${dry_run:+-n} -eu "$SECRETS_FILE" &>/dev/null ||
      fail "bash cannot read $SECRETS_FILE: write NAME=value lines, and NAME='value' where it has spaces or signs"
  fi
  # Otherwise its "command not found" would be taken for a slice that does not exist.
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed"
  [[ $verb != watch && $verb != push ]] || git cat-file -e "HEAD:./${CONFIG%%:*}" 2>/dev/null ||
    fail "CONFIG ${CONFIG%%:*} is not committed, so it is not pushed"
  place=(--project="$PROJECT" --zone="$ZONE") nodes=("$RUN") shape=(--node-id="$RUN")
  if [ "$SLICES" -gt 1 ]; then
    nodes=() shape=(--node-prefix="$RUN" --node-count="$SLICES")
    for slice in $(seq 0 $((SLICES - 1))); do nodes+=("$RUN-$slice"); done
  fi
  train=(train --config "$CONFIG" --workdir "$WORKDIR" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
}

# insist COMMAND...: `execute`, up to RETRIES times: ssh to hundreds of workers sometimes fails.
insist() {
  local attempt
  for attempt in $(seq "$RETRIES"); do
    execute "$@" && return
    [ "$attempt" -eq "$RETRIES" ] || sleep "$((attempt * POLL_SECONDS / 6))"
  done
  return 1
}

# on_workers HOW COMMAND: on all workers of all slices at once, with HOW `execute` or `insist`.
on_workers() {
  local node pids=() pid result=0
  for node in "${nodes[@]}"; do
    "$1" timeout "$SSH_SECONDS" gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all \
      ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --command="$2" &
    pids+=($!)
    [ -z "$dry_run" ] || wait $!
  done
  for pid in "${pids[@]}"; do wait "$pid" || result=4; done
  return "$result"
}

# examine VERB WORD...: `lemur VERB WORD...` on all workers; 2 if one finds a problem, which ssh does not report.
examine() {
  on_workers execute "bash lemur/launch/worker.sh $(quoted "$@")" 2>&1 |
    awk '!seen[$0]++ { print; fflush() } /: lemur [a-z]+ ended with [1-9]/ { bad = 2 } END { exit bad }'
}

copy_to_workers() {
  local node
  for node in "${nodes[@]}"; do
    insist timeout "$SSH_SECONDS" gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${place[@]}" --worker=all \
      ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} || return 4
  done
}

# ACTIVE, WAITING_FOR_RESOURCES, FAILED, SUSPENDED, ...; NONE if there is no such request.
state() {
  local found
  if found=$(gcloud compute tpus queued-resources describe "$RUN" "${place[@]}" --format='value(state.state)' 2>&1); then
    echo "$found" | tail -n 1
  elif [[ $found == *NOT_FOUND* || $found == *"not found"* ]]; then
    echo NONE
  else
    echo "$found" >&2
    echo UNKNOWN
  fi
}

request() {
  local output
  if output=$(execute gcloud compute tpus queued-resources create "$RUN" "${place[@]}" "${shape[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${tier[@]+"${tier[@]}"} \
    ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} 2>&1); then
    echo "$output"
    return 0
  fi
  echo "$output" >&2
  case $output in
    *[Qq]uota*) fail "no quota for $ACCELERATOR in $ZONE: ask for it in the console, or change the settings" 3 ;;
    *ALREADY_EXISTS*) return 0 ;;
    *capacity* | *UNAVAILABLE* | *INTERNAL*) return 1 ;; # try again later
    *) fail "the request was refused: correct $settings" ;;
  esac
}

delete() {
  local output
  if output=$(execute gcloud compute tpus queued-resources delete "$RUN" "${place[@]}" --force --quiet 2>&1); then
    echo "$output"
  else
    echo "$output" >&2
    [[ $output == *NOT_FOUND* || $output == *"not found"* ]]
  fi
}

# Waits until the slices are ready. Failed requests are sent again.
create() {
  [ -z "$dry_run" ] || { request && return; }
  local now before=''
  while true; do
    now=$(state)
    [ "$now" = "$before" ] || echo "$(date -u +%T) $RUN: $now"
    before=$now
    case $now in
      ACTIVE) return 0 ;;
      NONE) request || true ;;
      FAILED | SUSPENDED) delete || true ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

push() {
  local archive pair environment='' result=0
  archive=$(git rev-parse --git-path "push-$RUN.tar.gz")
  [ -n "$dry_run" ] || git diff --quiet HEAD || echo "pod.sh: changes that are not committed are not pushed" >&2
  execute git archive --format=tar.gz --output="$archive" HEAD
  for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    printf -v environment '%s%s=%q\n' "$environment" "${pair%%=*}" "${pair#*=}"
  done
  copy_to_workers "$archive" lemur-code.tar.gz &&
    on_workers insist "mkdir -p lemur && tar -xzf lemur-code.tar.gz -C lemur && printf %s $(quoted "$environment")>lemur/run.env" ||
    result=$?
  if [ "$result" -eq 0 ] && [ -n "$SECRETS_FILE" ]; then
    copy_to_workers "$SECRETS_FILE" lemur-secrets.env &&
      on_workers insist 'chmod 600 lemur-secrets.env && mv lemur-secrets.env lemur/secrets.env' || result=$?
  fi
  execute rm -f "$archive"
  return "$result"
}

setup() { on_workers insist 'bash lemur/launch/worker.sh setup'; }
start() { on_workers insist "bash lemur/launch/worker.sh start $(quoted "${train[@]}")"; }
stop() { on_workers insist 'bash lemur/launch/worker.sh stop'; }
doctor() { examine doctor "${train[@]:1}"; }
smoke() { require_smoke && examine smoke "${SMOKE[@]}"; }
logs() { execute gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 \
  ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --command='tail -n 100 -F lemur/run.log'; }
status() { on_workers insist 'if [ -d lemur/launch ]; then bash lemur/launch/worker.sh status; else echo absent; fi'; }

# Reduces the workers' states to one: a run is finished only if all are.
summary() {
  local words
  words=$(status 2>/dev/null) || words=unreachable
  words=$(echo "$words" | grep -Ex 'unreachable|absent|ready|running|[0-9]+' || true)
  case $'\n'$words$'\n' in
    *unreachable*) echo unreachable ;;
    *$'\n'absent$'\n'*) echo absent ;;
    *$'\n'running$'\n'*) echo running ;;
    *$'\n'ready$'\n'*) echo ready ;;
    *$'\n'2$'\n'*) echo 2 ;;
    *) echo "$words" | sort -rn | head -n 1 ;;
  esac
}

watch() {
  [ -z "$dry_run" ] || { create && push && setup && start && status && delete; return; }
  local restarts=0 unreachable=0 now
  while true; do
    create
    now=$(summary)
    echo "$(date -u +%T) run: $now"
    [ "$now" = unreachable ] || unreachable=0
    case $now in
      running) ;;
      absent | ready) { push && setup && start; } || echo "pod.sh: could not set up every worker; trying again" >&2 ;;
      0)
        echo "finished: $WORKDIR"
        [ "$DELETE_WHEN_FINISHED" = yes ] && delete
        return 0
        ;;
      2) fail "the run refuses its config or data: see launch/pod.sh logs; the slice is not deleted" ;;
      unreachable)
        unreachable=$((unreachable + 1))
        # An unreachable worker of an ACTIVE slice does not recover.
        if [ "$unreachable" -ge "$RETRIES" ]; then
          [ "$unreachable" -lt $((2 * RETRIES)) ] || fail "a worker cannot be reached, on a new slice either" 4
          echo "pod.sh: a worker cannot be reached; creating a new slice" >&2
          delete || true
        fi
        ;;
      *)
        restarts=$((restarts + 1))
        [ "$restarts" -le "$MAX_RESTARTS" ] || fail "crashed $restarts times, last with $now: see launch/pod.sh logs" 5
        stop || true # hosts that wait for a dead one
        start || true
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

read_settings pod.sh "$@"
check_settings
case $verb in
  create | push | setup | smoke | doctor | start | stop | status | logs | delete | watch) "$verb" ;;
  *) fail "unknown verb $verb; see launch/pod.sh --help" ;;
esac

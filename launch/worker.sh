#!/usr/bin/env bash
# Runs on every worker of a pod, in the directory of the pushed code. launch/pod.sh calls it over ssh.
#
#   worker.sh setup                    makes .venv; needs no root
#   worker.sh start WORDS...           starts `lemur WORDS`, detached from the ssh session
#   worker.sh status                   one word: absent, ready, running, or the exit status of the run
#   worker.sh stop                     sends SIGTERM and waits; the run saves a checkpoint if it can
#   worker.sh doctor|smoke WORDS...    runs `lemur doctor WORDS` in the run's environment and prints its status
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$HOME/.local/bin:$PATH"

# After a reboot another process may have this id.
running() { [ -f run.pid ] && grep -qs -e lemur -e worker.sh "/proc/$(cat run.pid)/cmdline"; }

result=/dev/null
load_environment() {
  trap 'echo "$(hostname): lemur worker ended with 2: bash cannot read run.env or secrets.env"; echo 2 >"$result"' EXIT
  export LEMUR_JOIN=1 # the environment of a plain TPU VM does not name the other hosts
  export LEMUR_RELAUNCH=1 # a stopped run ends with 75, a finished one with 0
  set -a
  # shellcheck source=/dev/null
  [ ! -f run.env ] || source run.env
  # shellcheck source=/dev/null
  [ ! -f secrets.env ] || source secrets.env 2>/dev/null # bash's error would print the secret
  set +a
  trap - EXIT
}

case ${1:-} in
  setup)
    # The images have Python 3.10; uv installs a newer one without root.
    [ -x "$HOME/.local/bin/uv" ] || python3 -m pip install --quiet --user uv
    [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python --editable '.[tpu,int8]'
    ;;
  start)
    shift
    ! running || { echo "already running" && exit; }
    rm -f exit_status run.pid
    setsid nohup launch/worker.sh run "$@" </dev/null >/dev/null 2>&1 &
    ;;
  run)
    shift
    exec >>run.log 2>&1
    echo "== $(date -u +%FT%TZ) $(hostname)"
    result=exit_status
    load_environment
    lemur "$@" &
    echo $! >run.pid
    wait $! && status=0 || status=$?
    rm -f run.pid
    echo "$status" >exit_status
    ;;
  status)
    if running; then echo running
    elif [ -f exit_status ]; then cat exit_status
    elif [ -f run.pid ]; then echo 137 # no exit status was written: killed, or the machine rebooted
    elif [ -x .venv/bin/lemur ]; then echo ready
    else echo absent; fi
    ;;
  stop)
    running || exit 0
    kill -TERM "$(cat run.pid)"
    for _ in $(seq 300); do
      sleep 1
      running || exit 0
    done
    echo "still running after 300 s" >&2
    exit 1
    ;;
  doctor | smoke)
    load_environment
    lemur "$@" && status=0 || status=$?
    echo "$(hostname): lemur $1 ended with $status"
    ;;
  *) echo "worker.sh setup|start|run|status|stop|doctor|smoke" >&2 && exit 2 ;;
esac

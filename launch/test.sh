#!/usr/bin/env bash
# Runs the test suite in an environment of its own. Arguments go to pytest:
#   bash launch/test.sh                         everything but the slow tests
#   bash launch/test.sh --quick                 no test that starts a process or takes seconds: about 2 minutes
#   bash launch/test.sh -m slow                 the slow tests
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment .venv-test "[prepare,test,eval,beam]"
if [ "${1:-}" = --quick ]; then
  shift
  set -- -m 'not slow and not process' "$@"
fi
# Tests of one file run in one process, because they share fixtures. A process that dies ends the run at once.
exec .venv-test/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"

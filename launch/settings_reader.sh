# shellcheck shell=bash
# Sourced by pod.sh and gke.sh: parses arguments and settings, and executes commands.

fail() { # fail MESSAGE [STATUS]
  echo "$script: $1" >&2
  exit "${2:-2}"
}

# read_settings SCRIPT ARGUMENT...: sets verb, settings, dry_run, and every variable of settings.example.sh.
read_settings() {
  script=$1 verb='' settings=launch/settings.sh dry_run=''
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      --settings)
        [ $# -gt 1 ] || fail "--settings needs a file"
        settings=$2
        [ ! -f "$OLDPWD/$settings" ] || settings=$OLDPWD/$settings # the scripts have changed the directory
        shift
        ;;
      -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "launch/$script" && exit ;;
      -*) fail "unknown argument $1; see launch/$script --help" ;;
      *)
        [ -z "$verb" ] || fail "one verb at a time: $verb or $1?"
        verb=$1
        ;;
    esac
    shift
  done
  [ -n "$verb" ] || fail "no verb; see launch/$script --help"
  [ -f "$settings" ] || fail "there is no $settings: copy launch/settings.example.sh there and fill it in"
  unix_lines "$settings"
  # shellcheck source=launch/settings.example.sh
  source launch/settings.example.sh # defaults of settings that the file omits
  local name arrays=(OVERRIDES SMOKE ENVIRONMENT CREATE_FLAGS SSH_FLAGS XPK_FLAGS)
  unset "${arrays[@]}" # a string would only replace the first element of an existing array
  # shellcheck source=launch/settings.example.sh
  source "$settings"
  for name in "${arrays[@]}"; do
    declare -p "$name" &>/dev/null || eval "$name=()"
    [[ $(declare -p "$name") == 'declare -a'* ]] || fail "$name in $settings is one string: write $name=(WORD WORD ...)"
  done
  check_values
}

check_values() {
  local name pair
  for name in SLICES RETRIES POLL_SECONDS SSH_SECONDS MAX_RESTARTS; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name is ${!name} in $settings: it must be a whole number"
  done
  [ "$SLICES" -gt 0 ] && [ "$RETRIES" -gt 0 ] || fail "SLICES or RETRIES is 0 in $settings: they must be 1 or above"
  [[ $DELETE_WHEN_FINISHED =~ ^(yes|no)$ ]] || fail "DELETE_WHEN_FINISHED is $DELETE_WHEN_FINISHED: it must be yes or no"
  for pair in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "ENVIRONMENT in $settings has $pair: write NAME=value"
  done
}

unix_lines() { ! grep -q $'\r' "$1" || fail "$1 has Windows line endings: save it with Unix line endings"; }

# require NAME...: refuses settings that are empty.
require() {
  local name
  for name in "$@"; do [ -n "${!name}" ] || fail "$name is empty in $settings"; done
  [[ $RUN =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "RUN is $RUN: lower case letters, digits and - only"
  # A relative path would be on the disk of a machine that is deleted.
  [[ $WORKDIR == *://* || $WORKDIR == /* ]] || fail "WORKDIR is $WORKDIR: it must be gs://... or start with / on storage that all hosts share"
  [ -f "${CONFIG%%:*}" ] || fail "CONFIG: there is no file ${CONFIG%%:*}"
}

require_smoke() {
  [ ${#SMOKE[@]} -gt 0 ] || fail "SMOKE is empty in $settings: set the arguments of lemur smoke, a checkpoint and a mesh"
}

# execute COMMAND...: all commands that change cloud resources go through this function.
execute() { if [ -z "$dry_run" ]; then "$@"; else quoted "$@" && echo; fi; }

quoted() { printf '%q ' "$@"; }

# shellcheck shell=bash
# Sourced by pod.sh and gke.sh: arguments, settings and the one way to run a command.

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
        shift
        ;;
      -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "launch/$script"
        exit 0
        ;;
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
  # shellcheck source=launch/settings.example.sh
  source launch/settings.example.sh # defaults of whatever the file leaves out
  unset SMOKE                       # a string would become the first word of the array that is there
  # shellcheck source=launch/settings.example.sh
  source "$settings"
  declare -p SMOKE &>/dev/null || SMOKE=()
  [[ $(declare -p SMOKE) == 'declare -a'* ]] || fail "SMOKE in $settings is one string: write SMOKE=(WORD WORD ...)"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES is $SLICES in $settings: it must be a whole number, 1 or above"
}

# require NAME...: refuses settings that are empty.
require() {
  local name
  for name in "$@"; do [ -n "${!name}" ] || fail "$name is empty in $settings"; done
  [[ $RUN =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "RUN is $RUN: lower case letters, digits and - only"
  [ -f "$CONFIG" ] || fail "CONFIG: there is no file $CONFIG"
}

# execute COMMAND...: every command that touches the cloud goes through here.
execute() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

quoted() { printf '%q ' "$@"; }

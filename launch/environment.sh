# shellcheck shell=bash
# Sourced by the other scripts: finds a Python and creates a virtual environment with this package.

# Prints the first working interpreter of Python 3.11 to 3.13; $PYTHON has precedence.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python 3.11, 3.12 or 3.13 found: install one, or name it with PYTHON=/path/to/python3" >&2
  return 2
}

# make_environment DIR EXTRAS: activates an environment in DIR with the package and e.g. "[test]"; creates it first if it
# does not exist or setup.cfg has changed.
make_environment() {
  local directory=$1 extras=$2 stamp python
  stamp="$directory/.installed$extras"
  if ! cmp -s setup.cfg "$stamp"; then
    python=$(find_python) || return
    echo "creating $directory with $("$python" --version) (once; a few minutes)"
    "$python" -m venv "$directory" || return
    "$directory/bin/pip" install --quiet --disable-pip-version-check --editable ".$extras" || return
    cp setup.cfg "$stamp"
  fi
  export PATH="$PWD/$directory/bin:$PATH" TF_CPP_MIN_LOG_LEVEL=3 GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
  started=$SECONDS
}

# stage TITLE: a heading with the time since make_environment.
stage() { printf '\n=== %s  [%d min %02d s]\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }

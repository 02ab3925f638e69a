# Sourced by scripts/test and scripts/demo, in the root of the checkout.

cannot() {
  printf '%s: %s\n' "$0" "$*" >&2
  exit 2
}

# make_environment EXTRA: .venv holds the package with this extra; a change of pyproject.toml installs again.
# Where that cannot be done, says what to do and ends with status 2.
make_environment() {
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null || cannot "$python is missing; on Debian: apt-get install python3 python3-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    cannot "Python 3.10 or newer is needed; PYTHON=/path/to/python3 chooses one"
  # __pycache__ directories, and only .venv is written to.
  export PYTHONPYCACHEPREFIX="$PWD/.venv/pycache"
  made="$("$python" -c 'import sys; print(sys.version, sys.prefix)') $PWD"
  if [ "$made" != "$(cat .venv/made 2>/dev/null)" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      cannot "venv is incomplete; install the package python3-venv (on Debian: apt-get install python3-venv)"
    "$python" -m venv --clear .venv || cannot "$python -m venv .venv failed"
    printf '%s\n' "$made" >.venv/made
  fi
  if ! cmp -s pyproject.toml ".venv/installed-$1"; then
    echo "Installing the package and its extra '$1' into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]" ||
      cannot "pip could not install the packages; see above"
    # Beside the others, for the tests that begin with its monkey-patching.
    [ "$1" != test ] ||
      .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --target .venv/gevent gevent ||
      cannot "pip could not install gevent; see above"
    cp pyproject.toml ".venv/installed-$1"
  fi
}

# Sourced by the other scripts, in the repository's root: the virtual environment .venv with everything
# installed, made on first use; and CPUS.  ITP_VENV names another one; an environment that is active is left alone
# when ITP_VENV=active.
if [[ ${ITP_VENV:-} != active ]]; then
  venv=${ITP_VENV:-$PWD/.venv}
  [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  # What was installed is on record, so that only a change of the requirements installs again.
  wanted=$(cat requirements.txt setup.py | sha256sum)
  if [[ $(cat "$venv/installed" 2> /dev/null) != "$wanted" ]]; then
    echo "installing into $venv (once; some minutes)"
    python -m pip install --quiet --upgrade pip
    if python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python -m pip install --quiet -r requirements.txt
      python -m pip install --quiet --no-deps -e .
    else  # what was tested together needs Python 3.11; the ranges of setup.py don't
      python -m pip install --quiet -e ".[dev]"
    fi
    echo "$wanted" > "$venv/installed"
  fi
fi
# Threads that wait for work leave the cores to those that have some.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# Processes that run environments: one a core.
: "${CPUS:=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)}"
# Each program's last line names the command that comes next; here a script does.
export ITP_NEXT=off

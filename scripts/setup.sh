# Sourced by the other scripts: makes a virtual environment and installs rec_jax into it.
# Usage: source scripts/setup.sh EXTRAS ("" for none)
#   PYTHON=/path/to/python   the interpreter, 3.11 or newer (default: that of .venv, else python3)
#   NEWEST=1                 the newest releases of all packages (default: those of constraints/, which passed the tests)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# .venv belongs to the Python that made it; a PYTHON of another version gets .venv-VERSION.
venv=.venv
if [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed: name one with PYTHON=/path/to/python" >&2; exit 1; }
  version=$(version_of "$python")
  if [ -x .venv/bin/python ] && [ "$(version_of .venv/bin/python)" != "$version" ]; then
    venv=.venv-$version
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    rm -rf "$venv"; echo "no venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }
fi
python=$venv/bin/python
constraints=constraints/python$(version_of "$python").txt

install=("$python" -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}")
stamp=$venv/installed-$1
known=$constraints
[ -f "$known" ] || known=/dev/null
if [ -n "${NEWEST:-}" ]; then
  echo "installing the newest releases into $venv (about a minute) ..."
  rm -f "$venv"/installed-*
  "${install[@]}" --upgrade --upgrade-strategy eager
# The stamp holds what the environment was installed from: a change installs again.
elif ! cat setup.cfg "$known" | cmp -s - "$stamp"; then
  echo "setting up $venv (about a minute) ..."
  [ -f "$constraints" ] || echo "there is no $constraints: the newest releases are installed, untested" >&2
  "${install[@]}" -c "$known"
  cat setup.cfg "$known" > "$stamp"
fi

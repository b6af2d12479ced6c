# Sourced by the other scripts: makes .venv with Python 3.11 or newer and installs rec_jax into it.
# Usage: source scripts/setup.sh EXTRAS ("" for none)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
# The stamp holds what was installed; a changed setup.cfg or other extras install again.
stamp=.venv/installed-$1
if ! cmp -s setup.cfg "$stamp"; then
  echo "setting up .venv (about a minute) ..."
  [ -x .venv/bin/python ] || "$python" -m venv .venv || {
    echo "no venv module: on Debian, apt-get install python3-venv" >&2; exit 1; }
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
  cp setup.cfg "$stamp"
fi
python=.venv/bin/python

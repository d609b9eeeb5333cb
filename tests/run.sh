#!/usr/bin/env bash
# Set up .venv on first use, then check and test.
#
#   ./tests/run.sh                     lint, format, types, shell scripts, then every test (two at once)
#   ./tests/run.sh --checks            lint, format, types and shell scripts alone
#   ./tests/run.sh [pytest arguments]  only pytest, with these arguments
#
# Needs Python >= 3.11 (PYTHON names another than python3) and a package index on first use. Tests that
# need a Docker engine or a GPU are skipped with a reason where there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "--help" ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

"${PYTHON:-python3}" tests/set_up.py
export PATH="$PWD/.venv/bin:$PATH"
# spinning threads on busy cores make CPU training several times slower
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

if [[ $# -eq 0 || "$*" == "--checks" ]]; then
    echo "== ruff"
    ruff check .
    ruff format --check .
    echo "== mypy"
    mypy
    echo "== shellcheck"
    shellcheck ./*.sh tests/run.sh .ci/run
    [[ $# -eq 0 ]] || exit 0
    echo "== pytest"
    set -- --numprocesses 2 --dist loadfile
fi
exec python -m pytest "$@"

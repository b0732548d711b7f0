#!/bin/sh
# Prints a Python that .venv can be made with, or says what to install. Argument: the one wanted, may be empty.
set -eu

works() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

found=""
for python in ${1:-python3.12 python3.11 python3}; do
    if works "$python"; then found=$python; break; fi
done
if [ -z "$found" ]; then
    if [ -n "${1:-}" ]; then
        echo "PYTHON=$1 is not Python 3.11 or 3.12." >&2
    else
        echo "Python 3.11 or 3.12 is missing. Debian 12: apt install python3 python3-venv." >&2
        echo "Ubuntu 24.04: apt install python3.12 python3.12-venv. Or name one: make PYTHON=/path/to/python3.12 ..." >&2
    fi
    exit 1
fi
if ! "$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "$found has no venv module. Debian, Ubuntu: apt install python$version-venv." >&2
    exit 1
fi
echo "$found"

#!/bin/sh
# Says what to install when there is no C++17 compiler.
set -eu

for compiler in "${CXX:-}" c++ g++ clang++; do
    # CXX may hold flags: it is split on purpose
    # shellcheck disable=SC2086
    if [ -n "$compiler" ] && echo 'int main() { return 0; }' | $compiler -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then
        exit 0
    fi
done
echo "A C++17 compiler is missing. Debian, Ubuntu: apt install g++. Or name one: CXX=/path/to/c++ make ..." >&2
exit 1

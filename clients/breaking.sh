#!/bin/sh
# Refuses a change of the contracts that breaks clients: this checkout's proto/ against that of the main branch.
# Argument: the buf to use.
set -eu

git_dir=$(git rev-parse --git-common-dir 2>/dev/null) || { echo "no git: contracts are not compared"; exit 0; }
for branch in refs/remotes/origin/main refs/heads/main; do
    if git cat-file -e "$branch:proto/buf.yaml" 2>/dev/null; then
        commit=$(git rev-parse "$branch")
        exec "$1" breaking proto --against "$git_dir#ref=$commit,subdir=proto"
    fi
done
echo "no main branch with contracts here: nothing to compare with"

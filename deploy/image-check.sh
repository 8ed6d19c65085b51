#!/usr/bin/env bash
# Build the image where no Docker engine runs, start the service in it as its user, and hold a conversation.
#
# Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap). The base image is made of Debian's
# packages once, and kept. BUILD_FLAGS goes to `buildah build`: --volume for a local package index, --build-arg, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SUITE=${SUITE:-bookworm}
BASE=localhost/vflow-base:$SUITE
IMAGE=localhost/vflow:check
PORT=${PORT:-50951}
METRICS_PORT=${METRICS_PORT:-50964}
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
read -ra build_flags <<<"${BUILD_FLAGS:-}"

for command in buildah debootstrap; do
    command -v "$command" >/dev/null || { echo "image-check needs $command: apt-get install buildah debootstrap" >&2; exit 2; }
done
scratch=$(mktemp -d)
container=""
clean_up() {
    [ -z "$container" ] || buildah rm "$container" >/dev/null 2>&1 || true
    rm -rf "$scratch"
}
trap clean_up EXIT

if ! buildah inspect --type image "$BASE" >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates "$SUITE" "$scratch/base"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$scratch/base" /
    buildah commit --quiet --rm "$container" "$BASE"
    container=""
    rm -rf "$scratch/base"
fi

buildah build --pull-never --format docker --build-arg "BASE=$BASE" "${build_flags[@]}" --tag "$IMAGE" .

container=$(buildah from --pull-never "$IMAGE")
# All in one run: what it leaves behind in the background would outlive a `buildah run` that is ended.
buildah run --env VFLOW_INSECURE=on --env "VFLOW_PORT=$PORT" --env "VFLOW_METRICS_PORT=$METRICS_PORT" \
    "$container" -- sh -s "$PORT" "$METRICS_PORT" <<'INSIDE'
set -eu
test "$(id -u)" = 10001
vflow serve --kv-budget 64MiB &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
tries=90
until vflow health 2>/dev/null; do
    kill -0 "$server"
    tries=$((tries - 1))
    test "$tries" -gt 0
    sleep 1
done
python - "$@" <<'CONVERSATION'
import sys
import urllib.request

from PIL import Image

import vflow_client

port, metrics_port = sys.argv[1:]
with vflow_client.connect(f"127.0.0.1:{port}") as client, client.session() as session:
    receipt = session.add_image(Image.radial_gradient("L").convert("RGB"))
    answer = session.ask("How many shapes are there?", max_new_tokens=16)
    print(f"answer: {answer.read()!r}; kept {list(receipt.kept_tokens)} of {receipt.visual_tokens} visual tokens")
    assert answer.usage.completion_tokens > 0
metrics = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics").read().decode()
assert 'vflow_calls_total{code="OK",method="Conversations/Chat"} 1.0' in metrics
CONVERSATION
kill -TERM "$server"
wait "$server"
trap - EXIT
INSIDE
echo "image-check: $IMAGE serves, and stops when it is told to"

#!/usr/bin/env bash
# The main job, shown from nothing: a registry on loopback with a Debian base image, examples/redis
# built and pushed, built again from the cache, and the image's redis-server run by runc.
# Needs root; everything it starts and writes is its own and gone at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
kiln=${KILN:-$PWD/target/release/kiln}
. tools/registry.sh

work=$(mktemp -d)
container=kiln-demo-$$
cleanup() {
  status=$?
  runc delete --force "$container" 2>/dev/null || true
  "$kiln" shutdown 2>/dev/null || true
  [ -z "${REGISTRY_PID:-}" ] || kill "$REGISTRY_PID" 2>/dev/null || true
  rm -rf "$work"
  exit $status
}
trap cleanup EXIT

say() { printf '\n== %s\n' "$*"; }

images=$(tools/base-images.sh debian)
registry_start "$work/registry"
say "a registry on $REGISTRY, holding library/debian:bookworm"
skopeo copy -q --dest-tls-verify=false "oci:$images/debian:bookworm" "docker://$REGISTRY/library/debian:bookworm"

export KILN_ROOT=$work/state KILN_HOST=unix://$work/kilnd.sock KILN_CONFIG=$work/kilnd.toml
cat > "$KILN_CONFIG" <<TOML
[registry."docker.io"]
  mirrors = ["$REGISTRY"]
[registry."$REGISTRY"]
  http = true
TOML
image=$REGISTRY/demo/redis:latest

say "kiln build -t $image --push examples/redis"
"$kiln" build --progress plain -t "$image" --push examples/redis

say "the same again: every step is cached"
start=$(date +%s%N)
"$kiln" build --progress plain -t "$image" --push examples/redis 2>&1 | tee "$work/second.log"
took=$((($(date +%s%N) - start) / 1000000))
# FROM and both RUN steps.
[ "$(grep -c ' CACHED$' "$work/second.log")" -eq 3 ] || { echo "demo: the second build was not cached" >&2; exit 1; }
say "second build: 2 of 2 RUN steps cached, ${took} ms with the push"

say "skopeo, umoci and runc read and run it"
skopeo inspect --tls-verify=false "docker://$image" --format '{{.Digest}} with {{len .Layers}} layers'
skopeo copy -q --src-tls-verify=false "docker://$image" "oci:$work/layout:latest"
umoci unpack --image "$work/layout:latest" "$work/bundle"
python3 - "$work/bundle/config.json" <<'PY'
import json, sys
path = sys.argv[1]
spec = json.load(open(path))
spec["process"]["terminal"] = False
json.dump(spec, open(path, "w"))
PY
runc run --detach --bundle "$work/bundle" "$container" > "$work/redis.log" 2>&1 < /dev/null
answer=
for _ in $(seq 100); do
  answer=$(runc exec "$container" redis-cli ping 2>/dev/null || true)
  [ "$answer" = PONG ] && break
  sleep 0.1
done
if [ "$answer" != PONG ]; then
  echo "demo: redis-server does not answer" >&2
  cat "$work/redis.log" >&2
  exit 1
fi
say "redis-cli ping: $answer"

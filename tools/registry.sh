# Sourced: `registry_start DIR` runs Debian's docker-registry on a free loopback port with its data
# under DIR, waits until it answers, and sets REGISTRY (host:port) and REGISTRY_PID.

registry_start() {
  local dir=$1 port
  mkdir -p "$dir"
  port=$(python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])')
  REGISTRY=127.0.0.1:$port
  cat > "$dir/config.yml" <<YAML
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: $dir/data}, delete: {enabled: true}}
http: {addr: $REGISTRY}
YAML
  docker-registry serve "$dir/config.yml" > "$dir/log" 2>&1 &
  REGISTRY_PID=$!
  for _ in $(seq 100); do
    curl -fs "http://$REGISTRY/v2/" >/dev/null && return
    kill -0 $REGISTRY_PID 2>/dev/null || break
    sleep 0.1
  done
  echo "docker-registry does not answer:" >&2
  cat "$dir/log" >&2
  return 1
}

# Sourced by the scripts of this folder. What can be chosen:
#   VERDICT_NAME   the project, and the first part of the containers' names (verdict)
#   VERDICT_PORTS  the first digits of the ports on 127.0.0.1 (74: 7401 to 7423)
#   VERDICT_IMAGE  the image (verdict:local)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export VERDICT_NAME=${VERDICT_NAME:-verdict} VERDICT_PORTS=${VERDICT_PORTS:-74} VERDICT_IMAGE=${VERDICT_IMAGE:-verdict:local}
nodes=(01 02 03 11 12 13 21 22 23)

say() { printf 'docker: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" > /dev/null 2>&1; }

has_engine() { has docker && docker version > /dev/null 2>&1; }

# The compose plugin, or docker-compose.
if docker compose version > /dev/null 2>&1; then
  compose_program=(docker compose)
elif has docker-compose; then
  compose_program=(docker-compose)
else
  compose_program=()
fi
compose() { "${compose_program[@]}" --project-name "$VERDICT_NAME" --file docker/compose.yaml "$@"; }

has_image() { docker image inspect "$1" > /dev/null 2>&1; }

# The service of a node's id: coordinator-1 is 1 or 01, shard-2-3 is 23.
service() {
  case $1 in
    [0-9] | 0[0-9]) echo "coordinator-${1: -1}" ;;
    *) echo "shard-${1:0:1}-${1:1}" ;;
  esac
}

# All nodes as clients on this machine reach them: HOST:PORT,...
addresses() {
  local list=("${nodes[@]/#/127.0.0.1:$VERDICT_PORTS}")
  (IFS=,; echo "${list[*]}")
}

need_docker() {
  has_engine || die "there is no Docker Engine that answers (docker version)"
  ((${#compose_program[@]} > 0)) || die "there is neither the compose plugin (docker compose) nor docker-compose"
}

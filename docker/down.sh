#!/usr/bin/env bash
# Stops the compose cluster and removes its containers and networks. What it has stored stays, and docker/up.sh goes on with it,
# unless --volumes is given.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_docker
# The spares too, if there are any.
export COMPOSE_PROFILES=spare
case ${1:-} in
  '') compose down ;;
  --volumes) compose down --volumes ;;
  *) die "unknown argument '$1'; usage: docker/down.sh [--volumes]" ;;
esac

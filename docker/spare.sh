#!/usr/bin/env bash
# Starts a spare node of the compose cluster (coordinator-4, shard-1-4 or shard-2-4), which then waits to be let in:
#
#   docker/spare.sh shard-1-4
#   verdict ctl --connect 127.0.0.1:7401 member replace 12 14=shard-1-4.cluster:7400
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_docker
case ${1:-} in
  coordinator-4 | shard-1-4 | shard-2-4) compose up --detach --no-deps "$1" ;;
  *) die "usage: docker/spare.sh coordinator-4|shard-1-4|shard-2-4" ;;
esac

#!/usr/bin/env bash
# Starts the compose cluster and waits until all nodes are healthy and every group has a leader. Builds the image if there is none,
# with the arguments for docker/build.sh that are given here. The spare nodes are created and not started: docker/spare.sh or a drill
# does that.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_docker

has_image "$VERDICT_IMAGE" || docker/build.sh "$@"

# A node whose volume holds nothing, where others hold something, was replaced: it must not come back, and the spare of its group is
# in its place.
mounts=()
for volume in $(docker volume ls --quiet --filter "label=com.docker.compose.project=$VERDICT_NAME"); do
  mounts+=(--volume "$volume:/volumes/$volume:ro,nocopy")
done
held=''
if ((${#mounts[@]} > 0)); then
  held=$(docker run --rm --network none --entrypoint sh "${mounts[@]}" "$VERDICT_IMAGE" \
    -c 'for it in /volumes/*; do [ -z "$(ls -A "$it")" ] || echo "${it##*/}"; done')
fi
services=()
for i in "${!nodes[@]}"; do
  if [[ -n $held ]] && ! grep -qx "${VERDICT_NAME}_$(service "${nodes[i]}")" <<< "$held"; then
    nodes[i]=${nodes[i]:0:1}4
  fi
  services+=("$(service "${nodes[i]}")")
done
compose up --detach "${services[@]}"
spares=(coordinator-4 shard-1-4 shard-2-4)
compose up --no-start --no-recreate --no-deps "${spares[@]}"
# docker-compose 1.29 gives a container that it doesn't start one network only.
for spare in "${spares[@]}"; do
  networks=$(docker inspect --format '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}' "$VERDICT_NAME-$spare")
  [[ " $networks" == *" ${VERDICT_NAME}_cluster "* ]] ||
    docker network connect --alias "$spare.cluster" "${VERDICT_NAME}_cluster" "$VERDICT_NAME-$spare"
done

# The image's own program asks; so nothing else is needed on this machine.
inside() { docker exec "$VERDICT_NAME-${services[0]}" verdict "$@"; }
# Reading rows of many partitions goes through the coordinator's leader and the leaders of all shards.
probe=(ctl --timeout 2 read 'probe:1#probe' 'probe:2#probe' 'probe:3#probe' 'probe:4#probe' 'probe:5#probe' 'probe:6#probe')
for ((i = 0; i < 60; i++)); do
  healthy=$(docker ps --all --filter "label=com.docker.compose.project=$VERDICT_NAME" --filter status=running --filter health=healthy --quiet | wc -l)
  if ((healthy >= ${#nodes[@]})) && inside "${probe[@]}" > /dev/null 2>&1; then
    say "${#nodes[@]} nodes are up. Clients on this machine reach them at $(addresses)"
    exit 0
  fi
  sleep 1
done
compose ps >&2
die "the cluster isn't ready after a minute; look at: docker logs $VERDICT_NAME-${services[0]}"

#!/usr/bin/env bash
# Tries the compose cluster: starts one of its own, settles a tape, kills the coordinator's leader and a shard's leader, cuts a node
# off, plays docker/test.drill, replaces a node, checks that everything adds up, stops and starts it, and takes it all down. Skips, and
# says so, where there is no Docker.
#
#   docker/test.sh [ARGUMENT FOR docker/build.sh...]
#
# The containers, networks and volumes of the project `verdict-test` are its own, and removed before and after. Takes about four
# minutes when the image is there. VERDICT_BIN is the program used on this machine (target/release/verdict, or debug).
export VERDICT_NAME=verdict-test VERDICT_PORTS=${VERDICT_PORTS:-75}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if ! has_engine || ((${#compose_program[@]} == 0)); then
  say "SKIPPED: this machine has no Docker Engine with compose"
  exit 0
fi

program=${VERDICT_BIN:-}
for candidate in target/release/verdict target/debug/verdict; do
  [[ -n $program || ! -x $candidate ]] || program=$candidate
done
[[ -n $program ]] || die "there is no program to ask the cluster with: cargo build -p verdict"

if (($# > 0)); then docker/build.sh "$@"; fi

finish() {
  local status=$?
  if ((status != 0)); then
    compose logs --no-color --tail 20 >&2 || true
  fi
  if ((status == 0)); then rm -r "$reports"; else say "what drills have reported is in $reports"; fi
  docker/down.sh --volumes > /dev/null 2>&1 || say "could not remove everything of the project $VERDICT_NAME"
  ((status == 0)) && say "PASSED in $SECONDS s" || say "FAILED after $SECONDS s"
}
docker/down.sh --volumes > /dev/null 2>&1 || true
reports=$(mktemp -d)
trap finish EXIT

step() { say "$SECONDS s: $*"; }
cluster=$(addresses)
ctl() { "$program" ctl --connect "$cluster" "$@"; }
container() { echo "$VERDICT_NAME-$(service "$1")"; } # of a node's id
# The node that leads a group, as the one in the highest term says.
leader() {
  ctl --json status | python3 -c '
import json, sys
group = int(sys.argv[1])
led = [(status["term"], node["node"]) for node in json.load(sys.stdin)["nodes"] for status in node.get("groups", [])
       if status["group"] == group and status["role"].lower() == "leader"]
print(max(led)[1])' "$1"
}
# TRADES SEED
settle() { "$program" settle --connect "$cluster" --trades "$1" --seed "$2"; }
# Waits until all replicas of all groups show the same state, and nothing is in doubt.
at_rest() {
  local i
  for ((i = 0; i < 30; i++)); do
    if ctl --json status | python3 -c '
import collections, json, sys
nodes = json.load(sys.stdin)["nodes"]
hashes = collections.defaultdict(set)
for node in nodes:
    for status in node.get("groups", []):
        hashes[status["group"]].add((status["state_hash_index"], status["state_hash"]))
        if status["in_doubt"] or status["unfinished"]: sys.exit("in doubt")
if not all(node["reachable"] for node in nodes): sys.exit("a node is missing")
if sorted(hashes) != [0, 1, 2] or any(len(all) > 1 for all in hashes.values()): sys.exit("replicas differ yet")' 2> /dev/null
    then
      return
    fi
    sleep 1
  done
  ctl status >&2
  die "not all replicas are equal after 30 s"
}

step "start"
docker/up.sh
step "settle on a whole cluster"
settle 2000 1

for group in 0 1; do
  victim=$(leader "$group")
  step "kill node $victim, which leads group $group, and settle"
  settle 8000 "$((group + 2))" &
  load=$!
  sleep 1
  docker kill --signal KILL "$(container "$victim")" > /dev/null
  wait "$load" || die "the tape did not settle while node $victim was killed"
  docker start "$(container "$victim")" > /dev/null
done

victim=$(leader 2)
step "cut node $victim off, which leads group 2, and settle"
docker network disconnect "${VERDICT_NAME}_cluster" "$(container "$victim")"
settle 2000 4
[[ $(leader 2) != "$victim" ]] || die "nobody else leads group 2"
docker network connect --alias "$(service "$victim").cluster" "${VERDICT_NAME}_cluster" "$(container "$victim")"

step "a drill that containers can't do is refused"
status=0
"$program" drill slow-disk --compose 2> "$reports/refused" || status=$?
((status == 2)) && grep -q "disks of containers can't be made slow" "$reports/refused" ||
  die "a slow disk of a container ended with $status: $(< "$reports/refused")"

step "drill: containers are killed, cut off, paused and replaced"
"$program" drill docker/test.drill --compose --rate 100 --out "$reports/report.html" --json "$reports/report.json" ||
  die "the drill ended with $?"
nodes=("${nodes[@]/21/24}")
python3 - "$reports" << 'END' || die "the drill's report isn't as it should be"
import json, sys
report = json.load(open(sys.argv[1] + "/report.json"))
page = open(sys.argv[1] + "/report.html").read()
assert report["format"] == 1 and report["held"], "not held"
assert report["cluster"].startswith("9 containers of ") and (report["nodes"], report["shards"]) == (9, 2), report["cluster"]
committed = report["load"]["outcomes"]["committed"]
assert committed > 3000, f"60 s at 100/s, and only {committed} are committed"
done = [event["what"] for event in report["events"] if event["kind"] != "wait"]
for told in ["kill -9: node ", "start: node ", "cut off both ways: node ", "network mended: ", "pause: node ", "resume: ",
             "node 24 takes the place of node 21, whose disk is lost: it votes in 1 group and has caught up after "]:
    assert any(what.startswith(told) for what in done), f"{told!r} is not in {done}"
checked = {promise["id"]: sum(check["checked"] for check in promise["checks"]) for promise in report["promises"]}
assert len(checked) == 10 and all(checked.values()), checked
assert (page.count("<svg"), page.count("<details")) == (3, 10) and "All promises held" in page, "the page isn't whole"
assert "http" not in page, "the page loads something"
END

step "remove node 12 with its disk, and let a spare take its place"
docker rm --force "$VERDICT_NAME-shard-1-2" > /dev/null
docker volume rm "${VERDICT_NAME}_shard-1-2" > /dev/null
docker/spare.sh shard-1-4 > /dev/null 2>&1
for ((i = 0; i < 20; i++)); do
  if ctl member replace 12 14=shard-1-4.cluster:7400; then break; fi
  sleep 1
done
((i < 20)) || die "node 12 could not be replaced"
settle 2000 5
nodes=("${nodes[@]/12/14}")

step "wait until all replicas are equal"
at_rest
for i in "${nodes[@]}"; do
  [[ $(docker inspect --format '{{.Config.User}} {{.HostConfig.ReadonlyRootfs}}' "$(container "$((10#$i))")") == '10001:10001 true' ]] ||
    die "node $i runs as root or can write to its image"
done
step "stop in order"
COMPOSE_PROFILES=spare compose stop > /dev/null 2>&1
for i in "${nodes[@]}"; do
  code=$(docker inspect --format '{{.State.ExitCode}}' "$(container "$((10#$i))")")
  ((code == 0)) || die "node $i ended with $code, not with 0: it did not heed SIGTERM"
done
step "start again: nodes that were replaced stay away"
docker/down.sh > /dev/null 2>&1
docker/up.sh > /dev/null 2>&1 || die "the cluster doesn't start again"
cluster=$(addresses)
at_rest
settle 2000 6

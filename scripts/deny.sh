#!/usr/bin/env bash
# Checks the dependencies against deny.toml. Without a network the list of advisories can't be fetched: then all else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checks=()
if ! cargo deny fetch db > /dev/null 2>&1; then
  printf 'deny: the list of advisories could not be fetched: advisories are NOT checked\n' >&2
  checks=(bans licenses sources)
fi
cargo deny check "${checks[@]}"
# The peers' bench is a workspace of its own.
cargo deny --manifest-path peers/Cargo.toml check --config deny.toml "${checks[@]}"

#!/usr/bin/env bash
# The gate: everything that must hold before a change lands. It changes no file of the work tree.
#
# Stages that need no compiler come first. Each prints its name and its seconds; the first that fails ends the run.
# The tests come last, so that their runner's summary is what one sees.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage() {
  local name=$1 started=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@" || { printf '== %s: FAILED after %s s\n' "$name" $((SECONDS - started)); exit 1; }
  printf '== %s: %s s\n' "$name" $((SECONDS - started))
}

# Sets the variables that point cargo to the library, in this shell.
rocksdb() {
  local variables
  variables=$(scripts/rocksdb.sh) && eval "$variables"
}

# The peers' bench is a workspace of its own, which nothing here builds.
format() { cargo fmt --all --check && cargo fmt --manifest-path peers/Cargo.toml --check; }

documentation() { RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items --quiet; }

# The program and the disk layer for the tests that start them, and the tests, in one go: the same features of all dependencies.
build() { cargo build --locked --workspace --lib --bins --tests; }

# Tests in tests/ start clusters of real processes and measure seconds; side by side on few cores they would starve each
# other. nextest takes that from .config/nextest.toml, plain cargo from the runner. (Two calls of cargo would do as well,
# but another choice of packages means other features of the dependencies: it would compile half of them again.)
tests() {
  if cargo nextest --version > /dev/null 2>&1; then
    cargo test --locked --workspace --doc --quiet &&
      cargo nextest run --locked --workspace --no-fail-fast
  else
    cargo test --locked --workspace --no-fail-fast --config "target.'cfg(unix)'.runner = 'scripts/test-runner.sh'"
  fi
}

target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
export VERDICT_BIN=$target/debug/verdict

stage 'format' format
stage 'rules' scripts/tidy.sh
stage 'rocksdb' rocksdb
stage 'lints' cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
stage 'documentation' documentation
stage 'build' build
stage 'tests' tests

#!/usr/bin/env bash
# Runs one test program for `cargo test`: the tests of the crate verdict-tests one at a time, all others side by side.
if [[ $CARGO_PKG_NAME == verdict-tests ]]; then
  export RUST_TEST_THREADS=1
fi
exec "$@"

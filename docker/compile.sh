#!/usr/bin/env bash
# The steps of the image's build stage. Run by the Dockerfile, in /build.
#
# prebuilt/verdict, if there, is the program: then nothing is compiled. prebuilt/rocksdb-VERSION, if there, is RocksDB's library as
# scripts/rocksdb.sh keeps it; it is used if it was made by the same recipe.
set -euo pipefail

[[ ! -x prebuilt/verdict ]] || compiled=prebuilt/verdict

case $1 in
  tools)
    [[ -z ${compiled:-} ]] || exit 0
    # bindgen loads libclang while it builds.
    if ! command -v g++ > /dev/null || ! compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' > /dev/null; then
      apt-get update -qq
      apt-get install -y -qq --no-install-recommends g++ make libclang-dev
    fi
    ;;
  rocksdb)
    [[ -z ${compiled:-} ]] || exit 0
    mkdir -p "$VERDICT_CACHE"
    for library in prebuilt/rocksdb-*; do
      [[ ! -d $library ]] || cp -r "$library" "$VERDICT_CACHE/"
    done
    scripts/rocksdb.sh true
    ;;
  program)
    if [[ -n ${compiled:-} ]]; then
      cp "$compiled" verdict
    else
      scripts/rocksdb.sh cargo build --locked --release -p verdict
      cp target/release/verdict verdict
      strip --strip-debug verdict
    fi
    ;;
  *)
    echo "compile.sh: unknown step '$1'" >&2
    exit 1
    ;;
esac

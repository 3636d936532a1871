#!/usr/bin/env bash
# Provides RocksDB's C++ as one static library that every build uses, debug and release.
#
#   scripts/rocksdb.sh COMMAND [ARGUMENT...]   runs the command with the variables that point cargo to the library
#   eval "$(scripts/rocksdb.sh)"               sets them in this shell
#
# Why: compiling RocksDB takes most of the time of a first build, and cargo would do it again for every profile and
# every clone. The library is built once for each version and kept in
# ${VERDICT_CACHE:-${XDG_CACHE_HOME:-~/.cache}/verdict}; deleting that folder is always safe.
#
# So that a plain `cargo test` finds the library too, instead of compiling its own, the variables are also written to
# .cargo/config.toml, which git ignores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'rocksdb: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

cache=${VERDICT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/verdict}

# A libclang that setup.sh had to take from PyPI isn't where bindgen looks for it, and comes without the compiler's headers.
libclang=$cache/libclang-18.1.1/clang/native
if [[ -z ${LIBCLANG_PATH:-} && -d $libclang ]]; then
  export LIBCLANG_PATH=$libclang
  export BINDGEN_EXTRA_CLANG_ARGS="-I$(g++ -print-file-name=include)"
fi

# What the library depends on. The line of Cargo.toml is the only place that names RocksDB's version and features.
dependency=$(grep -E '^rocksdb *=' Cargo.toml) || die "Cargo.toml has no line 'rocksdb = ...'"
version=$(awk '$0 == "name = \"librocksdb-sys\"" { getline; gsub(/"/, "", $3); print $3; exit }' Cargo.lock)
[[ -n $version ]] || die "Cargo.lock doesn't name librocksdb-sys: run 'cargo metadata' once, then try again"
target=$(rustc -vV | sed -n 's/^host: //p')
recipe="librocksdb-sys $version
$dependency
target $target
compiler g++ $(g++ -dumpversion)"

dir=$cache/rocksdb-$version
library=$dir/librocksdb.a
# Beside the library: its recipe and its checksum. It is written last, so a library without it is incomplete.
record=$dir/librocksdb.a.built

is_built() {
  [[ -f $library && -f $record ]] && [[ $(sed '$d' "$record") == "$recipe" ]] && (cd "$dir" && tail -n 1 "$record" | sha256sum --check --status)
}

build() {
  local scratch
  scratch=$(mktemp -d "$cache/build-XXXXXX")
  # Expanded now on purpose: the variable is gone when the trap runs.
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch'" EXIT
  mkdir "$scratch/src"
  : > "$scratch/src/lib.rs"
  cat > "$scratch/Cargo.toml" <<TOML
[package]
name = "rocksdb-once"
version = "0.0.0"
edition = "2024"
[dependencies]
$dependency
[workspace]
TOML
  cp Cargo.lock "$scratch/" # the same versions of everything; cargo drops what it doesn't need

  say "building RocksDB once, about 12 minutes on 2 cores (log: $dir/build.log)"
  # -O2 is what RocksDB's own Makefile uses. Without flags from the caller's environment: the library is for everyone.
  if ! (cd "$scratch" && env -u CFLAGS -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS -u CARGO_BUILD_TARGET \
      ROCKSDB_COMPILE=1 CXXFLAGS='-O2 -g0 -w' CARGO_TARGET_DIR="$scratch/target" CARGO_TERM_COLOR=never \
      cargo build --release) > "$dir/build.log" 2>&1; then
    tail -n 30 "$dir/build.log" >&2
    die "the build failed; the whole log is $dir/build.log"
  fi
  local built=("$scratch"/target/release/build/librocksdb-sys-*/out/librocksdb.a)
  [[ -f ${built[0]} ]] || die "the build made no librocksdb.a"

  rm -f "$record"
  mv "${built[0]}" "$library"
  { printf '%s\n' "$recipe"; (cd "$dir" && sha256sum librocksdb.a); } > "$record.new"
  mv "$record.new" "$record"
  rm -rf "$scratch"
  trap - EXIT
  say "built in $SECONDS s"
}

if ! is_built; then
  mkdir -p "$dir"
  exec 9> "$dir/lock"
  flock --nonblock 9 || { say "waiting for another build of RocksDB"; flock 9; }
  is_built || build
  exec 9>&-
fi

export ROCKSDB_LIB_DIR=$dir ROCKSDB_STATIC=1
variables=(ROCKSDB_LIB_DIR ROCKSDB_STATIC)
[[ -z ${LIBCLANG_PATH:-} ]] || variables+=(LIBCLANG_PATH)
[[ -z ${BINDGEN_EXTRA_CLANG_ARGS:-} ]] || variables+=(BINDGEN_EXTRA_CLANG_ARGS)

# cargo builds the crate again when the variables differ from the last time, so both ways must say the same.
# A file that somebody else wrote is left alone.
mark='# Written by scripts/rocksdb.sh; removing it is safe.'
config=$(printf '%s\n[env]' "$mark"; for name in "${variables[@]}"; do printf '\n%s = "%s"' "$name" "${!name}"; done)
if [[ ! -f .cargo/config.toml ]] || { grep -qxF "$mark" .cargo/config.toml && [[ $(< .cargo/config.toml) != "$config" ]]; }; then
  mkdir -p .cargo
  printf '%s\n' "$config" > .cargo/config.toml
fi

if (($# > 0)); then
  exec "$@"
fi
for name in "${variables[@]}"; do printf 'export %s=%q\n' "$name" "${!name}"; done

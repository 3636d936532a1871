#!/usr/bin/env bash
# Installs what a fresh Debian or Ubuntu with only a Rust toolchain lacks. Quick when nothing is missing; safe to repeat.
#
#   scripts/setup.sh          what building and running takes: g++ (for RocksDB), libclang (for its bindings), make
#   scripts/setup.sh --test   also what the tests and checks take: rustfmt, clippy, Python with venv (for its example),
#                             strace (to watch synced writes)
#
# It looks for the tools themselves, not for packages: that is quick, and right for tools from elsewhere too.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" > /dev/null 2>&1; }

case ${1:-} in
  '') with_tests=false ;;
  --test) with_tests=true ;;
  *) die "unknown argument '$1'; usage: scripts/setup.sh [--test]" ;;
esac

cache=${VERDICT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/verdict}
wheel=$cache/libclang-18.1.1 # where rocksdb.sh looks for it

# bindgen loads libclang while it builds, and libclang needs its own builtin headers (stddef.h and the like).
has_libclang() {
  [[ -n ${LIBCLANG_PATH:-} || -d $wheel/clang/native ]] && return
  finds /usr/lib/llvm-*/lib/libclang.so* /usr/lib/llvm-*/lib/libclang-[0-9]*.so* /usr/lib{,64}/libclang.so* &&
    finds /usr/lib{/llvm-*/lib,,64}/clang/*/include/stddef.h
}

# Whether at least one of the patterns, expanded by the caller, is a file.
finds() {
  local path
  for path in "$@"; do [[ ! -e $path ]] || return 0; done
  return 1
}

# A bare `python3` on Debian has no ensurepip, without which `python3 -m venv` fails.
has_venv() { has python3 && python3 -Sc 'import ensurepip, venv' > /dev/null 2>&1; }

# Sets `missing` to the packages that bring what isn't there.
look() {
  missing=()
  has g++ || missing+=(g++)
  has make || missing+=(make)
  has_libclang || missing+=(libclang-dev)
  if $with_tests && ! has_venv; then
    missing+=(python3-venv)
  fi
  if $with_tests && ! has strace; then
    missing+=(strace)
  fi
}

# Installs packages by apt. Fails, having said why, where that can't be.
install() {
  local as_root=()
  has apt-get || { say "there is no apt-get here"; return 1; }
  if ((EUID != 0)); then
    has sudo || { say "not root, and there is no sudo"; return 1; }
    as_root=(sudo)
  fi
  say "installing by apt: $*"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq || say "apt-get update failed; trying with the lists as they are"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    -o DPkg::Lock::Timeout=120 "$@" > /dev/null # a fresh machine may still be busy with its own updates
}

# PyPI has libclang as a wheel, for machines on which nothing can be installed.
install_libclang_wheel() {
  has python3 && python3 -m pip --version > /dev/null 2>&1 || return 1
  say "taking libclang from PyPI instead"
  mkdir -p "$cache"
  rm -rf "$wheel.new"
  python3 -m pip install --quiet --no-deps --target "$wheel.new" libclang==18.1.1 && mv "$wheel.new" "$wheel"
}

look
if ((${#missing[@]} > 0)) && ! install "${missing[@]}"; then
  has_libclang || install_libclang_wheel || say "taking libclang from PyPI failed too"
  look
  ((${#missing[@]} == 0)) || die "please install these packages (their names on Debian and Ubuntu): ${missing[*]}"
fi

# A shell that has not read ~/.cargo/env doesn't see a fresh toolchain.
PATH=$PATH:$HOME/.cargo/bin
has cargo && has rustc || die "there is no Rust toolchain: install one from https://rustup.rs, then run this again"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
rustc=$(rustc --version) # rustc 1.95.0 (...)
rustc=${rustc#rustc } rustc=${rustc%% *}
[[ $(printf '%s\n' "$wanted" "$rustc" | sort -V | head -n 1) == "$wanted" ]] ||
  die "rustc is $rustc; $wanted or newer is needed: run 'rustup update stable'"

if $with_tests; then
  # rustup's minimal profile comes without these two.
  tools=$(rustc --print sysroot)/bin
  components=()
  [[ -x $tools/cargo-fmt ]] || cargo fmt --version > /dev/null 2>&1 || components+=(rustfmt)
  [[ -x $tools/cargo-clippy ]] || cargo clippy --version > /dev/null 2>&1 || components+=(clippy)
  if ((${#components[@]} > 0)); then
    has rustup || die "the Rust toolchain lacks ${components[*]}, and there is no rustup to add them"
    say "adding to the Rust toolchain: ${components[*]}"
    rustup component add "${components[@]}"
  fi
fi

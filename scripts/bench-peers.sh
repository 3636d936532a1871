#!/usr/bin/env bash
# Measures PostgreSQL (two-phase commit between two instances) and etcd beside Verdict; installs them first if they are missing.
#
#   scripts/bench-peers.sh                  everything, about half an hour
#   scripts/bench-peers.sh --quick          a short try, about two minutes
#   scripts/bench-peers.sh --only etcd      one of them; --help tells what else there is
#
# The results go to target/bench-peers/ (results.json, results.md, results.svg), or where --json, --markdown and --svg say.
#
# Debian's packages start their services when they are installed and at every boot. Those aren't used here: what this script
# installs is kept from starting, and what was there before is left as it is. The program starts servers of its own on
# loopback ports, with data in a temporary folder (TMPDIR, or --folder: it must be on a disk), and ends them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'bench-peers: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" > /dev/null 2>&1; }

has_postgres() {
  local program
  for program in /usr/lib/postgresql/*/bin/initdb; do [[ ! -x $program ]] || return 0; done
  return 1
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  else
    has sudo || die "not root, and there is no sudo: please install these packages: ${missing[*]}"
    sudo "$@"
  fi
}

# While this file stands, packages don't start what they install.
policy=/usr/sbin/policy-rc.d
has_made_policy=false
forbid_starts() {
  [[ ! -e $policy ]] || return 0
  as_root sh -c "printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy"
  has_made_policy=true
}
allow_starts() {
  ! $has_made_policy || as_root rm -f "$policy"
  has_made_policy=false
}

install_missing() {
  local name
  say "installing by apt, without starting anything: ${missing[*]}"
  trap allow_starts EXIT
  forbid_starts
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq || say "apt-get update failed; trying with the lists as they are"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    -o DPkg::Lock::Timeout=120 "${missing[@]}" > /dev/null || die "please install these packages: ${missing[*]}"
  allow_starts
  trap - EXIT
  has systemctl || return 0
  # Nor at the next boot.
  for name in "${missing[@]}"; do
    case $name in
      postgresql) as_root systemctl --quiet disable postgresql 2> /dev/null || true ;;
      etcd*) as_root systemctl --quiet disable etcd 2> /dev/null || true ;;
    esac
  done
}

# Whether the arguments ask for a system: all, unless --only names some.
asks_for() {
  local argument previous='' only=''
  for argument in "${arguments[@]}"; do
    case $argument in --only=*) only+=,${argument#--only=} ;; esac
    [[ $previous != --only ]] || only+=,$argument
    previous=$argument
  done
  [[ -z $only || $only, == *",$1,"* ]]
}

arguments=("$@")
missing=()
if { asks_for postgres || asks_for postgres-standby; } && ! has_postgres; then
  missing+=(postgresql)
fi
if asks_for etcd && ! has etcd; then
  # Older releases have both halves in one package.
  if apt-cache show etcd-server > /dev/null 2>&1; then missing+=(etcd-server); else missing+=(etcd); fi
fi
has setpriv || missing+=(util-linux)
if ((${#missing[@]} > 0)); then
  has apt-get || die "there is no apt-get here: please install these: ${missing[*]}"
  install_missing
fi

has cargo || die "there is no Rust toolchain: install one from https://rustup.rs, then run this again"
out=target/bench-peers
mkdir -p "$out"
flags=(--json "$out/results.json" --markdown "$out/results.md" --svg "$out/results.svg")
if asks_for verdict; then
  scripts/setup.sh
  scripts/rocksdb.sh cargo build --locked --release --quiet -p verdict
  target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
  flags+=(--verdict "$target/release/verdict")
fi
# A target folder of its own: the main one is rebuilt when cargo's settings differ.
cargo build --locked --release --quiet --manifest-path peers/Cargo.toml --target-dir target/peers
# The last of two equal flags would be an error: the caller's own come instead of ours.
chosen=()
for ((at = 0; at < ${#flags[@]}; at += 2)); do
  case " ${arguments[*]} " in
    *" ${flags[at]} "* | *" ${flags[at]}="*) ;;
    *) chosen+=("${flags[at]}" "${flags[at + 1]}") ;;
  esac
done
say "the results go to $out/"
exec target/peers/release/verdict-peers "${chosen[@]}" "${arguments[@]}"

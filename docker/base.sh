#!/usr/bin/env bash
# Builds base images from Debian's packages, for machines that can reach those but no registry of images.
#
#   docker/base.sh runtime NAME   a minimal Debian
#   docker/base.sh build NAME     the same with a compiler, libclang and this machine's Rust toolchain
#
# It takes debootstrap (installed by apt-get if it is missing) and root, for the chroot. VERDICT_SUITE (bookworm) and
# VERDICT_MIRROR (http://deb.debian.org/debian) choose what is taken from where.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# == 2)) || die "usage: docker/base.sh runtime|build NAME"
kind=$1 name=$2
suite=${VERDICT_SUITE:-bookworm} mirror=${VERDICT_MIRROR:-http://deb.debian.org/debian}
((EUID == 0)) || die "debootstrap needs root: run this with sudo"
if ! has debootstrap; then
  say "installing debootstrap by apt"
  apt-get update -qq || say "apt-get update failed; trying with the lists as they are"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap > /dev/null
fi

case $kind in
  runtime) packages=libstdc++6 ;;
  build) packages=g++,make,libclang-dev,ca-certificates ;;
  *) die "unknown kind '$kind': runtime or build" ;;
esac

root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
# mktemp's folder is for its owner alone, and would be the image's root.
chmod 755 "$root"
say "building $name from Debian $suite (about a minute)"
debootstrap --variant=minbase --include="$packages" "$suite" "$root" "$mirror" > "$root.log" 2>&1 || {
  tail -n 20 "$root.log" >&2
  die "debootstrap failed; the whole log is $root.log"
}
rm -f "$root.log"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
if [[ $kind == runtime ]]; then
  rm -rf "$root"/usr/share/{doc,man,locale,info}/*
else
  # Where the official image has it would be as good: this is on the PATH already.
  toolchain=$(rustc --print sysroot)
  cp -a "$toolchain"/{bin,lib} "$root/usr/local/"
fi
tar --create --one-file-system --directory "$root" . | docker import --change 'CMD ["bash"]' - "$name" > /dev/null
say "built $name: $(docker image inspect --format '{{.Size}}' "$name" | awk '{ printf "%.0f MB", $1 / 1e6 }')"

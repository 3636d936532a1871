#!/usr/bin/env bash
# Builds the image (VERDICT_IMAGE, by default verdict:local) by docker/Dockerfile.
#
#   docker/build.sh                          compiles everything from source inside the build stage
#   docker/build.sh --local-program [FILE]   takes a program of this machine (by default target/release/verdict, built if missing)
#   docker/build.sh --local-rocksdb          compiles, but takes RocksDB's library as scripts/rocksdb.sh has made it here
#   ... --no-pull                            doesn't ask a registry for the base images
#
# Base images that can't be pulled are built from Debian's packages by docker/base.sh. What comes from this machine must run on the
# runtime base: this machine's C library may not be newer than Debian 12's.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

program='' rocksdb=false pull=true
while (($# > 0)); do
  case $1 in
    --local-program)
      program=target/release/verdict
      if (($# > 1)) && [[ $2 != --* ]]; then program=$2; shift; fi
      ;;
    --local-rocksdb) rocksdb=true ;;
    --no-pull) pull=false ;;
    *) die "unknown argument '$1'; see the head of docker/build.sh" ;;
  esac
  shift
done
has_engine || die "there is no Docker Engine that answers (docker version)"

prebuilt=docker/prebuilt
clear_prebuilt() { find "$prebuilt" -mindepth 1 ! -name .gitignore -exec rm -rf {} +; }
trap clear_prebuilt EXIT
clear_prebuilt

# base KIND ARG: prints the image that the Dockerfile's argument names, or else one made here in its place.
base() {
  local kind=$1 wanted made=verdict-base-$1:local
  wanted=$(sed -n "s/^ARG $2=//p" docker/Dockerfile)
  [[ -n $wanted ]] || die "docker/Dockerfile has no 'ARG $2=...'"
  if has_image "$wanted" || { $pull && timeout 300 docker pull --quiet "$wanted" > /dev/null 2>&1; }; then
    echo "$wanted"
    return
  fi
  has_image "$made" || { say "$wanted can't be pulled"; docker/base.sh "$kind" "$made"; }
  echo "$made"
}

runtime=$(base runtime RUNTIME_BASE)
if [[ -n $program ]]; then
  [[ -x $program || $program != target/release/verdict ]] || scripts/rocksdb.sh cargo build --locked --release -p verdict
  [[ -x $program ]] || die "there is no program $program"
  objcopy --strip-debug "$program" "$prebuilt/verdict"
  build=$runtime # nothing is compiled
else
  build=$(base build BUILD_BASE)
  if $rocksdb; then
    eval "$(scripts/rocksdb.sh)"
    cp -r "$ROCKSDB_LIB_DIR" "$prebuilt/"
  fi
fi

version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
revision=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
docker build --file docker/Dockerfile --tag "$VERDICT_IMAGE" --build-arg BUILD_BASE="$build" --build-arg RUNTIME_BASE="$runtime" \
  --build-arg VERSION="$version" --build-arg REVISION="$revision" .
say "built $VERDICT_IMAGE: $(docker image inspect --format '{{.Size}}' "$VERDICT_IMAGE" | awk '{ printf "%.0f MB", $1 / 1e6 }')"

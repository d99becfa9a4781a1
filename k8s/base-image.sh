#!/usr/bin/env bash
# Make a Python base image from Debian's own packages, for machines that reach no container registry. Needs root.
#   k8s/base-image.sh localhost/fedward-base:bookworm
set -euo pipefail
image=${1:?usage: base-image.sh IMAGE}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fedward
rootfs=$cache/base.tar

if [ ! -f "$rootfs" ]; then
  mkdir -p "$cache"
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$work/root" "$mirror"
  cd "$work/root"
  rm -f usr/lib/python3.11/EXTERNALLY-MANAGED # the official image has none either
  ln -s /usr/bin/python3.11 usr/local/bin/python
  printf '#!/bin/sh\nexec /usr/bin/python3 -m pip "$@"\n' > usr/local/bin/pip
  chmod +x usr/local/bin/pip
  # Certificates that this machine trusts beside Debian's own, for a build behind a proxy that intercepts TLS.
  cp /usr/local/share/ca-certificates/*.crt usr/local/share/ca-certificates/ 2> /dev/null && chroot . update-ca-certificates
  rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/doc/* usr/share/man/* usr/share/locale/*
  tar -c . > "$rootfs.part"
  mv "$rootfs.part" "$rootfs"
fi
podman import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' "$rootfs" "$image"

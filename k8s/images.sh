#!/usr/bin/env bash
# Build the images with podman, one after the other.
#   BASE=docker.io/library/python:3.11-slim-bookworm@sha256:... k8s/images.sh     on a pinned base
#   PUSH=registry.example.org/fedward k8s/images.sh                               and push them there
# Without BASE: the official image, by the digest that it has at the moment; where no registry can be reached, a base
# made of Debian's packages (k8s/base-image.sh, as root).
set -euo pipefail
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
official=docker.io/library/python:3.11-slim-bookworm
if [ "$(id -u)" = 0 ]; then
  export CONTAINERS_CONF=${CONTAINERS_CONF:-$PWD/k8s/containers.conf}
fi

if [ -z "${BASE:-}" ]; then
  if timeout 120 podman pull --quiet "$official" > /dev/null 2>&1; then
    BASE=$(podman image inspect --format '{{index .RepoDigests 0}}' "$official")
  else
    BASE=localhost/fedward/base:bookworm
    podman image exists "$BASE" || k8s/base-image.sh "$BASE"
  fi
fi
echo "base: $BASE"

options=(--network host --build-arg "BASE=$BASE")
options+=(--label "org.opencontainers.image.version=$version" --label "org.opencontainers.image.base.name=$BASE")
options+=(--label "org.opencontainers.image.revision=$(git rev-parse HEAD 2> /dev/null || echo unknown)")
options+=(--label "org.opencontainers.image.licenses=Apache-2.0")
[ -z "${TORCH:-}" ] || options+=(--build-arg "TORCH=$TORCH")
if [ -d "${PIP_FIND_LINKS:-}" ]; then # wheels of this machine, torch among them
  options+=(--volume "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro" --build-arg "PIP_FIND_LINKS=$PIP_FIND_LINKS" --build-arg TORCH_INDEX=)
fi
for target in gateway service trainer; do
  started=$SECONDS
  nice -n 10 podman build --quiet "${options[@]}" --target "$target" --tag "localhost/fedward/$target:$version" . > /dev/null
  size=$(podman image inspect --format '{{.Size}}' "localhost/fedward/$target:$version")
  echo "localhost/fedward/$target:$version  $((size / 1000000)) MB  built in $((SECONDS - started)) s"
  [ -z "${PUSH:-}" ] || podman push "localhost/fedward/$target:$version" "$PUSH/$target:$version"
done

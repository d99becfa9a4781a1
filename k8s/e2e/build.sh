#!/usr/bin/env bash
# Build Kubernetes 1.20 from Debian's source package, once, for machines that reach Debian's archive and nothing else
# (Debian has no binaries of a control plane). About 15 minutes on two cores and 5 GB meanwhile; 400 MB are kept.
#   apt-get install golang-1.19-go golang-github-modern-go-reflect2-dev make rsync gcc libc6-dev
#   k8s/e2e/build.sh        prints the folder with the binaries
set -euo pipefail
binaries=${XDG_CACHE_HOME:-$HOME/.cache}/fedward/kubernetes-1.20.2
wanted=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
reflect2=/usr/share/gocode/src/github.com/modern-go/reflect2

if [ ! -d "$binaries" ]; then
  [ -d $reflect2 ] && [ -x /usr/lib/go-1.19/bin/go ] || { echo "error: install the packages named in $0" >&2; exit 2; }
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  cd "$work"
  mkdir lists
  echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" > source.list
  apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/source.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists")
  "${apt[@]}" update
  "${apt[@]}" source --download-only kubernetes
  tar xf kubernetes_*.orig.tar.gz
  cd kubernetes-1.20.2
  # The reflect2 that came with it fails at run time when it is compiled by Go 1.18 or later; Debian's does not.
  rm -r vendor/github.com/modern-go/reflect2/*
  cp $reflect2/*.go $reflect2/*.s vendor/github.com/modern-go/reflect2/
  cat > ../version <<'VERSION'
KUBE_GIT_COMMIT='debian'
KUBE_GIT_TREE_STATE='clean'
KUBE_GIT_VERSION='v1.20.2'
KUBE_GIT_MAJOR='1'
KUBE_GIT_MINOR='20'
VERSION
  export PATH=/usr/lib/go-1.19/bin:$PATH GOPROXY=off GOFLAGS=-p=2
  TZ=UTC KUBE_GIT_VERSION_FILE=$work/version nice -n 15 make WHAT="${wanted[*]/#/cmd/}" >&2
  mkdir -p "$binaries.part"
  cp "${wanted[@]/#/_output/bin/}" "$binaries.part"
  mv "$binaries.part" "$binaries"
fi
echo "$binaries"

#!/usr/bin/env bash
# Start a Kubernetes of one node, run a command beside it, and end it. As root, on Debian 12:
#   apt-get install podman catatonit etcd-server containerd runc containernetworking-plugins dnsmasq-base iptables conntrack iproute2 openssl
#   k8s/e2e/cluster.sh bash        a shell in which kubectl and ctr work
# kubectl comes from elsewhere; the rest of Kubernetes is built at the first time (build.sh).
# All of it lives in network, process and mount namespaces of its own, which end with the command or with this script,
# however that ends. Logs of the cluster's processes are left in runs/e2e-k8s/log.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || { echo "usage: cluster.sh COMMAND..." >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "error: needs root" >&2; exit 2; }
for tool in podman catatonit etcd containerd ctr runc dnsmasq iptables conntrack ip setpriv openssl kubectl /usr/lib/cni/ptp; do
  command -v "$tool" > /dev/null || { echo "error: $tool is missing; the packages are named in $0" >&2; exit 2; }
done
[ -d /sys/fs/cgroup/cpuset ] || { echo "error: Kubernetes 1.20 needs control groups of version 1" >&2; exit 2; }
kubernetes=$(k8s/e2e/build.sh)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
images=(localhost/fedward/{gateway,service,trainer}:"$version" localhost/fedward/pause:e2e)
export CONTAINERS_CONF=${CONTAINERS_CONF:-$PWD/k8s/containers.conf}

work=$(mktemp -d)
cgroup=fedward-e2e-$$
child=
clean_up() {
  [ -z "$child" ] || { kill -KILL "$child" && wait "$child"; } 2> /dev/null || true
  for _ in {1..50}; do # a control group can be removed once the kernel has buried its processes
    find /sys/fs/cgroup/*/"$cgroup" -depth -type d -exec rmdir {} + 2> /dev/null || true
    compgen -G "/sys/fs/cgroup/*/$cgroup" > /dev/null || break
    sleep 0.2
  done
  mkdir -p runs/e2e-k8s
  rm -rf runs/e2e-k8s/log
  [ ! -d "$work/log" ] || cp -r "$work/log" runs/e2e-k8s/log
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

# The process that holds a pod's namespaces: any that sleeps and buries its children.
podman image exists "${images[-1]}" \
  || tar -C / -c usr/bin/catatonit | podman import --quiet --change 'ENTRYPOINT ["/usr/bin/catatonit", "-P"]' - "${images[-1]}" > /dev/null
podman save --quiet --multi-image-archive --output "$work/images.tar" "${images[@]}"

# In the background, so that this shell sees signals at once. `unshare` ends with this shell, and the namespaces with it.
setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child --mount-proc k8s/e2e/inside.sh "$work" "$cgroup" "$kubernetes" "$@" <&0 &
child=$!
code=0
wait "$child" || code=$?
child=
exit "$code"

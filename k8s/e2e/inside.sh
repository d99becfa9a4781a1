#!/usr/bin/env bash
# Called by cluster.sh as the first process of its own namespaces: what ends with it is everything that it starts.
set -euo pipefail
work=$1 cgroup=$2 kubernetes=$3
shift 3
node=192.0.2.1          # of the documentation's range (RFC 5737), like nothing that a machine really has
dns=10.96.0.10
export KUBECONFIG=$work/kubeconfig E2E_CLUSTER=$work
mkdir -p "$work"/{log,pki,cni,names,volumes,sysctl,var,var-work}

# What the cluster's processes write outside of their own folder goes to a layer over it, not to the machine.
mount -t overlay overlay -o "lowerdir=/var,upperdir=$work/var,workdir=$work/var-work" /var
mount -t tmpfs tmpfs /run
# The kubelet wants to set these, and they are the whole machine's: it gets copies.
for setting in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
  cp "/proc/sys/$setting" "$work/sysctl/${setting//\//.}"
  mount --bind "$work/sysctl/${setting//\//.}" "/proc/sys/$setting"
done
for controller in /sys/fs/cgroup/*/; do mkdir -p "$controller$cgroup"; done
for file in cpuset.cpus cpuset.mems; do cat "/sys/fs/cgroup/cpuset/$file" > "/sys/fs/cgroup/cpuset/$cgroup/$file"; done
echo 16384 > "/sys/fs/cgroup/cpu/$cgroup/cpu.shares" # weighs like 16 other processes of the machine, not like one

ip link set lo up
ip link add node type bridge
ip address add $node/24 dev node
ip address add $dns/32 dev node
ip link set node up
ip route add default dev node
echo 1 > /proc/sys/net/ipv4/ip_forward

start() { # NAME COMMAND...
  local name=$1
  shift
  "$@" > "$work/log/$name.log" 2>&1 &
}
wait_until() { # WHAT COMMAND...
  local what=$1 begin=$SECONDS
  shift
  until "$@" > /dev/null 2>&1; do
    [ $((SECONDS - begin)) -lt 300 ] || { echo "error: $what is not ready" >&2; tail -n 5 "$work"/log/*.log >&2; exit 1; }
    sleep 0.5
  done
}

# One token for everybody: nobody else reaches this network.
token=$(openssl rand -hex 16)
echo "$token,admin,admin,system:masters" > "$work/pki/tokens.csv"
openssl genrsa -out "$work/pki/accounts.key" 2048 2> /dev/null
cat > "$KUBECONFIG" <<END
apiVersion: v1
kind: Config
clusters: [{name: e2e, cluster: {server: "https://$node:6443", certificate-authority: $work/pki/apiserver.crt}}]
users: [{name: admin, user: {token: $token}}]
contexts: [{name: e2e, context: {cluster: e2e, user: admin, namespace: fedward}}]
current-context: e2e
END
start etcd etcd --data-dir "$work/etcd" --unsafe-no-fsync
start apiserver "$kubernetes/kube-apiserver" --etcd-servers http://127.0.0.1:2379 --cert-dir "$work/pki" \
  --advertise-address $node --service-cluster-ip-range 10.96.0.0/16 --token-auth-file "$work/pki/tokens.csv" \
  --authorization-mode RBAC,Node --kubelet-preferred-address-types InternalIP --service-account-issuer https://kubernetes.default.svc \
  --service-account-key-file "$work/pki/accounts.key" --service-account-signing-key-file "$work/pki/accounts.key"
wait_until "the API server" kubectl get --raw /readyz
start controllers "$kubernetes/kube-controller-manager" --kubeconfig "$KUBECONFIG" --leader-elect=false \
  --service-account-private-key-file "$work/pki/accounts.key" --root-ca-file "$work/pki/apiserver.crt"
start scheduler "$kubernetes/kube-scheduler" --kubeconfig "$KUBECONFIG" --leader-elect=false

# Every pod has a wire of its own to the node (ptp), so that all its traffic is routed, and Services work for it.
cat > "$work/cni/10-ptp.conflist" <<END
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.244.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}}]}
END
cat > "$work/containerd.toml" <<END
version = 2
root = "$work/containerd"
oom_score = 0
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/fedward/pause:e2e"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "$work/cni"
END
start containerd containerd --config "$work/containerd.toml"
wait_until containerd ctr version
ctr --namespace k8s.io images import "$work/images.tar" > "$work/log/images.log"
rm "$work/images.tar"

: > "$work/resolv.conf"
cat > "$work/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup
clusterDNS: [$dns]
clusterDomain: cluster.local
resolvConf: $work/resolv.conf
failSwapOn: false
oomScoreAdj: 0
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%} # the disk is not its own
imageGCHighThresholdPercent: 100
END
start kubelet "$kubernetes/kubelet" --config "$work/kubelet.yaml" --kubeconfig "$KUBECONFIG" --root-dir "$work/kubelet" \
  --hostname-override node --node-ip $node --container-runtime remote \
  --container-runtime-endpoint unix:///run/containerd/containerd.sock --volume-plugin-dir "$work/plugins"
wait_until "the node" kubectl wait --for=condition=Ready --timeout=1s node/node
cat > "$work/proxy.yaml" <<END
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clusterCIDR: 10.244.0.0/16
hostnameOverride: node
oomScoreAdj: 0
clientConnection: {kubeconfig: $KUBECONFIG}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s} # the machine's own settings
END
start proxy "$kubernetes/kube-proxy" --config "$work/proxy.yaml"

# Names of Services. dnsmasq reads every file that is laid into the folder.
start dns dnsmasq --keep-in-foreground --user=root --no-resolv --no-hosts --bind-interfaces --listen-address=$dns \
  --local=/cluster.local/ --hostsdir="$work/names" --log-facility=-
template='{{.spec.clusterIP}} {{.metadata.name}}.{{.metadata.namespace}}.svc.cluster.local{{"\n"}}'
kubectl get services --all-namespaces --watch --output "go-template=$template" 2> "$work/log/names.log" \
  | while read -r address name; do echo "$address $name" > "$work/names/$name"; done &

# Volumes for claims: folders of this machine, given out by a default storage class as elsewhere.
{
  cat <<END
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: folders
  annotations: {storageclass.kubernetes.io/is-default-class: "true"}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
END
  for number in {1..10}; do
    mkdir "$work/volumes/$number"
    cat <<END
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: folder-$number}
spec:
  capacity: {storage: 20Gi}
  accessModes: [ReadWriteOnce, ReadWriteMany]
  storageClassName: folders
  local: {path: $work/volumes/$number}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node]}]}]
END
  done
} | kubectl apply --filename - > /dev/null
"$@"

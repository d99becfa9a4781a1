#!/usr/bin/env bash
# Make the keys, certificates, API key and signed bundle of a trial, and lay them where k8s/overlays/all-in-one reads them
# (or a copy of it that is named: development-secrets.sh /elsewhere/k8s/overlays/all-in-one).
# Run it again for new ones. For real deployments docs/deployment.md says who makes which file.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
overlay=${1:-k8s/overlays/all-in-one}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

"$python" -m stack.federation keys --out "$made" --host fleet --host localhost --host 127.0.0.1 --silo silo-0 --silo silo-1
"$python" -m trainer bundle --out "$made/fedward.fab"
"$python" -m stack.federation sign "$made/fedward.fab" --key "$made/signer.key"

rm -rf "$overlay"/secrets "$overlay"/*/secrets
install -m 700 -d "$overlay"/secrets "$overlay"/training/secrets
head -c 32 /dev/urandom > "$overlay"/secrets/audit.key
"$python" -m gateway keys create --file "$overlay"/secrets/keys.json --tenant demo --name trial
cp "$made"/{authority.pem,coordinator.pem,coordinator.key,coordinator-bundle.pem,coordinator.secret} \
  "$made"/silo-{0,1}.key.pub "$made"/fedward.fab{,.signature.json} "$overlay"/training/secrets
for silo in silo-0 silo-1; do
  install -m 700 -d "$overlay"/$silo/secrets
  cp "$made"/{authority.pem,trusted-entities.yaml} "$overlay"/$silo/secrets
  cp "$made/$silo.key" "$overlay"/$silo/secrets/silo.key
  cp "$made/$silo.secret" "$overlay"/$silo/secrets/silo.secret
done

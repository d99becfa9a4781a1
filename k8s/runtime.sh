#!/bin/sh
# Gather into a folder what /opt/fedward needs at run time: Python, its standard library, shared libraries, certificates.
set -eu
python=$(readlink -f /opt/fedward/bin/python)
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
ln -sf "$python" /opt/fedward/bin/python # straight to it: links on the way there are left behind
mkdir -p "$1/etc" "$1/tmp"
chmod 1777 "$1/tmp"
find "$stdlib" /opt/fedward -name '*.so*' -type f > /tmp/objects
echo "$python" >> /tmp/objects
# A wheel's own libraries are found beside it; what ldd cannot resolve in the base image must not pass unnoticed.
xargs ldd < /tmp/objects | awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\/lib.*ld-/ { print $1 }' \
  | grep -v '^/opt/' | sort -u > /tmp/libraries
xargs cp --parents -L -t "$1" < /tmp/libraries
cp --parents -L "$python" "$1"
cp --parents -rL "$stdlib" "$1"
rm -rf "$1$stdlib"/test "$1$stdlib"/ensurepip "$1$stdlib"/idlelib "$1$stdlib"/lib2to3 "$1$stdlib"/config-* "$1$stdlib"/site-packages "$1$stdlib"/dist-packages
cp --parents -rL /etc/ssl/certs/ca-certificates.crt /usr/share/zoneinfo/UTC "$1"
[ ! -f /usr/lib/ssl/openssl.cnf ] || cp --parents -rL /usr/lib/ssl "$1"
for file in passwd group; do grep -E '^(root|fedward):' "/etc/$file" > "$1/etc/$file"; done

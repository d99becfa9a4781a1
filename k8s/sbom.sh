#!/bin/sh
# Write the bill of materials of /opt/fedward (CycloneDX) and of the Debian packages under it into a folder.
set -eu
mkdir -p "$1"
/opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file "$1/python.cdx.json" /opt/fedward/bin/python
dpkg-query --show > "$1/debian.tsv"

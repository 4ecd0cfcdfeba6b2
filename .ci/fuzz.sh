#!/usr/bin/env bash
# Runs fuzz targets, one after the other, all of the module or those named:
# .ci/fuzz.sh TIME [TARGET...]
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: .ci/fuzz.sh TIME [TARGET...], such as 30s}
shift

found=0
while IFS=: read -r file func; do
	name=${func#func }
	name=${name%%(*}
	if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
	found=$((found + 1))
	echo "== $name in ./$(dirname "$file"), $time"
	go test -run='^$' -fuzz="^$name\$" -fuzztime="$time" "./$(dirname "$file")"
done < <(grep -rEo --include='*_test.go' --exclude-dir=.cache '^func Fuzz[A-Za-z0-9_]*\(' . | sed 's#^\./##' | sort)
if [ "$found" = 0 ] || { [ $# -gt 0 ] && [ "$found" -lt $# ]; }; then
	echo "found $found fuzz targets${*:+ of: $*}" >&2
	exit 1
fi

#!/usr/bin/env bash
# Runs every fuzz target of the module, one after the other: .ci/fuzz.sh TIME
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: .ci/fuzz.sh TIME, such as 30s}

found=0
while IFS=: read -r file func; do
	found=1
	name=${func#func }
	name=${name%%(*}
	echo "== $name in ./$(dirname "$file"), $time"
	go test -run='^$' -fuzz="^$name\$" -fuzztime="$time" "./$(dirname "$file")"
done < <(grep -rEo --include='*_test.go' --exclude-dir=.cache '^func Fuzz[A-Za-z0-9_]*\(' . | sed 's#^\./##' | sort)
[ "$found" = 1 ] || { echo "no fuzz targets found" >&2; exit 1; }

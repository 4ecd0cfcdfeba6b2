#!/usr/bin/env bash
# What `make lint` runs.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "gofmt"
unformatted=$(find . -path ./.cache -prune -o -name '*.go' -print0 | xargs -0 gofmt -l)
if [ -n "$unformatted" ]; then
	printf 'not gofmt-ed:\n%s\n' "$unformatted" >&2
	exit 1
fi

echo "go vet"
go vet ./...

echo "staticcheck"
staticcheck ./...

# Needs the network twice: the tool's module and the vulnerability database.
# What is found fails the run; that nobody answers does not.
echo "govulncheck"
if ! make "$PWD/.cache/govulncheck" >.cache/govulncheck.log 2>&1; then
	echo "  skipped: it could not be built: $(tail -n 1 .cache/govulncheck.log)"
	exit 0
fi
status=0
timeout 120 govulncheck ./... >.cache/govulncheck.log 2>&1 || status=$?
case $status in
0) tail -n 3 .cache/govulncheck.log ;;
3) cat .cache/govulncheck.log >&2; exit 1 ;;
*)
	if [ $status != 124 ] && ! grep -q 'fetching vulnerabilities' .cache/govulncheck.log; then
		cat .cache/govulncheck.log >&2
		exit 1
	fi
	echo "  skipped: the vulnerability database does not answer: $(tail -n 1 .cache/govulncheck.log)"
	;;
esac

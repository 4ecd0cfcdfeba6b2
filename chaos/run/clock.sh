#!/usr/bin/env bash
# Writes into directory $1 an overlay for `go build -overlay $1/overlay.json`
# that shifts time.Now by SALLYPORT_CHAOS_CLOCK seconds: a node whose wall clock
# is wrong, while the machine's is right and nothing of the product knows.
# Monotonic time is left alone, as a wrong wall clock leaves it.
set -euo pipefail
dir=$1 original=$(go env GOROOT)/src/time/time.go
mkdir -p "$dir"
sed '0,/sec, nsec, mono := runtimeNow()/s//&; sec += chaosOffset/' "$original" >"$dir/time.go"
grep -q 'sec += chaosOffset' "$dir/time.go" || { echo "clock.sh: time.Now looks different in this version of Go" >&2; exit 1; }
cat >>"$dir/time.go" <<'GO'

var chaosOffset = func() (sec int64) {
	s, _ := syscall.Getenv("SALLYPORT_CHAOS_CLOCK")
	sign := int64(1)
	for _, c := range s {
		if c == '-' {
			sign = -1
		} else if c >= '0' && c <= '9' {
			sec = sec*10 + int64(c-'0')
		}
	}
	return sign * sec
}()
GO
sed -i '0,/^import (/s//import (\n\t"syscall"/' "$dir/time.go"
printf '{"Replace": {"%s": "%s"}}\n' "$original" "$dir/time.go" >"$dir/overlay.json"

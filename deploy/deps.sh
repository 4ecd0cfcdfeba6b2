#!/usr/bin/env bash
# Installs what is missing of: postgresql (server, psql and pgbench), cc (a C
# compiler, which Go's race detector needs), netns (ip and nft, with which chaos
# runs make and cut a network of their own). Debian and Ubuntu; prints each
# command that needs rights. Nothing is done where nothing is missing.
set -euo pipefail

have_postgresql() {
	local dir
	for dir in "${SALLYPORT_PG_BINDIR:-}" /usr/lib/postgresql/*/bin "$(pg_config --bindir 2>/dev/null || true)" \
		"$(dirname "$(readlink -f "$(command -v postgres || echo /nonexistent)")")"; do
		[ -x "$dir/postgres" ] && [ -x "$dir/initdb" ] && [ -x "$dir/psql" ] && [ -x "$dir/pgbench" ] && return 0
	done
	return 1
}

have_cc() { command -v "${CC:-gcc}" >/dev/null && printf '#include <stdlib.h>\n' | "${CC:-gcc}" -E - >/dev/null 2>&1; }

have_netns() { PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null && PATH=$PATH:/usr/sbin:/sbin command -v nft >/dev/null; }

packages=()
for want in "$@"; do
	case "$want" in
	postgresql) have_postgresql || packages+=(postgresql postgresql-client) ;;
	cc) have_cc || packages+=(gcc libc6-dev) ;;
	netns) have_netns || packages+=(iproute2 nftables) ;;
	*) echo "deps: unknown dependency $want" >&2; exit 2 ;;
	esac
done
[ ${#packages[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "Missing: ${packages[*]} (Debian's names). This system has no apt-get: install them its own way, then run make again." >&2
	exit 1
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
	if ! command -v sudo >/dev/null; then
		echo "Missing: ${packages[*]}. As root, run: apt-get install --no-install-recommends ${packages[*]}" >&2
		exit 1
	fi
	as_root=(sudo)
fi
run() {
	echo "+ ${as_root[*]}${as_root:+ }$*" >&2
	"${as_root[@]}" "$@"
}

# Debian starts a server of its own on port 5432 when PostgreSQL is first
# installed. Nothing here uses it, so it is asked not to.
conf=/etc/postgresql-common/createcluster.d/sallyport-install.conf
case " ${packages[*]} " in
*" postgresql "*)
	run mkdir -p "${conf%/*}"
	trap 'run rm -f "$conf"' EXIT
	run sh -c "echo 'create_main_cluster = false' >$conf"
	;;
esac
run apt-get update -q
run env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"

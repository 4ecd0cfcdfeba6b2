package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Two proxies for comparison. Neither parses, judges or records: they show
// what a process in between costs at the least. Both are taken from where
// Debian installs them, or skipped.

// startPgbouncer runs pgbouncer with TLS on both sides and a session pool.
func (b *bench) startPgbouncer(ctx context.Context) (endpoint, error) {
	path, ok := installed("pgbouncer")
	if !ok {
		return endpoint{}, nil
	}
	pg := b.c.PG
	certs := filepath.Dir(pg.CAFile)
	port, err := freePort()
	if err != nil {
		return endpoint{}, err
	}
	// pgbouncer does not run as root and must be able to read its files: they
	// go beside PostgreSQL's, whose account it uses.
	ini := filepath.Join(certs, "pgbouncer.ini")
	users := filepath.Join(certs, "pgbouncer.users")
	config := fmt.Sprintf(`[databases]
%s = host=%s port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = scram-sha-256
auth_file = %s
pool_mode = session
default_pool_size = 100
max_client_conn = 200
client_tls_sslmode = require
client_tls_cert_file = %s
client_tls_key_file = %s
server_tls_sslmode = verify-full
server_tls_ca_file = %s
log_connections = 0
log_disconnections = 0
ignore_startup_parameters = extra_float_digits
`, database, pg.Host, pg.Port, port, users, filepath.Join(certs, "server.crt"), filepath.Join(certs, "server.key"), pg.CAFile)
	cmd := exec.Command(path, "-q", ini)
	uid, gid := -1, -1
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return endpoint{}, err
		}
		if uid, err = strconv.Atoi(u.Uid); err != nil {
			return endpoint{}, err
		}
		if gid, err = strconv.Atoi(u.Gid); err != nil {
			return endpoint{}, err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	for file, content := range map[string]string{ini: config, users: fmt.Sprintf("%q %q\n", benchRole, benchPassword)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			return endpoint{}, err
		}
		if err := os.Chown(file, uid, gid); err != nil {
			return endpoint{}, err
		}
	}
	return b.startProxy(ctx, "pgbouncer", cmd, port)
}

// startHAProxy runs haproxy copying bytes; the TLS is PostgreSQL's own.
func (b *bench) startHAProxy(ctx context.Context) (endpoint, error) {
	path, ok := installed("haproxy")
	if !ok {
		return endpoint{}, nil
	}
	port, err := freePort()
	if err != nil {
		return endpoint{}, err
	}
	file := filepath.Join(b.c.Dir, "haproxy.cfg")
	if err := os.WriteFile(file, fmt.Appendf(nil, `global
  maxconn 400
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
listen pg
  bind 127.0.0.1:%d
  server pg %s
`, port, b.c.PG.Addr), 0o600); err != nil {
		return endpoint{}, err
	}
	// -db: in the foreground, so that the one process is the one that works.
	return b.startProxy(ctx, "haproxy", exec.Command(path, "-db", "-f", file), port)
}

// startProxy starts cmd and waits until a login through it succeeds.
func (b *bench) startProxy(ctx context.Context, name string, cmd *exec.Cmd, port int) (endpoint, error) {
	pg := b.c.PG
	logFile := filepath.Join(b.c.Dir, name+".log")
	p, err := b.c.Spawn(logFile, cmd)
	if err != nil {
		return endpoint{}, fmt.Errorf("%s: %w", name, err)
	}
	e := endpoint{name: name, env: pgEnv(pg.Host, port, benchRole, benchPassword, pg.CAFile),
		dsn: strings.Replace(pg.DSNFor(benchRole, benchPassword, database), pg.Addr, net.JoinHostPort(pg.Host, strconv.Itoa(port)), 1), pid: p.PID}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		conn, err := pgx.Connect(ctx, e.dsn)
		if err == nil {
			return e, conn.Close(ctx)
		}
		if p.PID() == 0 || time.Now().After(end) || ctx.Err() != nil {
			log, _ := os.ReadFile(logFile)
			return endpoint{}, fmt.Errorf("%s does not answer: %w\n%s", name, err, log)
		}
	}
}

// installed finds a program, also in the administrator's directories.
func installed(name string) (string, bool) {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/usr/local/sbin") {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, true
		}
	}
	fmt.Printf("%s is not installed (Debian: %s): left out\n", name, name)
	return "", false
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

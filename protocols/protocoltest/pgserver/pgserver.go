// Package pgserver starts a private, real PostgreSQL for tests, the demo and
// the benchmarks: a fresh data directory, TLS with a certificate authority of
// its own, SCRAM-SHA-256 as the only way in, on a free loopback port.
//
// The server ends with the process that started it, kill -9 included: a small
// shell between the two holds one end of a pipe, and the pipe's end of file is
// the order to stop PostgreSQL and remove its directory. PostgreSQL refuses to
// run as root, so root's servers run as the user postgres.
package pgserver

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// startTimeout is how long initdb and the first accepted connection may take
// together. Both take about three seconds on an idle machine.
const startTimeout = 90 * time.Second

// Options say how a server is to be started. The zero value is a server for
// tests: nothing is synced to disk.
type Options struct {
	// Settings are put at the end of postgresql.conf and win over the package's own.
	Settings map[string]string
	// HBA are pg_hba.conf lines put before the package's own, which allow TLS
	// with SCRAM-SHA-256 from loopback and nothing else.
	HBA []string
	// LogStatements writes every statement to LogFile.
	LogStatements bool
	// Durable leaves fsync on, as a server that is to be measured needs.
	Durable bool
	// BinDir holds postgres and initdb. Default: BinDir().
	BinDir string
}

// An Option changes Options.
type Option func(*Options)

// WithSetting sets a parameter of postgresql.conf.
func WithSetting(name, value string) Option {
	return func(o *Options) {
		if o.Settings == nil {
			o.Settings = map[string]string{}
		}
		o.Settings[name] = value
	}
}

// WithHBA puts lines before the package's own in pg_hba.conf.
func WithHBA(lines ...string) Option {
	return func(o *Options) { o.HBA = append(o.HBA, lines...) }
}

// LogStatements writes every statement to the server's log.
func LogStatements() Option { return func(o *Options) { o.LogStatements = true } }

// Durable leaves fsync on.
func Durable() Option { return func(o *Options) { o.Durable = true } }

// Server is a running PostgreSQL. Its fields are constant.
type Server struct {
	Host string // 127.0.0.1
	Port int
	Addr string // Host:Port

	CAPEM  []byte // certificate of the authority that signed the server's
	CAFile string // the same in a file

	SuperUser     string
	SuperPassword string

	DataDir string
	LogFile string
	BinDir  string
	Version int // major version

	dir  string
	cmd  *exec.Cmd
	hold io.Closer // the watchdog's pipe; closing it stops the server

	stopOnce sync.Once
	stopErr  error
}

// TB is the part of testing.TB this package uses; spelled out so that the
// demo can use the package without linking the testing package.
type TB interface {
	Helper()
	Name() string
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// Start runs a server for one test and stops it at the test's end. A failed
// test gets the tail of the server's log.
func Start(t TB, opts ...Option) *Server {
	t.Helper()
	var o Options
	for _, f := range opts {
		f(&o)
	}
	s, err := Run(context.Background(), o)
	if err != nil {
		t.Fatalf("pgserver: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of PostgreSQL's log:\n%s", s.logTail(4096))
		}
		if err := s.Stop(); err != nil {
			t.Logf("pgserver: stop: %v", err)
		}
	})
	return s
}

var shared struct {
	sync.Mutex
	server *Server
	err    error
}

// Shared returns the one server of this process, started at first use with the
// zero Options. It ends with the process, or at Stop. Tests that share it keep
// apart by CreateDatabase and by their own role names.
func Shared(t TB) *Server {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.server == nil && shared.err == nil {
		shared.server, shared.err = Run(context.Background(), Options{})
	}
	if shared.err != nil {
		t.Fatalf("pgserver: %v", shared.err)
	}
	return shared.server
}

// Stop stops the server that Shared started, if any: for a TestMain that
// checks for leftovers. Without it the server ends when the process does.
func Stop() {
	shared.Lock()
	defer shared.Unlock()
	if shared.server != nil {
		shared.server.Stop()
		shared.server = nil
	}
}

// BinDir finds the directory with PostgreSQL's programs: SALLYPORT_PG_BINDIR,
// then the newest of Debian's /usr/lib/postgresql/*/bin, then pg_config, then
// PATH.
func BinDir() (string, error) {
	var dirs []string
	if d := os.Getenv("SALLYPORT_PG_BINDIR"); d != "" {
		dirs = append(dirs, d)
	}
	debian, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	version := func(dir string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
		return n
	}
	sort.Slice(debian, func(i, j int) bool { return version(debian[i]) > version(debian[j]) })
	dirs = append(dirs, debian...)
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(out)))
	}
	if p, err := exec.LookPath("postgres"); err == nil {
		if p, err = filepath.EvalSymlinks(p); err == nil {
			dirs = append(dirs, filepath.Dir(p))
		}
	}
	for _, d := range dirs {
		if isProgram(filepath.Join(d, "postgres")) && isProgram(filepath.Join(d, "initdb")) {
			return d, nil
		}
	}
	return "", errors.New("no PostgreSQL server found (postgres and initdb): run `make deps`, or set SALLYPORT_PG_BINDIR")
}

// Find returns the path of one of PostgreSQL's programs, such as psql or
// pgbench: from BinDir, else from PATH.
func Find(program string) (string, error) {
	if d, err := BinDir(); err == nil {
		if p := filepath.Join(d, program); isProgram(p) {
			return p, nil
		}
	}
	if p, err := exec.LookPath(program); err == nil {
		return p, nil
	}
	return "", fmt.Errorf("no %s found: run `make deps`, or set SALLYPORT_PG_BINDIR", program)
}

// PSQL returns the path of psql, or fails the test.
func PSQL(t TB) string {
	t.Helper()
	p, err := Find("psql")
	if err != nil {
		t.Fatalf("pgserver: %v", err)
	}
	return p
}

func isProgram(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

// watchdog runs PostgreSQL ($1 and on) in the directory $0 until it ends or
// until standard input does, which it does when the starting process ends in
// any way. The directory is removed at the end of file only, so that the log
// of a server that failed can still be read.
const watchdog = `
dir=$0
exec 3<&0 </dev/null
"$@" >"$dir/log" 2>&1 3<&- &
pid=$!
( read -r _ <&3; [ -e "$dir/exit" ] || kill -QUIT "$pid" 2>/dev/null ) &
eof=$!
wait "$pid"
echo $? >"$dir/exit"
wait "$eof"
rm -rf "$dir"
`

// Run starts a server and returns when it accepts connections. The caller
// calls Stop; ctx bounds the start only.
func Run(ctx context.Context, o Options) (_ *Server, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if o.BinDir == "" {
		if o.BinDir, err = BinDir(); err != nil {
			return nil, err
		}
	}
	acc, err := serverAccount()
	if err != nil {
		return nil, err
	}
	dir, err := makeDir(acc)
	if err != nil {
		return nil, err
	}
	s := &Server{
		Host:          "127.0.0.1",
		CAFile:        filepath.Join(dir, "ca.crt"),
		SuperUser:     "postgres",
		SuperPassword: randomHex(16),
		DataDir:       filepath.Join(dir, "data"),
		LogFile:       filepath.Join(dir, "log"),
		BinDir:        o.BinDir,
		dir:           dir,
	}
	defer func() {
		if err != nil {
			s.Stop()
			os.RemoveAll(dir)
		}
	}()

	certs, err := makeCertificates()
	if err != nil {
		return nil, err
	}
	s.CAPEM = certs.ca
	for name, content := range map[string][]byte{
		"ca.crt":     certs.ca,
		"server.crt": certs.cert,
		"server.key": certs.key,
		"password":   []byte(s.SuperPassword + "\n"),
	} {
		if err := acc.writeFile(filepath.Join(dir, name), content); err != nil {
			return nil, err
		}
	}

	initdb := exec.CommandContext(ctx, filepath.Join(o.BinDir, "initdb"), "-D", s.DataDir, "-U", s.SuperUser,
		"--pwfile="+filepath.Join(dir, "password"), "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync")
	acc.apply(initdb, dir)
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	if s.Version, err = majorVersion(s.DataDir); err != nil {
		return nil, err
	}
	hba := strings.Join(append(o.HBA,
		"hostssl all all 127.0.0.1/32 scram-sha-256",
		"hostssl all all ::1/128 scram-sha-256"), "\n") + "\n"
	if err := acc.writeFile(filepath.Join(s.DataDir, "pg_hba.conf"), []byte(hba)); err != nil {
		return nil, err
	}
	conf, err := os.ReadFile(filepath.Join(s.DataDir, "postgresql.conf"))
	if err != nil {
		return nil, err
	}

	// Another process can take the port between the choice and the start.
	for attempt := 1; ; attempt++ {
		if s.Port, err = freePort(); err != nil {
			return nil, err
		}
		s.Addr = net.JoinHostPort(s.Host, strconv.Itoa(s.Port))
		if err := acc.writeFile(filepath.Join(s.DataDir, "postgresql.conf"), append(bytes.Clone(conf), s.settings(o)...)); err != nil {
			return nil, err
		}
		if err = s.launch(ctx, acc); err == nil {
			return s, nil
		}
		if attempt == 5 || !strings.Contains(err.Error(), "could not create any TCP/IP sockets") {
			return nil, err
		}
		s.release()
		os.Remove(filepath.Join(dir, "exit"))
	}
}

// launch starts PostgreSQL under the watchdog and waits until it answers.
func (s *Server) launch(ctx context.Context, acc account) error {
	cmd := exec.Command("/bin/sh", "-c", watchdog, s.dir, filepath.Join(s.BinDir, "postgres"), "-D", s.DataDir)
	acc.apply(cmd, s.dir)
	cmd.SysProcAttr.Setpgid = true // the terminal's Ctrl-C is the parent's to handle
	hold, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	s.cmd, s.hold = cmd, hold
	for {
		conn, err := s.Connect(ctx, "postgres")
		if err == nil {
			return conn.Close(ctx)
		}
		if _, statErr := os.Stat(filepath.Join(s.dir, "exit")); statErr == nil {
			return fmt.Errorf("PostgreSQL did not start:\n%s", s.logTail(4096))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("PostgreSQL does not answer: %w; its log:\n%s", err, s.logTail(4096))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *Server) settings(o Options) string {
	set := map[string]string{
		"listen_addresses":        s.Host,
		"port":                    strconv.Itoa(s.Port),
		"unix_socket_directories": "",
		"max_connections":         "200",
		"password_encryption":     "scram-sha-256",
		"ssl":                     "on",
		"ssl_cert_file":           filepath.Join(s.dir, "server.crt"),
		"ssl_key_file":            filepath.Join(s.dir, "server.key"),
		"log_line_prefix":         "%m [%p] %u@%d ",
		"timezone":                "UTC",
		"log_timezone":            "UTC",
	}
	if !o.Durable {
		set["fsync"], set["synchronous_commit"], set["full_page_writes"] = "off", "off", "off"
	}
	if o.LogStatements {
		set["log_statement"] = "all"
	}
	for k, v := range o.Settings {
		set[k] = v
	}
	var b strings.Builder
	b.WriteString("\n")
	for k, v := range set {
		fmt.Fprintf(&b, "%s = '%s'\n", k, strings.ReplaceAll(v, "'", "''"))
	}
	return b.String()
}

// Stop stops the server at once, without a checkpoint, and removes its
// directory. It may be called more than once.
func (s *Server) Stop() error {
	s.stopOnce.Do(func() {
		s.stopErr = s.release()
		if err := os.RemoveAll(s.dir); s.stopErr == nil {
			s.stopErr = err
		}
	})
	return s.stopErr
}

// release lets the watchdog go and waits for it.
func (s *Server) release() error {
	if s.cmd == nil {
		return nil
	}
	s.hold.Close()
	err := s.cmd.Wait()
	s.cmd = nil
	return err
}

// TLS returns a client configuration that trusts this server alone.
func (s *Server) TLS() *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.CAPEM)
	return &tls.Config{RootCAs: pool, ServerName: s.Host, MinVersion: tls.VersionTLS12}
}

// DSN is a URL that logs the superuser in to db, verifying the server's
// certificate. It holds the password.
func (s *Server) DSN(db string) string { return s.DSNFor(s.SuperUser, s.SuperPassword, db) }

// DSNFor is DSN for another role.
func (s *Server) DSNFor(role, password, db string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(role, password), Host: s.Addr, Path: "/" + db,
		RawQuery: url.Values{"sslmode": {"verify-full"}, "sslrootcert": {s.CAFile}}.Encode(),
	}
	return u.String()
}

// Connect logs the superuser in to db.
func (s *Server) Connect(ctx context.Context, db string) (*pgx.Conn, error) {
	return pgx.Connect(ctx, s.DSN(db))
}

// Conn logs the superuser in to db for the length of a test.
func (s *Server) Conn(t TB, db string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := s.Connect(ctx, db)
	if err != nil {
		t.Fatalf("pgserver: connect to %s: %v", db, err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Exec runs SQL (several statements are allowed) as the superuser in db.
func (s *Server) Exec(ctx context.Context, db, sql string) error {
	conn, err := s.Connect(ctx, db)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.PgConn().Exec(ctx, sql).ReadAll()
	return err
}

// MustExec is Exec that fails the test.
func (s *Server) MustExec(t TB, db, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.Exec(ctx, db, sql); err != nil {
		t.Fatalf("pgserver: %s: %v", sql, err)
	}
}

// CreateDatabase makes an empty database and drops it, with the sessions in
// it, at the test's end.
func (s *Server) CreateDatabase(t TB) string {
	t.Helper()
	name := "test_" + randomHex(6)
	s.MustExec(t, "postgres", "CREATE DATABASE "+name)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := s.Exec(ctx, "postgres", "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)"); err != nil {
			t.Logf("pgserver: drop %s: %v", name, err)
		}
	})
	return name
}

// PID is the process id of the postmaster, the parent of all of the server's
// processes.
func (s *Server) PID() (int, error) {
	b, err := os.ReadFile(filepath.Join(s.DataDir, "postmaster.pid"))
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(b), "\n")
	return strconv.Atoi(first)
}

// Log returns what the server has logged so far.
func (s *Server) Log() (string, error) {
	b, err := os.ReadFile(s.LogFile)
	return string(b), err
}

func (s *Server) logTail(n int) string {
	log, err := s.Log()
	if err != nil {
		return err.Error()
	}
	return log[max(0, len(log)-n):]
}

// account is the user the server runs as: the caller, or postgres when the
// caller is root.
type account struct {
	switched bool
	uid, gid int
}

func serverAccount() (account, error) {
	if os.Getuid() != 0 {
		return account{}, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return account{}, fmt.Errorf("PostgreSQL does not run as root and there is no user postgres: run `make deps`: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return account{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return account{}, err
	}
	return account{switched: true, uid: uid, gid: gid}, nil
}

// apply makes cmd run as the account, in dir, without the caller's PG*
// variables or locale.
func (a account) apply(cmd *exec.Cmd, dir string) {
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if a.switched {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
}

func (a account) writeFile(path string, content []byte) error {
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return err
	}
	if a.switched {
		return os.Chown(path, a.uid, a.gid)
	}
	return nil
}

// makeDir makes the server's directory where its account can reach it.
func makeDir(a account) (string, error) {
	parent := os.TempDir()
	if a.switched && !reachable(parent) {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "sallyport-pg-")
	if err != nil {
		return "", err
	}
	if a.switched {
		err = os.Chown(dir, a.uid, a.gid)
	}
	return dir, err
}

// reachable reports whether everyone may go into path and make files there.
func reachable(path string) bool {
	fi, err := os.Stat(path)
	if err != nil || fi.Mode()&0o003 != 0o003 {
		return false
	}
	for p := filepath.Dir(path); ; p = filepath.Dir(p) {
		if fi, err := os.Stat(p); err != nil || fi.Mode()&0o001 == 0 {
			return false
		}
		if p == filepath.Dir(p) {
			return true
		}
	}
}

func majorVersion(dataDir string) (int, error) {
	b, err := os.ReadFile(filepath.Join(dataDir, "PG_VERSION"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

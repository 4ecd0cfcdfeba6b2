// Package cluster runs a whole installation as real processes on loopback: a
// PostgreSQL, the trial issuer and nodes of the sallyport binary. The chaos and
// acceptance tests and the benchmarks drive it; it decides nothing and checks
// nothing but that what it started answers.
//
// Nothing outlives the process that started it, kill -9 included: a shell that
// holds the other end of a pipe kills what is left and removes the directory.
package cluster

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/devissuer"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

// Options say what to start. The zero value is three nodes with the files of defaultFiles.
type Options struct {
	Nodes    int    // default 3
	Gateways int    // of Nodes, the last, which join without the right to vote
	Binary   string // sallyport; default Binary()
	Postgres pgserver.Options
	// Files of the configuration; one of the same name replaces one of
	// defaultFiles, an empty one takes it away.
	Files map[string]string
	// Recordings is where nodes bring recordings: default a directory that all share.
	Recordings string
	// ServeArgs are further arguments of `sallyport serve`; Env, further
	// variables of the nodes.
	ServeArgs, Env []string
	// Prepare, if not nil, may lay out a node's data directory before its first
	// start.
	Prepare func(dataDir string) error
	// Place says where node i (from 0) runs; nil means loopback for all. Nodes
	// that are elsewhere reach PostgreSQL at TargetHost, and the trial issuer,
	// which serves loopback only, by what Place does about it.
	Place      func(i int) (*Place, error)
	TargetHost string
	// Started, if not nil, is given the Cluster before the first node is placed.
	Started func(*Cluster)
	// Log is told what is done; nil tells nobody.
	Log func(format string, args ...any)
}

// Place is where one node runs.
type Place struct {
	Host  string                // its address there
	Start func(*exec.Cmd) error // starts a process there; nil means Cmd.Start
	Env   func() []string       // further variables, asked for at each start; nil for none
}

// Cluster is a running installation. Its fields are constant, but for Nodes,
// which AddNode makes longer; its methods are safe for concurrent use, but for
// AddNode, Stop and those of one Node at a time.
type Cluster struct {
	Dir        string
	Binary     string
	CAFile     string // the cluster's CA, for clients
	AdminCert  string // of the bootstrap administrator
	AdminKey   string
	ConfigDir  string
	Recordings string
	PG         *pgserver.Server
	Nodes      []*Node

	opts      Options
	issuer    *devissuer.Issuer
	issuerRun *Process
	undertake *undertaker
}

// Node is one node. It is running after Start.
type Node struct {
	Name    string
	Addr    string // host:port
	DataDir string
	LogFile string
	Binary  string // of its next start; "" for the cluster's

	c     *Cluster
	place *Place
	mu    sync.Mutex
	p     *Process // nil when not running
}

// timeout bounds each step of a start. Two busy cores need a few seconds.
const timeout = 90 * time.Second

// StartTest starts a cluster for one test, and stops it at the test's end. A
// failed test gets the ends of the nodes' logs.
func StartTest(t testing.TB, o Options) *Cluster {
	t.Helper()
	if o.Log == nil {
		o.Log = t.Logf
	}
	c, err := Start(t.Context(), o)
	if err != nil {
		t.Fatalf("cluster: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range c.Nodes {
				t.Logf("end of node %s's log:\n%s", n.Name, tail(n.LogFile, 4096))
			}
		}
		c.Stop()
	})
	return c
}

// Start starts everything and returns when all nodes are voters that agree on
// a leader and act on the configuration.
func Start(ctx context.Context, o Options) (_ *Cluster, err error) {
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	if o.Binary == "" {
		if o.Binary, err = Binary(ctx); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp("", "sallyport-cluster-")
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		Dir: dir, Binary: o.Binary, opts: o,
		CAFile: filepath.Join(dir, "admin", "ca.crt"), AdminCert: filepath.Join(dir, "admin", "admin.crt"), AdminKey: filepath.Join(dir, "admin", "admin.key"),
		ConfigDir: filepath.Join(dir, "config"), Recordings: o.Recordings,
	}
	if c.Recordings == "" {
		c.Recordings = filepath.Join(dir, "recordings")
	}
	defer func() {
		if err != nil {
			err = c.withLogs(err)
			c.Stop()
		}
	}()
	if c.undertake, err = newUndertaker(dir); err != nil {
		return nil, err
	}
	o.Log("starting PostgreSQL")
	if o.TargetHost != "" {
		o.Postgres.Settings = maps.Clone(o.Postgres.Settings)
		if o.Postgres.Settings == nil {
			o.Postgres.Settings = map[string]string{}
		}
		o.Postgres.Settings["listen_addresses"] = "127.0.0.1," + o.TargetHost
		o.Postgres.HBA = append(o.Postgres.HBA, "hostssl all all samenet scram-sha-256")
	}
	if c.PG, err = pgserver.Run(ctx, o.Postgres); err != nil {
		return nil, err
	}
	if err := fillPostgres(ctx, c.PG); err != nil {
		return nil, err
	}
	if err := c.startIssuer(ctx); err != nil {
		return nil, err
	}
	if o.Started != nil {
		o.Started(c)
	}
	for range o.Nodes {
		if _, err := c.AddNode(ctx); err != nil {
			return nil, err
		}
	}
	return c, c.configure(ctx)
}

// fillPostgres makes databases, roles and the administrative account.
func fillPostgres(ctx context.Context, pg *pgserver.Server) error {
	for _, sql := range databasesSQL {
		if err := pg.Exec(ctx, "postgres", sql); err != nil {
			return fmt.Errorf("databases: %w", err)
		}
	}
	if err := pg.Exec(ctx, "shop", ShopSQL); err != nil {
		return fmt.Errorf("shop: %w", err)
	}
	script, err := adminSQL()
	if err != nil {
		return err
	}
	psql, err := pgserver.Find("psql")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, psql, "-X", "-q", "-d", pg.DSN("postgres"))
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("administrative account: %w\n%s", err, out)
	}
	return nil
}

func (c *Cluster) startIssuer(ctx context.Context) error {
	addr, err := freeAddr()
	if err != nil {
		return err
	}
	dir := filepath.Join(c.Dir, "issuer")
	c.opts.Log("starting the trial issuer at %s", addr)
	if c.issuerRun, err = c.spawn(filepath.Join(c.Dir, "issuer.log"), "dev-issuer", "serve", "--dir", dir, "--addr", addr); err != nil {
		return err
	}
	if err := c.await(ctx, c.issuerRun, func() error {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			err = conn.Close()
		}
		return err
	}); err != nil {
		return fmt.Errorf("trial issuer: %w", err)
	}
	c.issuer, err = devissuer.Open(dir)
	return err
}

// IssuerAddr is the trial issuer's address on loopback.
func (c *Cluster) IssuerAddr() string { return strings.TrimPrefix(c.issuer.URL(), "https://") }

// AddNode makes and starts one more node and returns when it serves. The first
// makes the cluster, the others join.
func (c *Cluster) AddNode(ctx context.Context) (*Node, error) {
	i := len(c.Nodes)
	place := &Place{}
	var err error
	if c.opts.Place != nil {
		if place, err = c.opts.Place(i); err != nil {
			return nil, err
		}
	}
	addr := net.JoinHostPort(place.Host, "7000")
	if place.Host == "" {
		if addr, err = freeAddr(); err != nil {
			return nil, err
		}
	}
	name := fmt.Sprintf("n%d", i+1)
	n := &Node{Name: name, Addr: addr, DataDir: filepath.Join(c.Dir, name), LogFile: filepath.Join(c.Dir, name+".log"), c: c, place: place}
	settings := []string{"--name", name, "--data-dir", n.DataDir, "--addr", addr, "--recordings", c.Recordings, "--dev"}
	if i == 0 {
		c.opts.Log("making the cluster with node %s at %s", name, addr)
		_, err = c.CLI(ctx, nil, append([]string{"cluster", "init", "--admin-out", filepath.Join(c.Dir, "admin")}, settings...)...)
	} else {
		c.opts.Log("joining node %s at %s", name, addr)
		var token string
		role := pki.Voter
		if i < c.opts.Nodes && i >= c.opts.Nodes-c.opts.Gateways { // not one that is added later
			role = pki.Gateway
		}
		if token, err = c.CLI(ctx, c.AdminEnv(), "cluster", "token", "create", "--role", role); err == nil {
			_, err = c.CLI(ctx, nil, append([]string{"cluster", "join", "--token", strings.TrimSpace(token), "--server", c.running()[0].Addr}, settings...)...)
		}
	}
	if err != nil {
		return nil, err
	}
	if c.opts.Prepare != nil {
		if err := c.opts.Prepare(n.DataDir); err != nil {
			return nil, err
		}
	}
	c.Nodes = append(c.Nodes, n)
	if err := n.Start(); err != nil {
		return nil, err
	}
	return n, c.WaitReady(ctx)
}

// configure writes the configuration and applies it.
func (c *Cluster) configure(ctx context.Context) error {
	issuerCA, err := os.ReadFile(c.issuer.CAPath())
	if err != nil {
		return err
	}
	files := c.defaultFiles(issuerCA)
	maps.Copy(files, c.opts.Files)
	for name, content := range files {
		if content == "" {
			continue
		}
		path := filepath.Join(c.ConfigDir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
	}
	c.opts.Log("applying the configuration")
	if err := c.Apply(ctx); err != nil {
		return err
	}
	return c.WaitReady(ctx)
}

// Apply applies what is in ConfigDir.
func (c *Cluster) Apply(ctx context.Context) error {
	_, err := c.CLI(ctx, append(c.AdminEnv(), "TARGET_PASSWORD="+AdminPassword), "apply", "-f", c.ConfigDir, "--dev", "--yes")
	return err
}

// Stop ends everything at once and removes the directory.
func (c *Cluster) Stop() {
	for _, n := range c.Nodes {
		n.Kill()
	}
	if c.issuerRun != nil {
		c.issuerRun.Kill()
	}
	if c.PG != nil {
		c.PG.Stop()
	}
	if c.undertake != nil {
		c.undertake.close()
	}
	os.RemoveAll(c.Dir)
}

// WaitReady returns when the running nodes are reachable, agree on a leader,
// and have the same events and the same configuration.
func (c *Cluster) WaitReady(ctx context.Context) error {
	running := c.running()
	var servers []string
	for _, n := range running {
		servers = append(servers, n.Addr)
	}
	if len(running) == 0 {
		return errors.New("no node is running")
	}
	client, err := c.AdminClient(servers...)
	if err != nil {
		return err
	}
	return c.await(ctx, running[0].process(), func() error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		st, err := client.Status(ctx)
		if err != nil {
			return err
		}
		return agree(st, running)
	})
}

func (c *Cluster) running() (running []*Node) {
	for _, n := range c.Nodes {
		if n.Running() {
			running = append(running, n)
		}
	}
	return running
}

// agree says what keeps the nodes from being ready, or nil.
func agree(st *api.Status, running []*Node) error {
	var leader, chain string
	var config uint64
	// Nodes beyond these subscribe.
	const wantVoters = 3
	voters := 0
	for _, s := range st.Nodes {
		if s.Reachable && s.Voter {
			voters++
		}
	}
	for i, n := range running {
		var s *api.NodeStatus
		for j := range st.Nodes {
			if st.Nodes[j].Node == n.Name {
				s = &st.Nodes[j]
			}
		}
		switch {
		case s == nil:
			return fmt.Errorf("node %s is not a member", n.Name)
		case !s.Reachable:
			return fmt.Errorf("node %s is not reachable: %s", n.Name, s.Error)
		case !s.Serving:
			return fmt.Errorf("node %s does not let clients in yet", n.Name)
		case !s.Voter && (s.RaftState != "subscriber" || voters < wantVoters):
			return fmt.Errorf("node %s is no voter", n.Name)
		case s.Leader == "":
			return fmt.Errorf("node %s knows no leader", n.Name)
		case s.ConfigError != "":
			return fmt.Errorf("node %s: configuration: %s", n.Name, s.ConfigError)
		case i > 0 && s.Leader != leader:
			return fmt.Errorf("leader is %s or %s", leader, s.Leader)
		case i > 0 && s.ConfigIndex != config:
			return fmt.Errorf("configuration %d or %d", config, s.ConfigIndex)
		case i > 0 && s.Chain != chain:
			return fmt.Errorf("node %s has other events (%d) than those before", n.Name, s.Events)
		}
		leader, config, chain = s.Leader, s.ConfigIndex, s.Chain
	}
	return nil
}

// await calls try until it succeeds, p ends or the time is up.
func (c *Cluster) await(ctx context.Context, p *Process, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("process ended: %v; last: %w", p.err, err)
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// AdminClient calls the API as the bootstrap administrator, at the given
// nodes or, when none is given, at all.
func (c *Cluster) AdminClient(servers ...string) (*api.Client, error) {
	cert, err := pki.LoadCert(c.AdminCert)
	if err != nil {
		return nil, err
	}
	key, err := pki.LoadKey(c.AdminKey)
	if err != nil {
		return nil, err
	}
	return c.client(api.ClientConfig{Cert: cert, Key: key}, servers)
}

// TokenClient calls the API with a token.
func (c *Cluster) TokenClient(token string, servers ...string) (*api.Client, error) {
	return c.client(api.ClientConfig{Token: func() (string, error) { return token, nil }}, servers)
}

func (c *Cluster) client(cfg api.ClientConfig, servers []string) (*api.Client, error) {
	if cfg.Servers = servers; len(servers) == 0 {
		cfg.Servers = c.addrs()
	}
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, err
	}
	cfg.Roots = x509.NewCertPool()
	cfg.Roots.AppendCertsFromPEM(ca)
	return api.NewClient(cfg)
}

func (c *Cluster) addrs() []string {
	var all []string
	for _, n := range c.Nodes {
		all = append(all, n.Addr)
	}
	return all
}

// AdminEnv is the environment in which the CLI is the bootstrap administrator.
func (c *Cluster) AdminEnv() []string {
	return append(c.serverEnv(), "SALLYPORT_ADMIN_CERT="+c.AdminCert, "SALLYPORT_ADMIN_KEY="+c.AdminKey)
}

// TokenEnv is the environment in which the CLI presents a token.
func (c *Cluster) TokenEnv(token string) []string {
	return append(c.serverEnv(), "SALLYPORT_TOKEN="+token)
}

func (c *Cluster) serverEnv() []string {
	return []string{"SALLYPORT_SERVER=" + strings.Join(c.addrs(), ","), "SALLYPORT_CA=" + c.CAFile}
}

// CLI runs the binary with env, such as AdminEnv, and returns what it printed
// to standard output. An error holds what it printed to standard error.
func (c *Cluster) CLI(ctx context.Context, env []string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.Binary, args...)
	cmd.Env = append(c.cleanEnv(), env...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("sallyport %s: %w: %s", strings.Join(args[:min(2, len(args))], " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// cleanEnv is this process's environment without what would steer clients.
func (c *Cluster) cleanEnv() []string {
	env := []string{"HOME=" + c.Dir}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "PG") && !strings.HasPrefix(e, "SALLYPORT_") && !strings.HasPrefix(e, "HOME=") && !strings.HasPrefix(e, "XDG_") {
			env = append(env, e)
		}
	}
	return env
}

// Token mints a token with ES256. claims replace the issuer's own.
func (c *Cluster) Token(claims map[string]any) (string, error) {
	return c.issuer.Mint(devissuer.ES256, claims)
}

// CIToken mints a token of a job of acme/shop on ref ("main" is app_rw, "migrate"
// is app_migrator, others app_ro), run by actor, good for an hour.
func (c *Cluster) CIToken(ref, actor string) (string, error) {
	return c.Token(map[string]any{
		"sub": "repo:acme/shop:ref:refs/heads/" + ref, "aud": AudienceCI, "exp": time.Now().Add(time.Hour).Unix(),
		"repository": "acme/shop", "repository_owner": "acme", "ref": "refs/heads/" + ref,
		"sha": strings.Repeat("0123456789", 4), "run_id": "1001", "actor": actor,
	})
}

// PersonToken mints a token of a person in groups, good for an hour.
func (c *Cluster) PersonToken(name string, groups ...string) (string, error) {
	return c.Token(map[string]any{
		"sub": name, "aud": AudiencePeople, "exp": time.Now().Add(time.Hour).Unix(), "email": name + "@example.com", "groups": groups,
	})
}

// Conninfo is the connection string, without the token, for a login through n.
func (n *Node) Conninfo(db string) string {
	host, port, _ := net.SplitHostPort(n.Addr)
	return fmt.Sprintf("host=%s port=%s user=%s dbname=%s sslmode=verify-full sslrootcert=%s", host, port, TargetName, db, n.c.CAFile)
}

// DSN is the same as a URL, token included.
func (n *Node) DSN(db, token string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(TargetName, token), Host: n.Addr, Path: "/" + db,
		RawQuery: url.Values{"sslmode": {"verify-full"}, "sslrootcert": {n.c.CAFile}}.Encode(),
	}
	return u.String()
}

// Command is one of PostgreSQL's programs (psql, pgbench) that logs in
// through n with token. db is set by PGDATABASE.
func (n *Node) Command(ctx context.Context, program, db, token string, args ...string) (*exec.Cmd, error) {
	path, err := pgserver.Find(program)
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(n.Addr)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(n.c.cleanEnv(), "PGHOST="+host, "PGPORT="+port, "PGUSER="+TargetName, "PGDATABASE="+db,
		"PGPASSWORD="+token, "PGSSLMODE=verify-full", "PGSSLROOTCERT="+n.c.CAFile, "PGCONNECT_TIMEOUT=20")
	return cmd, nil
}

// PSQL runs SQL by psql through n and returns both outputs together.
func (n *Node) PSQL(ctx context.Context, db, token, sql string) (string, error) {
	cmd, err := n.Command(ctx, "psql", db, token, "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "-c", sql)
	if err != nil {
		return "", err
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Start starts the node's process; WaitReady tells when it serves.
func (n *Node) Start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.p.running() {
		return fmt.Errorf("node %s is running", n.Name)
	}
	cmd := exec.Command(cmp.Or(n.Binary, n.c.Binary), append([]string{"serve", "--data-dir", n.DataDir, "--dev"}, n.c.opts.ServeArgs...)...)
	cmd.Env = append(n.c.cleanEnv(), n.c.opts.Env...)
	if n.place.Env != nil {
		cmd.Env = append(cmd.Env, n.place.Env()...)
	}
	start := cmd.Start
	if n.place.Start != nil {
		start = func() error { return n.place.Start(cmd) }
	}
	p, err := n.c.spawnBy(n.LogFile, cmd, start)
	n.p = p
	return err
}

// Restart starts a node that was killed or stopped and waits until it serves.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.Start(); err != nil {
		return err
	}
	return n.c.WaitReady(ctx)
}

// Kill ends the node with SIGKILL and returns when it is gone.
func (n *Node) Kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.p.Kill()
}

// Terminate asks the node to stop (SIGTERM) and returns when it has, or when
// ctx ends.
func (n *Node) Terminate(ctx context.Context) error {
	p := n.process()
	if !p.running() {
		return fmt.Errorf("node %s is not running", n.Name)
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Pause stops the process (SIGSTOP), and returns when it stands.
func (n *Node) Pause() error {
	if err := n.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	stat := fmt.Sprintf("/proc/%d/stat", n.process().cmd.Process.Pid)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(stat)
		if err != nil {
			return err
		}
		// proc(5): the state comes after the name, which is in parentheses.
		if i := strings.LastIndexByte(string(b), ')'); i >= 0 && strings.HasPrefix(string(b[i:]), ") T") {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("node %s does not stand: %s", n.Name, b)
		}
	}
}

// Continue ends a Pause.
func (n *Node) Continue() error { return n.signal(syscall.SIGCONT) }

func (n *Node) signal(sig syscall.Signal) error {
	p := n.process()
	if !p.running() {
		return fmt.Errorf("node %s is not running", n.Name)
	}
	return p.cmd.Process.Signal(sig)
}

// Running reports whether the process runs (or is paused).
func (n *Node) Running() bool { return n.process().running() }

// ExitCode is the status that the node's last process ended with; -1 while it
// runs, and when a signal ended it.
func (n *Node) ExitCode() int {
	if p := n.process(); p != nil && !p.running() {
		return p.cmd.ProcessState.ExitCode()
	}
	return -1
}

// PID of the node's process; 0 when it is not running.
func (n *Node) PID() int {
	return n.process().PID()
}

func (n *Node) process() *Process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.p
}

// Leader is the running node that leads, as its peers see it.
func (c *Cluster) Leader(ctx context.Context) (*Node, error) {
	var up []string
	for _, n := range c.Nodes {
		if n.Running() {
			up = append(up, n.Addr)
		}
	}
	client, err := c.AdminClient(up...)
	if err != nil {
		return nil, err
	}
	st, err := client.Status(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range st.Nodes {
		for _, n := range c.Nodes {
			if s.Reachable && s.Node == n.Name && strings.EqualFold(s.RaftState, "leader") {
				return n, nil
			}
		}
	}
	return nil, errors.New("no reachable node leads")
}

// Process is a child with its one waiter.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // set before done is closed
}

// spawn runs the binary.
func (c *Cluster) spawn(logFile string, args ...string) (*Process, error) {
	cmd := exec.Command(c.Binary, args...)
	cmd.Env = append(c.cleanEnv(), c.opts.Env...)
	return c.Spawn(logFile, cmd)
}

// Spawn starts cmd, with its output appended to logFile, as a process that
// ends with the cluster at the latest.
func (c *Cluster) Spawn(logFile string, cmd *exec.Cmd) (*Process, error) {
	return c.spawnBy(logFile, cmd, cmd.Start)
}

func (c *Cluster) spawnBy(logFile string, cmd *exec.Cmd, start func() error) (*Process, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &Process{cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // Ctrl-C is the parent's to handle
	if err := start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	c.undertake.say("+ %d", pid)
	go func() {
		p.err = cmd.Wait()
		c.undertake.say("- %d", pid)
		close(p.done)
	}()
	return p, nil
}

// PID of the process; 0 when it has ended.
func (p *Process) PID() int {
	if !p.running() {
		return 0
	}
	return p.cmd.Process.Pid
}

func (p *Process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the process with SIGKILL and returns when it is gone.
func (p *Process) Kill() {
	if p != nil {
		p.cmd.Process.Kill()
		<-p.done
	}
}

// undertaker is a shell that is told which processes run; when its input ends
// it kills those, removes the directory, and ends.
type undertaker struct {
	mu  sync.Mutex
	cmd *exec.Cmd
	in  io.WriteCloser
}

const undertakerScript = `
pids=" "
while read -r op pid; do
	case $op in
	+) pids="$pids$pid " ;;
	-) pids="${pids%% $pid *} ${pids#* $pid }" ;;
	esac
done
for pid in $pids; do kill -KILL "$pid" 2>/dev/null; done
for i in 1 2 3 4 5; do rm -rf "$0" 2>/dev/null && break; sleep 0.2; done
`

func newUndertaker(dir string) (*undertaker, error) {
	u := &undertaker{cmd: exec.Command("/bin/sh", "-c", undertakerScript, dir)}
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var err error
	if u.in, err = u.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return u, u.cmd.Start()
}

func (u *undertaker) say(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	fmt.Fprintf(u.in, format+"\n", args...)
}

func (u *undertaker) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.in.Close()
	u.cmd.Wait()
}

// Binary is the sallyport binary to test: SALLYPORT_BIN, else one built from
// this module, in its .cache directory.
func Binary(ctx context.Context) (string, error) {
	if bin := os.Getenv("SALLYPORT_BIN"); bin != "" {
		return bin, nil
	}
	mod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	if _, statErr := os.Stat(filepath.Join(root, "cmd", "sallyport")); err != nil || statErr != nil {
		return "", errors.New("no sallyport binary: set SALLYPORT_BIN, or run inside the source tree")
	}
	dir := filepath.Join(root, ".cache", "test")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Test binaries run side by side; only one may build.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "sallyport")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", bin, "./cmd/sallyport")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
}

// withLogs adds the ends of all logs to an error of the start.
func (c *Cluster) withLogs(err error) error {
	logs, _ := filepath.Glob(filepath.Join(c.Dir, "*.log"))
	for _, l := range logs {
		err = fmt.Errorf("%w\n--- %s:\n%s", err, filepath.Base(l), tail(l, 2048))
	}
	return err
}

func tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "(none)"
	} else if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

// freeAddr is a loopback address whose port is free for TCP and UDP.
func freeAddr() (string, error) {
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		addr := l.Addr().String()
		u, err := net.ListenPacket("udp", addr)
		l.Close()
		if err == nil {
			u.Close()
			return addr, nil
		}
	}
	return "", errors.New("no port is free for TCP and UDP")
}

// CPU is the processor time that a process has used, its reaped children
// included.
func CPU(pid int) (time.Duration, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	// proc(5): the second field, the name, is in parentheses and may hold
	// anything. Fields 14 to 17 are user, system, and those of reaped children,
	// in ticks, which Linux reports at 100 a second on every architecture.
	f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(f) < 15 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, stat)
	}
	var ticks int64
	for _, s := range f[11:15] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

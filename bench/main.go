// Command bench measures what a node costs: pgbench's select-only workload
// straight to PostgreSQL, through pgbouncer and haproxy where they are
// installed, and through a Sallyport node, all with TLS.
//
// Machines drift, so endpoints take turns in every round and each round gives
// a ratio of its own; the median of those is printed. The database is read
// whole beforehand: with a cold cache every proxy looks free.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

type options struct {
	scale, clients, threads, rounds, logins, nodes int
	seconds                                        int
	modes                                          string
	json                                           string
	profile                                        bool
}

func main() {
	var o options
	flag.IntVar(&o.scale, "scale", 10, "pgbench's scale factor; 1 is 100,000 rows")
	flag.IntVar(&o.clients, "clients", 8, "connections")
	flag.IntVar(&o.threads, "threads", 2, "threads of pgbench")
	flag.IntVar(&o.rounds, "rounds", 3, "rounds in which each endpoint has its turn")
	flag.IntVar(&o.seconds, "seconds", 4, "length of a turn")
	flag.IntVar(&o.logins, "logins", 10, "logins timed at each endpoint in each round")
	flag.IntVar(&o.nodes, "nodes", 1, "nodes of the cluster; sessions go through the first")
	flag.StringVar(&o.modes, "modes", "simple,extended,prepared", "query modes of pgbench")
	flag.StringVar(&o.json, "json", "", "file to write every turn's numbers to")
	flag.BoolVar(&o.profile, "profile", true, "say where the node spends its time, with perf where it is installed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// endpoint is a way to the database.
type endpoint struct {
	name string
	env  []string // PG* variables
	dsn  string
	pid  func() int // of the process in between; nil for none
}

// turn is one run of pgbench.
type turn struct {
	Round     int     `json:"round"`
	Mode      string  `json:"mode"`
	Clients   int     `json:"clients"`
	Endpoint  string  `json:"endpoint"`
	TPS       float64 `json:"tps"`
	LatencyMS float64 `json:"latency_ms"`
	// CPU microseconds a transaction.
	ClientCPU   float64 `json:"client_cpu_us"`
	ProxyCPU    float64 `json:"proxy_cpu_us"`
	PostgresCPU float64 `json:"postgres_cpu_us"`
}

// login is a series of logins, one after the other.
type login struct {
	Round    int     `json:"round"`
	Endpoint string  `json:"endpoint"`
	MedianMS float64 `json:"median_ms"`
}

type bench struct {
	options
	c          *cluster.Cluster
	pgbench    string
	postmaster int
	endpoints  []endpoint
	turns      []turn
	logins     []login
}

const benchRole, benchPassword = "bench_direct", "password-of-a-private-server"

func run(ctx context.Context, o options) error {
	pgbench, err := pgserver.Find("pgbench")
	if err != nil {
		return err
	}
	c, err := cluster.Start(ctx, cluster.Options{
		Nodes:    o.nodes,
		Postgres: pgserver.Options{Settings: map[string]string{"shared_buffers": "512MB"}},
		Log:      func(format string, args ...any) { fmt.Printf(format+"\n", args...) },
	})
	if err != nil {
		return err
	}
	defer c.Stop()
	b := &bench{options: o, c: c, pgbench: pgbench}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	fmt.Printf("%d cores, %s, PostgreSQL %d, scale %d, %d s a turn, %d rounds\n\n",
		runtime.NumCPU(), runtime.Version(), c.PG.Version, o.scale, o.seconds, o.rounds)
	workloads := []turn{{Mode: "simple", Clients: 1}}
	for _, m := range strings.Split(o.modes, ",") {
		workloads = append(workloads, turn{Mode: m, Clients: o.clients})
	}
	for round := range o.rounds {
		for _, e := range b.endpoints {
			l, err := b.timeLogins(ctx, e, round)
			if err != nil {
				return fmt.Errorf("login at %s: %w", e.name, err)
			}
			b.logins = append(b.logins, l)
		}
		for _, w := range workloads {
			for i := range b.endpoints {
				// Nobody is always first.
				e := b.endpoints[(i+round)%len(b.endpoints)]
				t, err := b.turn(ctx, e, w.Mode, w.Clients)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", e.name, w.Mode, err)
				}
				t.Round = round
				b.turns = append(b.turns, t)
				progress("round %d of %d: %-9s %2d clients  %-10s %8.0f tps  ", round+1, o.rounds, w.Mode, w.Clients, e.name, t.TPS)
			}
		}
	}
	progress("")
	for _, w := range workloads {
		b.report(w)
	}
	b.reportLogins()
	if o.profile {
		if err := b.profileNode(ctx); err != nil {
			return err
		}
	}
	if o.json != "" {
		data, err := json.MarshalIndent(map[string]any{"turns": b.turns, "logins": b.logins}, "", "  ")
		if err != nil {
			return err
		}
		return os.WriteFile(o.json, append(data, '\n'), 0o644)
	}
	return nil
}

// progress replaces the last line of a terminal.
func progress(format string, args ...any) {
	if fi, err := os.Stderr.Stat(); err == nil && fi.Mode()&os.ModeCharDevice != 0 {
		fmt.Fprintf(os.Stderr, "\r%-78s\r", fmt.Sprintf(format, args...))
	}
}

// prepare fills the database, warms it, and lists the endpoints.
func (b *bench) prepare(ctx context.Context) error {
	pg := b.c.PG
	var err error
	if b.postmaster, err = pg.PID(); err != nil {
		return err
	}
	fmt.Println("filling the database")
	fill := exec.CommandContext(ctx, b.pgbench, "-i", "-q", "-s", strconv.Itoa(b.scale))
	fill.Env = append(os.Environ(), pgEnv(pg.Host, pg.Port, pg.SuperUser, pg.SuperPassword, pg.CAFile)...)
	if out, err := fill.CombinedOutput(); err != nil {
		return fmt.Errorf("pgbench -i: %w\n%s", err, out)
	}
	if err := pg.Exec(ctx, database, `
		CREATE ROLE `+benchRole+` LOGIN PASSWORD '`+benchPassword+`';
		GRANT SELECT ON ALL TABLES IN SCHEMA public TO app_ro, app_rw, `+benchRole+`;
		CREATE EXTENSION pg_prewarm;
		SELECT pg_prewarm(oid) FROM pg_class WHERE relname LIKE 'pgbench_%' AND relkind IN ('r', 'i');
		SELECT count(*), sum(abalance) FROM pgbench_accounts;`); err != nil {
		return err
	}
	b.endpoints = []endpoint{{
		name: "direct",
		env:  pgEnv(pg.Host, pg.Port, benchRole, benchPassword, pg.CAFile),
		dsn:  pg.DSNFor(benchRole, benchPassword, database),
	}}
	for _, start := range []func(context.Context) (endpoint, error){b.startPgbouncer, b.startHAProxy} {
		e, err := start(ctx)
		if err != nil {
			return err
		}
		if e.name != "" {
			b.endpoints = append(b.endpoints, e)
		}
	}
	node := b.c.Nodes[0]
	token, err := b.c.CIToken("bench", "nobody")
	if err != nil {
		return err
	}
	host, port, _ := strings.Cut(node.Addr, ":")
	p, err := strconv.Atoi(port)
	if err != nil {
		return err
	}
	b.endpoints = append(b.endpoints, endpoint{
		name: "sallyport", env: pgEnv(host, p, cluster.TargetName, token, b.c.CAFile), dsn: node.DSN(database, token), pid: node.PID,
	})
	return nil
}

const database = "bench"

func pgEnv(host string, port int, user, password, ca string) []string {
	return []string{"PGHOST=" + host, "PGPORT=" + strconv.Itoa(port), "PGUSER=" + user, "PGPASSWORD=" + password,
		"PGDATABASE=" + database, "PGSSLMODE=verify-full", "PGSSLROOTCERT=" + ca}
}

var (
	tpsLine     = regexp.MustCompile(`(?m)^tps = ([0-9.]+) `)
	latencyLine = regexp.MustCompile(`(?m)^latency average = ([0-9.]+) ms`)
	countLine   = regexp.MustCompile(`(?m)^number of transactions actually processed: ([0-9]+)`)
)

// turn runs pgbench once.
func (b *bench) turn(ctx context.Context, e endpoint, mode string, clients int) (turn, error) {
	proxyBefore, postgresBefore, err := b.cpu(e)
	if err != nil {
		return turn{}, err
	}
	cmd := exec.CommandContext(ctx, b.pgbench, "-n", "-S", "-M", mode, "-c", strconv.Itoa(clients),
		"-j", strconv.Itoa(min(clients, b.threads)), "-T", strconv.Itoa(b.seconds))
	cmd.Env = append(os.Environ(), e.env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return turn{}, fmt.Errorf("pgbench: %w\n%s", err, out)
	}
	proxy, postgres, err := b.cpu(e)
	if err != nil {
		return turn{}, err
	}
	tps, err1 := number(tpsLine, out)
	latency, err2 := number(latencyLine, out)
	n, err3 := number(countLine, out)
	if err := cmp.Or(err1, err2, err3); err != nil {
		return turn{}, err
	}
	perTx := func(d time.Duration) float64 { return float64(d.Microseconds()) / n }
	return turn{
		Mode: mode, Clients: clients, Endpoint: e.name, TPS: tps, LatencyMS: latency,
		ClientCPU:   perTx(cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()),
		ProxyCPU:    perTx(proxy - proxyBefore),
		PostgresCPU: perTx(postgres - postgresBefore),
	}, nil
}

func number(re *regexp.Regexp, out []byte) (float64, error) {
	m := re.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("pgbench printed no line like %s:\n%s", re, out)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}

// cpu is what the endpoint's process and all of PostgreSQL have used so far.
func (b *bench) cpu(e endpoint) (proxy, postgres time.Duration, err error) {
	if e.pid != nil {
		if proxy, err = cluster.CPU(e.pid()); err != nil {
			return 0, 0, err
		}
	}
	// The postmaster's own count holds the backends that have ended.
	if postgres, err = cluster.CPU(b.postmaster); err != nil {
		return 0, 0, err
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", b.postmaster, b.postmaster))
	if err != nil {
		return 0, 0, err
	}
	for _, pid := range strings.Fields(string(children)) {
		n, err := strconv.Atoi(pid)
		if err != nil {
			return 0, 0, err
		}
		if used, err := cluster.CPU(n); err == nil { // it may just have ended
			postgres += used
		}
	}
	return proxy, postgres, nil
}

// timeLogins connects and asks for nothing.
func (b *bench) timeLogins(ctx context.Context, e endpoint, round int) (login, error) {
	var took []float64
	for range b.options.logins {
		began := time.Now()
		conn, err := pgx.Connect(ctx, e.dsn)
		if err != nil {
			return login{}, err
		}
		took = append(took, time.Since(began).Seconds()*1000)
		if err := conn.Close(ctx); err != nil {
			return login{}, err
		}
	}
	return login{round, e.name, median(took)}, nil
}

// report prints one workload's table.
func (b *bench) report(w turn) {
	fmt.Printf("pgbench -S -M %s, %d client(s)\n", w.Mode, w.Clients)
	tw := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\ttps\tlowest\thighest\tof direct\tlatency ms\tCPU µs/tx: client\tbetween\tpostgres\tall\t")
	of := func(name string, get func(turn) float64) (all []float64) {
		for _, t := range b.turns {
			if t.Mode == w.Mode && t.Clients == w.Clients && t.Endpoint == name {
				all = append(all, get(t))
			}
		}
		return all
	}
	direct := of("direct", func(t turn) float64 { return t.TPS })
	for _, e := range b.endpoints {
		tps := of(e.name, func(t turn) float64 { return t.TPS })
		ratios := make([]float64, len(tps))
		for i := range tps {
			ratios[i] = tps[i] / direct[i]
		}
		fmt.Fprintf(tw, "%s\t%.0f\t%.0f\t%.0f\t%.2f\t%.3f\t%.1f\t%.1f\t%.1f\t%.1f\t\n", e.name,
			median(tps), slices.Min(tps), slices.Max(tps), median(ratios),
			median(of(e.name, func(t turn) float64 { return t.LatencyMS })),
			median(of(e.name, func(t turn) float64 { return t.ClientCPU })),
			median(of(e.name, func(t turn) float64 { return t.ProxyCPU })),
			median(of(e.name, func(t turn) float64 { return t.PostgresCPU })),
			median(of(e.name, func(t turn) float64 { return t.ClientCPU + t.ProxyCPU + t.PostgresCPU })))
	}
	tw.Flush()
	fmt.Println()
}

func (b *bench) reportLogins() {
	fmt.Println("login, one at a time: median ms")
	for _, e := range b.endpoints {
		var all []float64
		for _, l := range b.logins {
			if l.Endpoint == e.name {
				all = append(all, l.MedianMS)
			}
		}
		fmt.Printf("  %-10s %6.1f\n", e.name, median(all))
	}
	fmt.Println()
}

// profileNode says in which functions the node spends its CPU time under load.
func (b *bench) profileNode(ctx context.Context) error {
	perf, err := exec.LookPath("perf")
	if err != nil {
		fmt.Println("where the node's time goes: skipped, perf is not installed (Debian: linux-perf)")
		return nil
	}
	e := b.endpoints[len(b.endpoints)-1]
	file := filepath.Join(b.c.Dir, "perf.data")
	record := exec.CommandContext(ctx, perf, "record", "-q", "-e", "cpu-clock", "-F", "499", "-p", strconv.Itoa(e.pid()), "-o", file,
		"--", "sleep", strconv.Itoa(b.seconds))
	failed := make(chan error, 1)
	go func() {
		out, err := record.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
		}
		failed <- err
	}()
	_, turnErr := b.turn(ctx, e, "simple", b.clients)
	if err := <-failed; err != nil {
		fmt.Println("where the node's time goes: skipped, perf does not work here:", err)
		return turnErr
	}
	if turnErr != nil {
		return turnErr
	}
	out, err := exec.CommandContext(ctx, perf, "report", "-i", file, "--stdio", "--no-children", "-q", "-F", "overhead,sym").Output()
	if err != nil {
		return fmt.Errorf("perf report: %w", err)
	}
	functions, packages := shares(string(out))
	fmt.Printf("where the node's time goes (simple, %d clients), by package, then by function\n", b.clients)
	printShares(packages, 15)
	printShares(functions, 15)
	return nil
}

// share is a part of the node's CPU time, in percent.
type share struct {
	of      string
	percent float64
}

var reportLine = regexp.MustCompile(`(?m)^ *([0-9.]+)% +\[(.)\] (\S+)`)

// shares reads what perf report printed, and adds it up by Go package; the
// kernel counts as one.
func shares(report string) (functions, packages []share) {
	sum := map[string]float64{}
	for _, m := range reportLine.FindAllStringSubmatch(report, -1) {
		percent, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			continue
		}
		name, pkg := m[3], "kernel"
		if m[2] == "k" {
			name = "kernel: " + name
		} else {
			slash := strings.LastIndexByte(strings.SplitN(name, "[", 2)[0], '/') + 1
			pkg = name[:slash] + strings.SplitN(name[slash:], ".", 2)[0]
		}
		functions = append(functions, share{name, percent})
		sum[pkg] += percent
	}
	for pkg, percent := range sum {
		packages = append(packages, share{pkg, percent})
	}
	for _, s := range [][]share{functions, packages} {
		slices.SortFunc(s, func(a, b share) int { return cmp.Or(cmp.Compare(b.percent, a.percent), cmp.Compare(a.of, b.of)) })
	}
	return functions, packages
}

func printShares(all []share, n int) {
	for _, s := range all[:min(n, len(all))] {
		fmt.Printf("  %5.1f %%  %s\n", s.percent, strings.TrimPrefix(s.of, "github.com/sallyport/sallyport/"))
	}
	fmt.Println()
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

package chaos

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

// testClients runs psql, pgbench and a Go program on pgx through each node.
func testClients(t *testing.T, s *suite) {
	pgbench, err := pgserver.Find("pgbench")
	s.must(t, err)
	if out, err := exec.CommandContext(t.Context(), pgbench, "-i", "-q", "-s", "1", s.PG.DSN("bench")).CombinedOutput(); err != nil {
		t.Fatalf("pgbench -i: %v\n%s", err, out)
	}
	s.must(t, s.PG.Exec(t.Context(), "bench", `
GRANT SELECT ON pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history TO app_ro;
GRANT SELECT, INSERT, UPDATE ON pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history TO app_rw`))
	for _, n := range s.Nodes {
		token := s.job(t, "clients-"+n.Name, "main", nil)
		t.Run("psql/"+n.Name, func(t *testing.T) { testPSQL(t, s, n, token) })
		for _, mode := range []string{"simple", "extended", "prepared"} {
			t.Run("pgbench/"+n.Name+"/"+mode, func(t *testing.T) { testPgbench(t, s, n, token, mode) })
		}
		t.Run("pgx/"+n.Name, func(t *testing.T) { testPGX(t, s, n, token) })
	}
}

func testPSQL(t *testing.T, s *suite, n *cluster.Node, token string) {
	cmd, err := n.Command(t.Context(), "psql", "bench", token, "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1")
	s.must(t, err)
	cmd.Stdin = strings.NewReader(fmt.Sprintf(`
SELECT 'plain ' || (1 + 1);
BEGIN;
INSERT INTO numbers VALUES ('psql-%[1]s', 1, 'in'), ('psql-%[1]s', 2, 'in');
SAVEPOINT a;
INSERT INTO numbers VALUES ('psql-%[1]s', 3, 'out');
ROLLBACK TO a;
COMMIT;
SELECT 'rows ' || count(*) FROM numbers WHERE client = 'psql-%[1]s';
\copy numbers FROM STDIN
psql-%[1]s	10	copied
psql-%[1]s	11	copied
\.
\copy (SELECT n, note FROM numbers WHERE client = 'psql-%[1]s' ORDER BY n) TO STDOUT
PREPARE p (bigint) AS SELECT 'prepared ' || note FROM numbers WHERE client = 'psql-%[1]s' AND n = $1;
EXECUTE p (10);
SELECT 'wide ' || length(repeat('x', 1000000));
`, n.Name))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	for _, want := range []string{"plain 2", "rows 2", "1\tin\n2\tin\n10\tcopied\n11\tcopied", "prepared copied", "wide 1000000"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("psql does not show %q:\n%s", want, out)
		}
	}
	if got := s.int(t, "bench", "SELECT count(*) FROM numbers WHERE client = $1", "psql-"+n.Name); got != 4 {
		t.Errorf("PostgreSQL holds %d rows, want 4", got)
	}
}

var processed = regexp.MustCompile(`number of transactions actually processed: (\d+)/(\d+)`)

func testPgbench(t *testing.T, s *suite, n *cluster.Node, token, mode string) {
	const clients, each = 4, 50
	run := func(args ...string) {
		t.Helper()
		cmd, err := n.Command(t.Context(), "pgbench", "bench", token,
			append([]string{"-n", "-M", mode, "-c", strconv.Itoa(clients), "-t", strconv.Itoa(each)}, args...)...)
		s.must(t, err)
		out, err := cmd.CombinedOutput()
		m := processed.FindStringSubmatch(string(out))
		if err != nil || m == nil || m[1] != strconv.Itoa(clients*each) || m[2] != m[1] {
			t.Fatalf("pgbench %v: %v\n%s", args, err, out)
		}
	}
	run("-S")
	const history = "SELECT count(*) FROM pgbench_history"
	before := s.int(t, "bench", history)
	run()
	if got := s.int(t, "bench", history) - before; got != clients*each {
		t.Errorf("pgbench reports %d transactions, PostgreSQL holds %d", clients*each, got)
	}
	// The invariant of the script: four tables tell of the same sum.
	if off := s.int(t, "bench", `SELECT (SELECT sum(abalance) FROM pgbench_accounts) - (SELECT sum(delta) FROM pgbench_history)
		+ (SELECT sum(tbalance) FROM pgbench_tellers) - (SELECT sum(bbalance) FROM pgbench_branches)`); off != 0 {
		t.Errorf("the balances differ by %d", off)
	}
}

func testPGX(t *testing.T, s *suite, n *cluster.Node, token string) {
	ctx := t.Context()
	client := "pgx-" + n.Name
	c, err := s.tryLogin(t, n, "bench", token, func(cfg *pgx.ConnConfig) { cfg.RuntimeParams["application_name"] = client })
	s.must(t, err)

	// The statement cache, no cache, and the simple protocol.
	for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
		for range 2 {
			rows, err := c.Query(ctx, "SELECT g, g::text, g::numeric / 4 FROM generate_series(1, $1::int) AS g", mode, 300)
			s.must(t, err)
			sum := 0
			for rows.Next() {
				var i int
				var text string
				var quarter float64
				s.must(t, rows.Scan(&i, &text, &quarter))
				if text != strconv.Itoa(i) || quarter != float64(i)/4 {
					t.Fatalf("%v: row %d is %q, %v", mode, i, text, quarter)
				}
				sum += i
			}
			if rows.Err() != nil || sum != 300*301/2 {
				t.Fatalf("%v: sum %d, %v", mode, sum, rows.Err())
			}
		}
	}

	// A named prepared statement.
	_, err = c.Prepare(ctx, "put", "INSERT INTO numbers VALUES ($1, $2, $3) RETURNING n")
	s.must(t, err)
	for i := range 20 {
		var got int
		s.must(t, c.QueryRow(ctx, "put", client, i, "prepared").Scan(&got))
		if got != i {
			t.Fatalf("inserted %d, returned %d", i, got)
		}
	}

	// A batch: pipelined, and one transaction; an error ends it whole.
	batch := &pgx.Batch{}
	for i := range 50 {
		batch.Queue("put", client, 100+i, "batch")
	}
	s.must(t, c.SendBatch(ctx, batch).Close())
	bad := &pgx.Batch{}
	bad.Queue("put", client, 500, "lost")
	bad.Queue("put", client, 100, "already there")
	bad.Queue("put", client, 501, "lost")
	refused(t, c.SendBatch(ctx, bad).Close(), "23505")

	// Transactions, committed and not.
	s.must(t, pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "put", client, 200, "tx")
		return err
	}))
	stop := errors.New("stop")
	if err := pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "put", client, 600, "lost"); err != nil {
			return err
		}
		return stop
	}); !errors.Is(err, stop) {
		t.Fatal(err)
	}

	// COPY FROM in the binary format.
	rows := make([][]any, 5000)
	for i := range rows {
		rows[i] = []any{client, 1000 + i, strings.Repeat("x", i%300)}
	}
	copied, err := c.CopyFrom(ctx, pgx.Identifier{"numbers"}, []string{"client", "n", "note"}, pgx.CopyFromRows(rows))
	if err != nil || copied != 5000 {
		t.Fatalf("COPY: %d rows, %v", copied, err)
	}
	if got := s.int(t, "bench", "SELECT count(*) FROM numbers WHERE client = $1", client); got != 20+50+1+5000 {
		t.Errorf("PostgreSQL holds %d rows", got)
	}
	if got := s.int(t, "bench", "SELECT count(*) FROM numbers WHERE client = $1 AND note = 'lost'", client); got != 0 {
		t.Errorf("%d rows of what failed are there", got)
	}

	// Parameters can be read in the recording; those in binary as hexadecimal.
	defer func() {
		s.must(t, c.Close(ctx))
		var replay string
		eventually(t, 20*time.Second, func() string {
			for _, r := range s.listRecordings(t, "--node", n.Name, "--kind", "session") {
				if r.Labels["application_name"] == client && r.Ending != nil {
					replay = s.cli(t, s.AdminEnv(), "recordings", "replay", r.Name, "--store", s.Recordings)
					return ""
				}
			}
			return "the recording is not complete"
		})
		for _, want := range []string{"$1 = " + client, "$2 = \\x00000000000000c8", "$3 = tx", "COPY 5000"} {
			if !strings.Contains(replay, want) {
				t.Errorf("the replay does not show %q", want)
			}
		}
		for line := range strings.Lines(replay) {
			if strings.Contains(line, "cut off") || strings.Contains(line, "not a message") {
				t.Errorf("the replay cannot show a message: %s", line)
			}
		}
	}()

	// A cancel request ends the query, not the session.
	done := make(chan error, 1)
	mark := "/* " + client + " */"
	go func() { done <- c.simple(ctx, "SELECT count(*) FROM generate_series(1, 2000000000) "+mark) }()
	s.awaitQueries(t, mark, 1)
	s.must(t, c.PgConn().CancelRequest(ctx))
	refused(t, <-done, "57014")
	var one int
	s.must(t, c.QueryRow(ctx, "SELECT 1").Scan(&one))

	// A context that ends takes the query with it, at PostgreSQL too.
	qctx, cancel := context.WithCancel(ctx)
	go func() {
		_, err := c.Exec(qctx, "SELECT count(*) FROM generate_series(1, 2000000000) "+mark)
		done <- err
	}()
	s.awaitQueries(t, mark, 1)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) && !isCancelled(err) {
		t.Errorf("the cancelled query: %v", err)
	}
	s.awaitQueries(t, mark, 0)
}

func isCancelled(err error) bool {
	var pe *pgconn.PgError
	return errors.As(err, &pe) && pe.Code == "57014"
}

// awaitQueries waits until so many queries with mark in them run at PostgreSQL.
func (s *suite) awaitQueries(t testing.TB, mark string, want int) {
	t.Helper()
	eventually(t, 10*time.Second, func() string {
		got := s.int(t, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND strpos(query, $1) > 0 AND pid <> pg_backend_pid()", mark)
		if got != want {
			return fmt.Sprintf("%d queries with %s run, want %d", got, mark, want)
		}
		return ""
	})
}

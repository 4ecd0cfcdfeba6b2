package chaos

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/chaos/cluster"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
	"github.com/sallyport/sallyport/recording"
)

// killTime is how long each node is under load before it is killed.
func killTime(t *testing.T) time.Duration {
	v := os.Getenv("SALLYPORT_CHAOS_TIME")
	if v == "" {
		return 2 * time.Second
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		t.Fatalf("SALLYPORT_CHAOS_TIME: %v", err)
	}
	return d / 3
}

// TestKill kills each node in turn under load. Clients write numbered rows and
// note what is acknowledged: each such row must be in PostgreSQL and each such
// statement in a recording that verifies. Clients of other nodes must not notice.
func TestKill(t *testing.T) {
	s := start(t, cluster.Options{})
	ctx := t.Context()
	pgbench, err := pgserver.Find("pgbench")
	s.must(t, err)
	if out, err := exec.CommandContext(ctx, pgbench, "-i", "-q", "-s", "1", s.PG.DSN("bench")).CombinedOutput(); err != nil {
		t.Fatalf("pgbench -i: %v\n%s", err, out)
	}
	s.must(t, s.PG.Exec(ctx, "bench", "GRANT SELECT, UPDATE, INSERT ON pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history TO app_rw"))

	acked := map[string]int{} // rows acknowledged, by client
	for round, victim := range s.Nodes {
		t.Logf("round %d: load on all nodes, then kill -9 of %s", round, victim.Name)
		loadCtx, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		var writers []*writer
		for _, n := range s.Nodes {
			for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeSimpleProtocol, pgx.QueryExecModeCacheStatement, pgx.QueryExecModeExec} {
				w := &writer{name: fmt.Sprintf("r%d-%s-%d", round, n.Name, mode), node: n, mode: mode}
				w.c = s.login(t, n, "bench", s.job(t, w.name, "main", nil))
				writers = append(writers, w)
				wg.Go(func() { w.run(loadCtx) })
			}
		}
		// pgbench at the same time, on the node to be killed.
		bench, err := victim.Command(ctx, "pgbench", "bench", s.job(t, fmt.Sprint("pgbench-", round), "main", nil), "-n", "-M", "prepared", "-c", "2", "-T", "3600")
		s.must(t, err)
		s.must(t, bench.Start())
		defer func() { _ = bench.Process.Kill() }()
		time.Sleep(killTime(t))
		victim.Kill()
		if err := bench.Wait(); err == nil {
			t.Error("pgbench did not notice that its node died")
		}
		for _, w := range writers {
			if w.node == victim {
				continue
			}
			// Acknowledgements go on to come.
			before := w.acknowledged()
			eventually(t, 5*time.Second, func() string {
				if w.acknowledged() < before+10 {
					return fmt.Sprintf("%s stands still after %s died", w.name, victim.Name)
				}
				return ""
			})
		}
		// Whoever lost the node goes to another with the same token.
		if out, err := s.Nodes[(round+1)%3].PSQL(ctx, "bench", s.job(t, fmt.Sprint("elsewhere-", round), "main", nil), "SELECT 'there'"); err != nil || !strings.Contains(out, "there") {
			t.Errorf("another node: %v: %s", err, out)
		}
		stop()
		wg.Wait()
		for _, w := range writers {
			acked[w.name] = w.n
			if w.node == victim {
				if w.err == nil {
					t.Errorf("%s did not notice that its node died", w.name)
				}
			} else if w.err != nil {
				t.Errorf("%s on %s was disturbed by the death of %s: %v", w.name, w.node.Name, victim.Name, w.err)
			}
			if w.n < 10 {
				t.Errorf("%s: %d rows acknowledged: too little load", w.name, w.n)
			}
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			_ = w.c.Close(ctx)
			cancel()
		}
		s.must(t, victim.Restart(ctx))
		s.must(t, s.WaitReady(ctx))
	}

	// A clean verification of everything, torn recordings completed included.
	for _, n := range s.Nodes {
		s.must(t, n.Terminate(ctx))
	}
	s.verify(t, s.Recordings)

	// Nothing acknowledged is missing, in PostgreSQL or in the recordings.
	crashed, rows := 0, 0
	for _, r := range s.listRecordings(t, "--kind", "session") {
		if r.Ending.Reason == "crash" {
			crashed++
		}
		name := strings.TrimPrefix(r.Subject, "ci/repo:acme/shop:job:")
		n, isWriter := acked[name]
		if !isWriter {
			continue
		}
		delete(acked, name)
		rows += n
		if got := s.int(t, "bench", "SELECT count(*) FROM numbers WHERE client = $1 AND n <= $2", name, n); got != n {
			t.Errorf("%s: %d of %d acknowledged rows are in PostgreSQL", name, got, n)
		}
		if more := s.int(t, "bench", "SELECT count(*) FROM numbers WHERE client = $1", name); more > n+1 {
			t.Errorf("%s: %d rows, %d of them acknowledged: more than the one on its way", name, more, n)
		}
		s.checkRecorded(t, r.Name, name, n, r.Ending.Reason == "crash")
	}
	for name, n := range acked {
		t.Errorf("there is no recording of %s, to which %d rows were acknowledged", name, n)
	}
	if crashed < 3*len(s.Nodes) {
		t.Errorf("%d recordings tell of a crash, want at least %d", crashed, 3*len(s.Nodes))
	}
	t.Logf("%d acknowledged rows, %d recordings cut by a crash", rows, crashed)
}

// checkRecorded checks that a recording has the statement, its decision, and
// its outcome, for rows 1 to n. Only the last outcome before a crash may be missing.
func (s *suite) checkRecorded(t *testing.T, recordingName, client string, n int, crashed bool) {
	t.Helper()
	type op struct{ permitted, ended bool }
	ops := map[uint64]*op{}
	at := func(id uint64) *op {
		if ops[id] == nil {
			ops[id] = &op{}
		}
		return ops[id]
	}
	rows := map[string]uint64{} // the number of each row -> operation
	bound := ""                 // the number that was bound last
	for _, e := range s.read(t, recordingName) {
		switch e.Type {
		case recording.Command:
			// A parameter is recorded with its Bind; the Execute after it runs it.
			if _, text, found := strings.Cut(string(e.Text)+string(e.Data), noteMark); found {
				bound, _, _ = strings.Cut(text, ";")
			}
			if e.Verb == "Query" || e.Verb == "Execute" {
				rows[bound] = e.Op
				bound = ""
			}
		case recording.Decided:
			at(e.Op).permitted = e.Effect == "permit"
		case recording.Outcome:
			at(e.Op).ended = e.Effect == "ok"
		}
	}
	missing, undecided, unended := 0, 0, 0
	for i := 1; i <= n; i++ {
		id, found := rows[fmt.Sprint(i)]
		switch {
		case !found:
			missing++
		case !at(id).permitted:
			undecided++
		case !at(id).ended && (i < n || !crashed): // its outcome may have been on the way to the record
			unended++
		}
	}
	if missing > 0 || undecided > 0 {
		t.Errorf("%s (%s): of %d acknowledged statements %d are not recorded and %d have no decision", recordingName, client, n, missing, undecided)
	}
	if unended > 0 {
		t.Errorf("%s (%s): of %d acknowledged statements %d have no outcome", recordingName, client, n, unended)
	}
}

// noteMark begins the note of each row, which ends with a semicolon, so that
// the number is found wherever a recording keeps it.
const noteMark = "note-"

// writer writes numbered rows, one at a time.
type writer struct {
	name string
	node *cluster.Node
	mode pgx.QueryExecMode
	c    *session

	mu  sync.Mutex
	n   int   // rows acknowledged: 1 to n
	err error // what ended it, if not its context
}

func (w *writer) run(ctx context.Context) {
	for i := 1; ctx.Err() == nil; i++ {
		// Not with ctx: a statement that is under way is waited for.
		qctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		tag, err := w.c.Exec(qctx, "INSERT INTO numbers VALUES ($1, $2, $3)", w.mode, w.name, i, fmt.Sprintf("%s%d;", noteMark, i))
		cancel()
		w.mu.Lock()
		if err == nil && tag.RowsAffected() != 1 {
			err = fmt.Errorf("acknowledged with %q", tag)
		}
		if err != nil {
			w.err = err
			w.mu.Unlock()
			return
		}
		w.n = i
		w.mu.Unlock()
	}
}

func (w *writer) acknowledged() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n
}

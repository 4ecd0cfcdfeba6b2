package scenario

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/chaos/check"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/upload"
)

// Result is what a run came to.
type Result struct {
	Fence   check.FenceReport
	Counts  map[string]int
	Live    []time.Duration   // of revoke, all nodes live, sorted
	Stopped []time.Duration   // of revoke, one node silent all the time, sorted
	Skipped map[string]string // faults that were not possible
	Lost    int               // packets the captures missed: what is said of the fence is then a lower bound
}

// finish heals everything, ends the load and holds what was written down
// against what is there. The error names each invariant that is violated.
func (w *World) finish(ctx context.Context) (*Result, error) {
	var errs []error
	add := func(err error) { errs = append(errs, err) }
	if err := w.heal(ctx); err != nil {
		w.load.stop()
		return w.result(), err // nothing else can be said
	}
	w.log.Print("ending the load")
	w.load.stop()
	if err := w.whole(ctx); err != nil {
		return w.result(), err
	}
	l := w.load

	logs, err := w.logs(ctx)
	if err != nil {
		return w.result(), err
	}
	short := map[string][]check.Event{}
	for name, events := range logs {
		for _, e := range events {
			short[name] = append(short[name], check.Event{Seq: e.Seq, Chain: e.Chain})
		}
	}
	add(check.Logs(short))
	var log []api.EventInfo
	for _, events := range logs {
		log = events
	}
	ops, changed := l.resolve(log)
	add(check.Once(l.changes, changed))
	add(check.Linearizable(ops))
	add(check.Leaders(l.leaders, l.terms))
	_, err = check.Fence(l.revs)
	add(err)
	if l.dull > 0 {
		add(fmt.Errorf("%d revoked sessions had carried nothing: the measurement is void", l.dull))
	}
	add(w.checkScratch(ctx))
	add(w.checkRows(ctx))

	w.log.Print("stopping the nodes, verifying the recordings")
	for _, n := range w.members() {
		tctx, cancel := context.WithTimeout(ctx, time.Minute)
		if err := n.Terminate(tctx); err != nil {
			add(fmt.Errorf("%s did not stop as asked: %w", n.Name, err))
		}
		cancel()
	}
	add(w.checkRecordings(ctx))
	return w.result(), errors.Join(errs...)
}

func (w *World) result() *Result {
	l := w.load
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &Result{Counts: l.counts, Skipped: w.skipped}
	r.Fence, _ = check.Fence(l.revs)
	for _, t := range l.times {
		switch {
		case t.allLive:
			r.Live = append(r.Live, t.took)
		case t.stopped == 1:
			r.Stopped = append(r.Stopped, t.took)
		}
	}
	slices.Sort(r.Live)
	slices.Sort(r.Stopped)
	for _, n := range w.nodes {
		r.Lost += n.capture.Lost()
	}
	return r
}

// checkRows looks for the acknowledged rows in PostgreSQL.
func (w *World) checkRows(ctx context.Context) error {
	conn, err := w.PG.Connect(ctx, "bench")
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, "SELECT client, n FROM numbers")
	if err != nil {
		return err
	}
	found := map[string]map[int]int{}
	for rows.Next() {
		var client string
		var n int
		if err := rows.Scan(&client, &n); err != nil {
			return err
		}
		put(found, client, n)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if err := check.Rows(w.load.ackedRows(), found); err != nil {
		return fmt.Errorf("in PostgreSQL: %w", err)
	}
	return nil
}

func put(found map[string]map[int]int, client string, n int) {
	if found[client] == nil {
		found[client] = map[int]int{}
	}
	found[client][n]++
}

// checkScratch checks that what was denied is there, and what was approved and
// acknowledged is gone.
func (w *World) checkScratch(ctx context.Context) error {
	conn, err := w.PG.Connect(ctx, "bench")
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var wrong []string
	for k, want := range w.load.kept {
		var n int
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM scratch WHERE n = $1", k).Scan(&n); err != nil {
			return err
		}
		if (n == 1) != want {
			wrong = append(wrong, fmt.Sprintf("row %d is there: %v", k, !want))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("an approval decides whether a statement runs: violated: %s", strings.Join(wrong, ", "))
	}
	return nil
}

// checkRecordings verifies every recording, and looks for each acknowledged
// row's statement in the recording of its session (I22).
func (w *World) checkRecordings(ctx context.Context) error {
	store, err := upload.Open(ctx, w.Recordings)
	if err != nil {
		return err
	}
	ca, err := os.ReadFile(w.CAFile)
	if err != nil {
		return err
	}
	trust := replay.Trust{Roots: x509.NewCertPool(), CheckNode: func(cert *x509.Certificate, node string) error {
		id, err := pki.ParseIdentity(cert)
		if err == nil && id.Name != node {
			err = fmt.Errorf("signed by %s", id.Name)
		}
		return err
	}}
	trust.Roots.AppendCertsFromPEM(ca)
	rep, err := replay.Verify(ctx, store, replay.VerifyOptions{Trust: trust})
	if err != nil {
		return err
	}
	w.log.Printf("%d recordings, %d verified, %d unfinished, %d broken", rep.Recordings, rep.Verified, rep.Unfinished, rep.Broken)
	if rep.Verified != rep.Recordings || !rep.OK() {
		var first []string
		for _, p := range rep.Problems[:min(len(rep.Problems), 10)] {
			first = append(first, fmt.Sprint(p))
		}
		return fmt.Errorf("all recordings are complete and verify: violated: of %d, %d verified, %d unfinished, %d broken:\n%s",
			rep.Recordings, rep.Verified, rep.Unfinished, rep.Broken, strings.Join(first, "\n"))
	}
	acked := w.load.ackedRows()
	found := map[string]map[int]int{}
	err = replay.List(ctx, store, replay.Filter{Kind: "session"}, func(s replay.Summary) error {
		client := strings.TrimPrefix(s.Header.Subject, subject(""))
		if _, ok := acked[client]; !ok {
			return s.Err
		}
		r, err := replay.Open(ctx, store, s.Name, trust)
		if err != nil {
			return err
		}
		for e, err := range r.Entries(ctx) {
			if err != nil {
				return err
			}
			if e.Type != recording.Command {
				continue
			}
			if _, text, ok := strings.Cut(string(e.Text)+string(e.Data), noteMark); ok {
				number, _, _ := strings.Cut(text, ";")
				if n, err := strconv.Atoi(number); err == nil && found[client][n] == 0 { // a parameter is there with its Bind
					put(found, client, n)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := check.Rows(acked, found); err != nil {
		return fmt.Errorf("in the recordings (I22): %w", err)
	}
	return nil
}

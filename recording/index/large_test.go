//go:build large

package index_test

import (
	"crypto/x509"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/index"
	"github.com/sallyport/sallyport/recording/recordingtest"
	"github.com/sallyport/sallyport/recording/recordingtest/recorder"
	"github.com/sallyport/sallyport/recording/recordingtest/s3server"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/upload"
)

var (
	count = flag.Int("recordings", 100_000, "how many sessions are recorded")
	spool = flag.String("spools", "", "directory for the spools, such as one of a tmpfs: their syncs are not what is measured")
	place = flag.String("store", "", "directory for the store, or s3 for a server of the test's own")
	parts = flag.String("parts", "record,read,scan", "what is done, so that recording and reading can be different runs on one -store: record, read, scan (what reads every recording)")
)

// TestLarge measures reading on many recordings of one day, made by the real
// writer. Memory is the heap that is in use at most, looked at every 50 ms.
func TestLarge(t *testing.T) {
	loc := *place
	switch loc {
	case "":
		loc = t.TempDir()
	case "s3":
		loc = s3server.Start(t).URL("large")
	}
	store, err := upload.Open(t.Context(), loc)
	if err != nil {
		t.Fatal(err)
	}
	const authority = "check/authority" // beside the recordings, for the next run
	needle := *count / 2
	if strings.Contains(*parts, "record") {
		ca := recordingtest.NewCA(t)
		if err := store.Put(t.Context(), authority, ca.Cert.Raw); err != nil {
			t.Fatal(err)
		}
		largeRecord(t, ca, store, needle)
	}
	der, err := store.Get(t.Context(), authority)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	trust := replay.Trust{Roots: x509.NewCertPool()}
	trust.Roots.AddCert(cert)
	find := func(what string, q index.Query, want int, stores ...recording.Store) {
		measure(t, what, func() string {
			n := 0
			st, err := index.Search(t.Context(), store, q, index.Options{Trust: trust, Index: stores}, func(*index.Hit) error { n++; return nil })
			if err != nil || n != want {
				t.Errorf("%s: %d hits, want %d; %v", what, n, want, err)
			}
			return fmt.Sprintf("%d hits of %d listed: %d looked up, %d scanned, %d read", n, st.Listed, st.LookedUp, st.Scanned, st.Read)
		})
	}
	text := index.Query{Text: "needle in the haystack"}
	if strings.Contains(*parts, "scan") {
		find("search a text, no index", text, 1)
		measure(t, "verify", func() string {
			rep, err := replay.Verify(t.Context(), store, replay.VerifyOptions{Trust: trust})
			if err != nil || !rep.OK() || rep.Verified != *count {
				t.Errorf("%v, %v", rep, err)
			}
			return fmt.Sprintf("%d bytes", rep.Bytes)
		})
	}
	if !strings.Contains(*parts, "read") {
		return
	}
	measure(t, "list", func() string {
		n, size := 0, int64(0)
		if err := replay.Items(t.Context(), store, time.Time{}, time.Time{}, func(i replay.Item) error { n++; size += i.Bytes(); return nil }); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%d recordings, %d bytes", n, size)
	})
	measure(t, "list with headers and trailers", func() string {
		n := 0
		if err := replay.List(t.Context(), store, replay.Filter{}, func(replay.Summary) error { n++; return nil }); err != nil || n != *count {
			t.Error(n, err)
		}
		return fmt.Sprint(n, " recordings")
	})
	measure(t, "index", func() string {
		rep, err := index.Build(t.Context(), store, index.BuildOptions{Trust: trust, Index: []recording.Store{store}, Write: store})
		if err != nil || len(rep.Broken) > 0 {
			t.Errorf("%+v %v", rep, err)
		}
		size := int64(0)
		_ = store.List(t.Context(), index.Root, "", func(o recording.Object) error { size += o.Size; return nil })
		return fmt.Sprintf("%d read, %d files written; %d bytes of index", rep.Read, rep.Written, size)
	})
	find("search a text", text, 1, store)
	find("search a subject", index.Query{Subject: fmt.Sprint("ci/job-", needle)}, 1, store)
	find("search a commit", index.Query{Commit: fmt.Sprintf("%040x", needle)[:40]}, 1, store)
	find("search a table and a decision", index.Query{Table: "haystack", Decision: "refuse"}, 1, store)
	find("search what is not there", index.Query{Text: "no such thing anywhere"}, 0, store)
}

func largeRecord(t *testing.T, ca *recordingtest.CA, store recording.Store, needle int) {
	measure(t, "record", func() string {
		var wg sync.WaitGroup
		const nodes = 4
		for n := range nodes {
			dir := ""
			if *spool != "" {
				var err error
				if dir, err = os.MkdirTemp(*spool, "spool"); err != nil {
					t.Fatal(err)
				}
				defer os.RemoveAll(dir)
			}
			r := recorder.Start(t, ca, fmt.Sprint("n", n), store, dir)
			wg.Go(func() {
				defer r.Close()
				var inner sync.WaitGroup
				for k := range 8 { // so that syncs are shared
					inner.Go(func() {
						rnd := rand.New(rand.NewPCG(uint64(n), uint64(k)))
						for i := n*8 + k; i < *count; i += nodes * 8 {
							large(r, rnd, i, i == needle)
							for r.Status().BytesWaiting > 256<<20 {
								time.Sleep(50 * time.Millisecond) // the store is slower than who records
							}
						}
					})
				}
				inner.Wait()
			})
		}
		wg.Wait()
		return fmt.Sprint(*count, " recordings")
	})
}

func large(r *recorder.Recorder, rnd *rand.Rand, i int, needle bool) {
	tables := []string{"users", "orders", "items", "invoices", "pages", "events", "carts", "stock"}
	table := tables[rnd.IntN(len(tables))]
	h := recording.Header{
		Session: fmt.Sprintf("s%016x", rnd.Uint64()), Started: started, Subject: fmt.Sprint("ci/job-", i), SubjectKind: "Workload",
		Target: "prod", Database: "shop", Protocol: "postgres", Client: "10.0.0.1", PolicyIndex: 7,
		Claims: map[string]any{"repository": fmt.Sprint("acme/repo-", i%500), "sha": fmt.Sprintf("%040x", i), "ref": "refs/heads/main", "run_id": fmt.Sprint(i), "actor": "dana"},
	}
	entries := recorder.Statement(1, fmt.Sprintf("SELECT id, name, total FROM %s WHERE id = %d AND state = 'open' ORDER BY total", table, rnd.IntN(1e6)), "permit", "ci-work", "postgres:select prod.shop.public."+table)
	entries = append(entries, recorder.Statement(2, fmt.Sprintf("UPDATE %s SET state = 'done', changed = now() WHERE id = %d", table, rnd.IntN(1e6)), "permit", "ci-work", "postgres:update prod.shop.public."+table)...)
	if needle {
		entries = append(entries, recorder.Statement(3, "DROP TABLE haystack -- the needle  in the HAYSTACK", "refuse", "no-drop", "postgres:drop_table prod.shop.public.haystack")...)
	}
	r.Session(h, entries...)
}

func measure(t *testing.T, what string, f func() string) {
	t.Helper()
	runtime.GC()
	var most atomic.Uint64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most.Store(max(most.Load(), m.HeapInuse))
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	began := time.Now()
	told := f()
	took := time.Since(began)
	close(stop)
	<-stopped
	t.Logf("%-32s %9v  %4d MiB  %s", what, took.Round(time.Millisecond), most.Load()>>20, told)
}

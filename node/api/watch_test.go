package api

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/spool"
)

// live is a recorder of one session, "live", whose entries the test sets.
type live struct {
	mu      sync.Mutex
	entries []recording.Entry
	ending  *recording.Ending
	calls   int
}

func (l *live) Tail(_ context.Context, session string, c spool.Cursor, max, _ int) (*spool.Part, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls++
	if session != "live" {
		return nil, spool.ErrNotLive
	}
	p := &spool.Part{Next: c, Name: "2026/11/28/live"}
	for _, e := range l.entries[min(int(c.LSN), len(l.entries)):] {
		if len(p.Entries) == max {
			p.More = true
			return p, nil
		}
		p.Entries = append(p.Entries, e)
		p.Next.LSN = e.LSN
	}
	p.Ending = l.ending
	return p, nil
}

func (l *live) add(n int, ending *recording.Ending) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range n {
		l.entries = append(l.entries, recording.Entry{LSN: recording.LSN(len(l.entries) + 1), Type: recording.Note})
	}
	l.ending = ending
}

func TestWatch(t *testing.T) {
	r := newRig(t)
	r.permit[policy.SessionsWatch] = true
	ask := func(query string) (int, Watched, string) {
		code, body := r.call("GET", "/v1/sessions/live/watch?"+query, "", true)
		var v Watched
		if code == http.StatusOK {
			if err := json.Unmarshal([]byte(body), &v); err != nil {
				t.Fatal(err, body)
			}
		}
		return code, v, body
	}
	began := time.Now()
	if code, v, body := ask("wait=300ms"); code != http.StatusOK || len(v.Entries) != 0 || time.Since(began) < 300*time.Millisecond {
		t.Fatalf("nothing to come: %d %s after %v", code, body, time.Since(began))
	}
	time.AfterFunc(150*time.Millisecond, func() { r.live.add(2, nil) })
	time.AfterFunc(300*time.Millisecond, func() { r.live.add(1, nil) })
	_, v, _ := ask("wait=20s")
	if len(v.Entries) != 3 || v.After != 3 || v.Node != r.Node || v.Ending != nil {
		t.Fatalf("entries are gathered for a moment: %+v", v)
	}
	r.live.add(watchEntries+10, nil)
	if _, v, _ = ask("wait=20s&after=3"); len(v.Entries) != watchEntries {
		t.Fatalf("%d entries in one answer", len(v.Entries))
	}
	if _, v, _ = ask("after=503"); len(v.Entries) != 10 {
		t.Fatalf("%d entries", len(v.Entries))
	}
	time.AfterFunc(100*time.Millisecond, func() { r.live.add(1, &recording.Ending{Reason: "closed"}) })
	if _, v, _ = ask("wait=20s&after=513"); len(v.Entries) != 1 || v.Ending == nil {
		t.Fatalf("the end: %+v", v)
	}
	for query, want := range map[string]string{"after=x": "after", "segment=-1": "segment"} {
		if code, _, body := ask(query); code != http.StatusBadRequest || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s", query, code, body)
		}
	}
	if code, body := r.call("GET", "/v1/sessions/gone/watch", "", true); code != http.StatusNotFound || !strings.Contains(body, "recordings") {
		t.Errorf("a session that is not live: %d %s", code, body)
	}
	if code, body := r.call("GET", "/v1/sessions/..%2fx/watch", "", true); code != http.StatusBadRequest {
		t.Errorf("a name that is none: %d %s", code, body)
	}
	// Waiting is bounded, in number and in time.
	r.live.add(0, nil)
	for range maxWatchers {
		r.watchers <- struct{}{}
	}
	if code, _, body := ask("wait=20s&after=514"); code != http.StatusServiceUnavailable {
		t.Errorf("one more than may wait: %d %s", code, body)
	}
}

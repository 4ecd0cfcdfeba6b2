package state

import (
	"fmt"
	"log/slog"
	"runtime"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

// What folding an event costs hardly depends on how many there were: whoever
// copies something as large as the state allocates twenty times as much after
// 20,000 as after 1,000. Bytes are counted, not time.
func TestFoldCostDoesNotGrow(t *testing.T) {
	const sample = 300
	undone := func(n int) (events []event.Event) {
		// All of one subject, undone from the newest to the oldest.
		s := &script{t: t}
		for i := range n {
			events = append(events, s.revoked(fmt.Sprint(i), event.Scope{Kind: event.ScopeSubject, Value: "ci/x"}))
		}
		for i := range n {
			events = append(events, s.undone(fmt.Sprint(n-1-i)))
		}
		return events
	}
	waiting := func(n int) (events []event.Event) {
		// None is fenced before all are there, and then a half.
		s := &script{t: t}
		for i := range n {
			events = append(events, s.revoked(fmt.Sprint(i), event.Scope{Kind: event.ScopeSession, Value: fmt.Sprint(i)}))
		}
		for i := range n / 2 {
			id := fmt.Sprint(i)
			events = append(events, s.event(event.TypeRevocationFenced, "revocation/"+id, event.RevocationFenced{ID: id}))
		}
		return events
	}
	claims := func(n int) (events []event.Event) {
		s := &script{t: t}
		for i := range n {
			events = append(events, s.revoked(fmt.Sprint(i), event.Scope{Kind: event.ScopeClaim, Name: "run_id", Value: fmt.Sprint(i)}))
		}
		return events
	}
	approvals := func(n int) (events []event.Event) {
		// None of them is ever over, so none is dropped.
		s := &script{t: t}
		for i := range n {
			id := fmt.Sprint(i)
			events = append(events, s.event(event.TypeApprovalAsked, "approval/"+id, event.ApprovalAsked{ID: id, Count: 1, Expires: epoch.Add(1e6 * time.Second)}))
			if i%2 == 0 {
				events = append(events, s.event(event.TypeApprovalVoted, "approval/"+id, event.ApprovalVoted{ID: id, Approver: "sso/a", Approve: true}))
			}
		}
		return events
	}
	tokens := func(n int) (events []event.Event) {
		s := &script{t: t}
		for i := range n {
			id := fmt.Sprint(i)
			events = append(events, s.event(event.TypeJoinTokenMade, "jointoken/"+id, event.JoinTokenMade{ID: id, Expires: epoch.Add(1e6 * time.Second)}))
		}
		return events
	}
	for _, c := range []struct {
		name      string
		few, many int
		events    func(n int) []event.Event
	}{
		{"revoked and fenced", 1_000, 20_000, func(n int) []event.Event { return manyRevocations(t, n) }},
		{"fenced late", 600, 6_000, waiting}, {"undone", 600, 6_000, undone}, {"claims", 600, 6_000, claims},
		{"approvals", 600, 6_000, approvals}, {"join tokens", 600, 6_000, tokens},
	} {
		t.Run(c.name, func(t *testing.T) {
			// Bytes for each of the last events: of many, so that what is done once
			// in a while is spread over those it is done for.
			cost := func(n int) float64 {
				events := c.events(n)
				p := New(slog.New(slog.DiscardHandler))
				at := len(events) - sample
				if err := p.Fold(events[:at]); err != nil {
					t.Fatal(err)
				}
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				for i := range sample {
					if err := p.Fold(events[at+i : at+i+1]); err != nil {
						t.Fatal(err)
					}
				}
				runtime.ReadMemStats(&after)
				return float64(after.TotalAlloc-before.TotalAlloc) / sample
			}
			few, many := c.few, c.many
			small, large := cost(few), cost(many)
			t.Logf("%.0f bytes for an event after %d, %.0f after %d", small, few, large, many)
			if large > 3*small {
				t.Errorf("%.0f bytes for an event after %d, %.0f after %d: folding copies what there is", small, few, large, many)
			}
		})
	}
}

// What an event folds to was not in an earlier View, whatever they share.
func TestEarlierViewsStay(t *testing.T) {
	p := New(slog.New(slog.DiscardHandler))
	type then struct {
		v        *View
		unfenced int
		fenced   int
	}
	var views []then
	count := func(v *View) (unfenced, fenced int) {
		for r := range v.Unfenced(0) {
			if r.Fenced != nil {
				t.Fatal("a fenced one is unfenced")
			}
			unfenced++
		}
		for r := range v.Revocations.Values() {
			if r.Fenced != nil {
				fenced++
			}
		}
		return unfenced, fenced
	}
	// All are revoked before the first is fenced, and then fenced from the newest on.
	s := &script{t: t}
	var order []event.Event
	for i := range 500 {
		order = append(order, s.revoked(fmt.Sprint(i), event.Scope{Kind: event.ScopeSession, Value: fmt.Sprint(i)}))
	}
	for i := range 500 {
		id := fmt.Sprint(499 - i)
		order = append(order, s.event(event.TypeRevocationFenced, "revocation/"+id, event.RevocationFenced{ID: id}))
	}
	for i, e := range order {
		v := mustFold(t, p, e)
		unfenced, fenced := count(v)
		want := i + 1
		if i >= 500 {
			want = 999 - i
		}
		if unfenced != want || v.Revocations.Len()-fenced != want {
			t.Fatalf("after %d events: %d unfenced, %d fenced of %d", i+1, unfenced, fenced, v.Revocations.Len())
		}
		views = append(views, then{v, unfenced, fenced})
	}
	for i, w := range views {
		if unfenced, fenced := count(w.v); unfenced != w.unfenced || fenced != w.fenced {
			t.Fatalf("the view after %d events has changed: %d, %d; was %d, %d", i+1, unfenced, fenced, w.unfenced, w.fenced)
		}
	}
	if v := views[499].v; v.Refuses(&Bearer{Session: "0"}) == nil {
		t.Fatal("not refused")
	}
	var from []string
	for r := range views[499].v.Unfenced(499) {
		from = append(from, r.ID)
	}
	if len(from) != 2 || from[0] != "498" || from[1] != "499" {
		t.Fatal(from)
	}
}

// Approvals and join tokens that are over go, the oldest first; others stay.
func TestEndedAreDropped(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	old := epoch.Add(time.Second) // over when the next event comes
	long := epoch.Add(1e6 * time.Second)
	put := func(id string, expires time.Time) *View {
		return mustFold(t, p,
			s.event(event.TypeApprovalAsked, "approval/"+id, event.ApprovalAsked{ID: id, Count: 1, Expires: expires}),
			s.event(event.TypeJoinTokenMade, "jointoken/"+id, event.JoinTokenMade{ID: id, Expires: expires.Add(time.Duration(s.seq))}))
	}
	put("waits", long)
	var v *View
	for i := range 3*keepEnded + 100 {
		v = put(fmt.Sprint(i), old)
		if n := v.Approvals.Len(); n > 2*keepEnded+1 || v.JoinTokens.Len() > 2*keepEnded+1 {
			t.Fatalf("%d approvals, %d join tokens", n, v.JoinTokens.Len())
		}
	}
	if v.Approvals.Get("waits") == nil || v.JoinTokens.Get("waits").ID == "" {
		t.Fatal("one that is not over is gone")
	}
	for i := range keepEnded { // the newest are there
		id := fmt.Sprint(3*keepEnded + 99 - i)
		if v.Approvals.Get(id) == nil || v.JoinTokens.Get(id).ID == "" {
			t.Fatalf("%s is gone, the %dth newest", id, i+1)
		}
	}
	if v.Approvals.Get("0") != nil {
		t.Fatal("the oldest is there")
	}
}

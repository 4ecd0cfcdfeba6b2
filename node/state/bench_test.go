package state

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

// manyRevocations are n revocations of sessions, subjects and tokens in turn,
// each followed by its revocation.fenced.
func manyRevocations(t testing.TB, n int) []event.Event {
	s := &script{t: t}
	kinds := []event.ScopeKind{event.ScopeSession, event.ScopeSubject, event.ScopeToken}
	nodes := []event.NodeFenced{{Node: "n1", State: event.FenceConfirmed}, {Node: "n2", State: event.FenceConfirmed}, {Node: "n3", State: event.FenceConfirmed}}
	var out []event.Event
	for i := range n {
		id := fmt.Sprintf("%010x", i)
		out = append(out, s.revoked(id, event.Scope{Kind: kinds[i%3], Value: fmt.Sprint("p/", i)}),
			s.event(event.TypeRevocationFenced, "revocation/"+id, event.RevocationFenced{ID: id, Nodes: nodes}))
	}
	return out
}

// Folding 10,000 revocations and their ends, one event at a time as they come
// from a busy leader.
func BenchmarkFold10000(b *testing.B) {
	events := manyRevocations(b, 10_000)
	for b.Loop() {
		p := New(slog.New(slog.DiscardHandler))
		for i := range events {
			if err := p.Fold(events[i : i+1]); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// What each decision asks, with 10,000 revocations in force.
func BenchmarkRefuses(b *testing.B) {
	p := New(slog.New(slog.DiscardHandler))
	if err := p.Fold(manyRevocations(b, 10_000)); err != nil {
		b.Fatal(err)
	}
	v := p.View()
	none, hit := job(time.Now()), job(time.Now())
	hit.Subject = "p/1"
	for _, c := range []struct {
		name   string
		bearer *Bearer
		refuse bool
	}{{"none", none, false}, {"hit", hit, true}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if (v.Refuses(c.bearer) != nil) != c.refuse {
					b.Fatal("wrong")
				}
			}
		})
	}
}

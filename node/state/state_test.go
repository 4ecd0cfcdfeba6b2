package state

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// script makes consecutive events, one second apart.
type script struct {
	t   testing.TB
	seq uint64
	ver map[string]uint64
}

func (s *script) event(typ, aggregate string, payload any) event.Event {
	s.t.Helper()
	data, err := json.Marshal(payload)
	if err != nil {
		s.t.Fatal(err)
	}
	if s.ver == nil {
		s.ver = map[string]uint64{}
	}
	s.seq++
	s.ver[aggregate]++
	return event.Event{
		Proposal: event.Proposal{Type: typ, Version: 1, Aggregate: aggregate, Payload: data},
		Seq:      s.seq, Index: s.seq + 10, Time: epoch.Add(time.Duration(s.seq) * time.Second), AggregateVersion: s.ver[aggregate],
	}
}

func mustFold(t *testing.T, p *Projection, events ...event.Event) *View {
	t.Helper()
	if err := p.Fold(events); err != nil {
		t.Fatal(err)
	}
	return p.View()
}

func TestApprovalStates(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	ask := event.ApprovalAsked{ID: "r", Subject: "ci/x", Count: 2, Expires: epoch.Add(time.Hour), Digest: []byte("d")}
	v := mustFold(t, p, s.event(event.TypeApprovalAsked, "approval/r", ask))
	now := epoch.Add(time.Minute)
	state := func(want string) {
		t.Helper()
		if got := p.View().Approvals.Get("r").State(now); got != want {
			t.Fatalf("state %s, want %s", got, want)
		}
	}
	state("pending")
	before := v.Approvals.Get("r")
	vote := func(who string, approve bool) {
		mustFold(t, p, s.event(event.TypeApprovalVoted, "approval/r", event.ApprovalVoted{ID: "r", Approver: who, Approve: approve}))
	}
	vote("sso/a", true)
	vote("sso/a", true) // the same person twice is one approver
	state("pending")
	if len(before.Votes) != 0 {
		t.Fatal("a view changed after it was handed out")
	}
	vote("sso/b", true)
	state("approved")
	if got := p.View().Approvals.Get("r").State(epoch.Add(2 * time.Hour)); got != "expired" {
		t.Fatalf("after its expiry: %s", got)
	}
	vote("sso/c", false)
	state("denied")
	mustFold(t, p, s.event(event.TypeApprovalEnded, "approval/r", event.ApprovalEnded{ID: "r", How: "cancelled"}))
	state("cancelled")
}

func TestFoldRefusesGapsAndStrangers(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	s.seq = 1
	if err := p.Fold([]event.Event{s.event(event.TypeRevoked, "revocation/a", event.Revoked{})}); err == nil {
		t.Fatal("an event with a gap before it was folded")
	}
	s.seq = 0
	if err := p.Fold([]event.Event{s.event("what.is.this", "x", struct{}{})}); err == nil {
		t.Fatal("an unknown event was skipped")
	}
	if p.View().Seq != 0 {
		t.Fatal("a failed fold changed the view")
	}
}

// An unreadable configuration leaves no configuration: nobody may connect.
func TestBadConfigurationFailsClosed(t *testing.T) {
	p, s := New(slog.New(slog.DiscardHandler)), &script{t: t}
	v := mustFold(t, p, s.event(event.TypeConfigApplied, "config", event.ConfigApplied{Files: []event.ConfigFile{{Path: "x.cedar", Data: []byte("permit(")}}}))
	if v.Config != nil || v.ConfigErr == nil || v.ConfigIndex == 0 {
		t.Fatalf("config %v, err %v", v.Config, v.ConfigErr)
	}
}

// Every type and version that was ever stored can be folded.
func TestFoldsEveryFixture(t *testing.T) {
	n := 0
	for _, typ := range event.Types() {
		for version := uint32(1); version <= event.Newest(typ); version++ {
			stored, err := os.ReadFile(filepath.Join("..", "..", "raftstore", "event", "testdata", "fixtures", fmt.Sprintf("%s.v%d.envelope", typ, version)))
			if err != nil {
				t.Fatal(err)
			}
			envelope, err := hex.DecodeString(strings.TrimSpace(string(stored)))
			if err != nil {
				t.Fatal(err)
			}
			e, err := event.UnmarshalEnvelope(envelope)
			if err != nil {
				t.Fatal(err)
			}
			mustFold(t, New(slog.New(slog.DiscardHandler)), e)
			n++
		}
	}
	if n < 13 {
		t.Fatalf("only %d fixtures", n)
	}
}

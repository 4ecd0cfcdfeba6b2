package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

// kept is a Source in memory that counts what is read.
type kept struct {
	events []event.Event
	read   int
}

func (k *kept) Event(seq uint64) (event.Event, error) {
	if seq == 0 || seq > uint64(len(k.events)) {
		return event.Event{}, errors.New("no such event")
	}
	k.read++
	return k.events[seq-1], nil
}

func (k *kept) Aggregates(prefix string, seq uint64, fn func(string, uint64) bool) error {
	last := map[string]uint64{}
	var names []string
	for _, e := range k.events[:seq] {
		if strings.HasPrefix(e.Aggregate, prefix) {
			if last[e.Aggregate] == 0 {
				names = append(names, e.Aggregate)
			}
			last[e.Aggregate] = e.Seq
		}
	}
	slices.Sort(names)
	for _, n := range names {
		if !fn(n, last[n]) {
			break
		}
	}
	return nil
}

func (k *kept) History(aggregate string, seq uint64, fn func(uint64) bool) error {
	for _, e := range slices.Backward(k.events[:seq]) {
		if e.Aggregate == aggregate && !fn(e.Seq) {
			break
		}
	}
	return nil
}

// The state as of any event is what was folded then.
func TestAt(t *testing.T) {
	const policies = `permit(principal, action == Action::"admin:apply", resource);`
	s, src, p := &script{t: t}, &kept{}, New(slog.New(slog.DiscardHandler))
	rng := rand.New(rand.NewPCG(1, 1))
	put := func(typ, aggregate string, payload any) {
		src.events = append(src.events, s.event(typ, aggregate, payload))
	}
	put(event.TypeClusterCreated, "cluster", event.ClusterCreated{ID: "c", CAKey: event.Sealed("k"), Node: event.NodeInfo{Name: "n1"}})
	for i := range 300 {
		id := fmt.Sprint(rng.IntN(12))
		switch rng.IntN(13) {
		case 0:
			put(event.TypeNodeJoined, "node/n"+id, event.NodeJoined{Node: event.NodeInfo{Name: "n" + id, Addr: fmt.Sprint("a", i)}})
		case 1:
			put(event.TypeNodeRemoved, "node/n"+id, event.NodeRemoved{Name: "n" + id})
		case 2:
			put(event.TypeConfigApplied, "config", event.ConfigApplied{Files: []event.ConfigFile{{Path: "a.cedar", Data: fmt.Append([]byte(policies), " // ", i)}}, Digest: fmt.Sprint(i)})
		case 3:
			put(event.TypeRevoked, "revocation/"+fmt.Sprint(i), event.Revoked{ID: fmt.Sprint(i), Subject: "ci/" + id, Reason: "r"})
		case 4, 5:
			for rid := range p.View().Revocations.All() {
				put(event.TypeRevocationUndone, "revocation/"+rid, event.RevocationUndone{ID: rid, Reason: "r"})
				break
			}
		case 6:
			put(event.TypeApprovalAsked, "approval/"+fmt.Sprint(i), event.ApprovalAsked{ID: fmt.Sprint(i), Count: 1, Expires: epoch.Add(time.Hour)})
		case 7, 8:
			for aid := range p.View().Approvals.All() {
				put(event.TypeApprovalVoted, "approval/"+aid, event.ApprovalVoted{ID: aid, Approver: "sso/" + id, Approve: true})
				break
			}
		case 9:
			for aid := range p.View().Approvals.All() {
				put(event.TypeApprovalEnded, "approval/"+aid, event.ApprovalEnded{ID: aid, How: "used"})
				break
			}
		case 10:
			put(event.TypeJoinTokenMade, "jointoken/"+fmt.Sprint(i), event.JoinTokenMade{ID: fmt.Sprint(i), Expires: epoch})
		case 11:
			put(event.TypeCheckpoint, "checkpoint", event.CheckpointCosigned{Size: uint64(i)})
		case 12:
			put(event.TypeSecretsSealed, "config", event.SecretsSealed{})
		}
		if n := p.View().Seq; n < uint64(len(src.events)) {
			mustFold(t, p, src.events[n:]...)
			if i%5 == 0 { // each costs as much as all before it
				compareView(t, src, p.View())
			}
		}
	}
	if p.View().Seq < 200 || p.View().Revocations.Len() < 5 || p.View().Approvals.Len() < 5 {
		t.Fatal("the script does too little")
	}
	if v, err := At(t.Context(), src, 0); err != nil || v.Seq != 0 || v.Nodes == nil {
		t.Fatalf("before the first event: %+v, %v", v, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := At(ctx, src, 100); !errors.Is(err, context.Canceled) {
		t.Fatalf("nobody waits: %v", err)
	}
}

func compareView(t *testing.T, src *kept, then *View) {
	t.Helper()
	got, err := At(t.Context(), src, then.Seq)
	if err != nil {
		t.Fatal(err)
	}
	want := *then
	want.CAKey, want.Keys, want.Secrets, want.SealedTo, want.tolerances = nil, nil, nil, nil, nil
	digest := func(v *View) string {
		if v.Config == nil {
			return fmt.Sprint(v.ConfigErr)
		}
		return v.Config.Digest
	}
	if digest(got) != digest(&want) {
		t.Fatalf("as of event %d: configuration %s, want %s", then.Seq, digest(got), digest(&want))
	}
	got.Config, want.Config, got.ConfigErr, want.ConfigErr = nil, nil, nil, nil
	if !reflect.DeepEqual(got, &want) {
		g, _ := json.Marshal(got)
		w, _ := json.Marshal(&want)
		t.Fatalf("as of event %d:\n%s\nwant\n%s", then.Seq, g, w)
	}
}

// What it reads depends on what there was, not on how much has happened.
func TestAtReadsLittle(t *testing.T) {
	s, src := &script{t: t}, &kept{}
	put := func(typ, aggregate string, payload any) {
		src.events = append(src.events, s.event(typ, aggregate, payload))
	}
	put(event.TypeClusterCreated, "cluster", event.ClusterCreated{ID: "c"})
	for i := range 4 * keepEnded {
		id := fmt.Sprint(i)
		put(event.TypeApprovalAsked, "approval/"+id, event.ApprovalAsked{ID: id, Count: 1, Expires: epoch})
		put(event.TypeConfigApplied, "config", event.ConfigApplied{})
		put(event.TypeCheckpoint, "checkpoint", event.CheckpointCosigned{})
	}
	v, err := At(t.Context(), src, uint64(len(src.events)))
	if err != nil {
		t.Fatal(err)
	}
	if v.Approvals.Len() < keepEnded || v.Approvals.Len() > 2*keepEnded || v.Approvals.Get(fmt.Sprint(4*keepEnded-1)) == nil {
		t.Fatalf("%d approvals", v.Approvals.Len())
	}
	if src.read > 2*keepEnded+10 {
		t.Fatalf("read %d events of %d", src.read, len(src.events))
	}
}

package api

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

func TestRoomToAsk(t *testing.T) {
	r := newRig(t)
	ask := func(id, subject string, end bool) {
		t.Helper()
		propose := func(typ string, payload any) {
			data, err := json.Marshal(payload)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.append(t.Context(), nil, event.Proposal{ID: event.NewID(), Actor: event.Actor{Principal: "n1", Kind: event.Node}, Type: typ, Version: 1, Aggregate: "approval/" + id, Expect: event.Any, Payload: data}); err != nil {
				t.Fatal(err)
			}
		}
		propose(event.TypeApprovalAsked, event.ApprovalAsked{ID: id, Subject: subject, Count: 1, Expires: time.Now().Add(time.Hour)})
		if end {
			propose(event.TypeApprovalEnded, event.ApprovalEnded{ID: id, How: "cancelled"})
		}
	}
	for i := range maxPendingSubject {
		if err := r.roomToAsk("ci/a"); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		ask(fmt.Sprint("a", i), "ci/a", false)
	}
	if err := r.roomToAsk("ci/a"); err == nil || !strings.Contains(err.Error(), "wait for approval already") {
		t.Fatalf("one too many waiting: %v", err)
	}
	for i := range maxAskedSubject {
		if err := r.roomToAsk("ci/b"); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		ask(fmt.Sprint("b", i), "ci/b", true)
	}
	if err := r.roomToAsk("ci/b"); err == nil || !strings.Contains(err.Error(), "within") {
		t.Fatalf("asking and leaving without end: %v", err)
	}
	if err := r.roomToAsk("ci/c"); err != nil {
		t.Fatalf("somebody else: %v", err)
	}
}

package api

import (
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/storetest"
)

func TestPosition(t *testing.T) {
	r := newRig(t)
	r.permit[policy.Revoke], r.permit[policy.StatusRead] = true, true
	do := func(method, path, body, position string) *httptest.ResponseRecorder {
		req := httptest.NewRequest(method, path, strings.NewReader(body))
		req.Header.Set("Authorization", "Bearer x")
		if position != "" {
			req.Header.Set(PositionHeader, position)
		}
		w := httptest.NewRecorder()
		r.Handler().ServeHTTP(w, req)
		return w
	}
	w := do("POST", "/v1/revocations", `{"subject":"ci/x","reason":"y"}`, "")
	seq, err := strconv.ParseUint(w.Header().Get(PositionHeader), 10, 64)
	if w.Code != http.StatusOK || err != nil || seq == 0 {
		t.Fatalf("%d %s: position %q", w.Code, w.Body, w.Header().Get(PositionHeader))
	}
	for _, position := range []string{strconv.FormatUint(seq, 10), Newest} {
		w := do("GET", "/v1/revocations", "", position)
		if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "ci/x") {
			t.Errorf("a read at %s: %d %s", position, w.Code, w.Body)
		}
	}
	for _, position := range []string{"-1", "soon", "1e3"} {
		if w := do("GET", "/v1/revocations", "", position); w.Code != http.StatusBadRequest {
			t.Errorf("a read at %q: %d %s", position, w.Code, w.Body)
		}
	}

	// A read at an event to come is answered when it has come.
	head, _, _ := r.Store.Head()
	answer := make(chan *httptest.ResponseRecorder, 1)
	next := strconv.FormatUint(head+1, 10)
	go func() { answer <- do("GET", "/v1/revocations", "", next) }()
	select {
	case w := <-answer:
		t.Fatalf("a read at an event that does not exist: %d %s", w.Code, w.Body)
	case <-time.After(50 * time.Millisecond):
	}
	ended := storetest.Proposal("approval/1", event.Any, `{"id":"1","how":"expired"}`)
	ended.Type = event.TypeApprovalEnded
	if _, err := r.Store.Append(t.Context(), ended); err != nil {
		t.Fatal(err)
	}
	if w := <-answer; w.Code != http.StatusOK {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	head, _, _ = r.Store.Head()
	if w := do("GET", "/v1/revocations", "", strconv.FormatUint(head+1000, 10)); w.Code != http.StatusServiceUnavailable {
		t.Errorf("a read at an event that does not come: %d %s", w.Code, w.Body)
	}
}

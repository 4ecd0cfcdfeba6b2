package api

import (
	"errors"
	"reflect"
	"testing"
)

func TestAgree(t *testing.T) {
	down := errors.New("no answer")
	for _, c := range []struct {
		name            string
		current, wanted uint32
		offers          map[string]Offer
		level           uint32
		heldBack        []string
	}{
		{"all", 1, 2, map[string]Offer{"a": {2, nil}, "b": {3, nil}}, 2, nil},
		{"one build of before", 1, 2, map[string]Offer{"a": {2, nil}, "b": {0, nil}}, 1, []string{"b supports 1"}},
		{"one step of two", 1, 3, map[string]Offer{"a": {3, nil}, "b": {2, nil}}, 2, []string{"b supports 2"}},
		{"one is down", 1, 3, map[string]Offer{"a": {3, nil}, "b": {0, down}, "c": {2, nil}}, 1, []string{"b does not answer", "c supports 2"}},
		{"nothing to raise", 2, 2, map[string]Offer{"a": {2, nil}, "b": {0, down}}, 2, nil},
		{"never down", 3, 3, map[string]Offer{"a": {1, nil}}, 3, nil},
		{"the leader is older", 2, 1, map[string]Offer{"a": {2, nil}}, 2, nil},
	} {
		level, heldBack := Agree(c.current, c.wanted, c.offers)
		if level != c.level || !reflect.DeepEqual(heldBack, c.heldBack) {
			t.Errorf("%s: %d %q, want %d %q", c.name, level, heldBack, c.level, c.heldBack)
		}
	}
}

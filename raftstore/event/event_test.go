package event

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

var sample = Proposal{
	ID:    ID{1, 2, 3},
	Actor: Actor{Principal: "https://issuer.example#repo:a/b", Kind: Service, Authn: "oidc", CertFP: "ab", Source: "192.0.2.1:5", Via: "n1"},
	Type:  TypeApprovalAsked, Version: 1, Aggregate: "approval/1", Expect: 0,
	Payload: []byte(`{"id":"1"}`), Cause: ID{9},
}

func TestProposalRoundTrip(t *testing.T) {
	minimal := Proposal{ID: ID{1}, Type: TypeRevoked, Version: 1, Aggregate: "a", Expect: Any}
	third := minimal
	third.Expect = 3
	for _, p := range []Proposal{sample, minimal, third} {
		b, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		got, err := UnmarshalProposal(b)
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Fatalf("got %+v, %v; want %+v", got, err, p)
		}
		if again, _ := got.Marshal(); !bytes.Equal(b, again) {
			t.Fatal("a second encoding differs")
		}
		e := Event{Proposal: p, Seq: 7, Index: 9, Sub: 1, Term: 2, Time: time.Unix(5, 6).UTC(), AggregateVersion: 1}
		got2, err := UnmarshalEnvelope(MarshalEnvelope(&e, b))
		if err != nil || !reflect.DeepEqual(got2, e) {
			t.Fatalf("got %+v, %v; want %+v", got2, err, e)
		}
	}
}

// The stored bytes of version 1, and the chain over them, never change.
func TestGolden(t *testing.T) {
	raw, err := sample.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	e := Event{Proposal: sample, Seq: 1, Index: 3, Term: 2, Time: time.Unix(1700000000, 1).UTC(), AggregateVersion: 1}
	env := MarshalEnvelope(&e, raw)
	chain := Chain([32]byte{}, env)
	got := hex.EncodeToString(env) + "\n" + hex.EncodeToString(chain[:]) + "\n"
	name := filepath.Join("testdata", "v1", "envelope.hex")
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	old, err := hex.DecodeString(strings.Split(string(want), "\n")[0])
	if err != nil {
		t.Fatal(err)
	}
	if read, err := UnmarshalEnvelope(old); err != nil || !reflect.DeepEqual(read, e) {
		t.Errorf("read %+v, %v", read, err)
	}
}

func TestLimits(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	for name, c := range map[string]struct {
		change func(*Proposal)
		want   error
	}{
		"fine":              {func(*Proposal) {}, nil},
		"largest payload":   {func(p *Proposal) { p.Payload = make([]byte, MaxPayload) }, nil},
		"payload":           {func(p *Proposal) { p.Payload = make([]byte, MaxPayload+1) }, ErrInvalid},
		"no id":             {func(p *Proposal) { p.ID = ID{} }, ErrInvalid},
		"no aggregate":      {func(p *Proposal) { p.Aggregate = "" }, ErrInvalid},
		"long aggregate":    {func(p *Proposal) { p.Aggregate = long(MaxAggregate + 1) }, ErrInvalid},
		"aggregate's bytes": {func(p *Proposal) { p.Aggregate = "a\xff" }, ErrInvalid},
		"long principal":    {func(p *Proposal) { p.Actor.Principal = long(MaxActor + 1) }, ErrInvalid},
		"principal's bytes": {func(p *Proposal) { p.Actor.Principal = "\xff" }, ErrInvalid},
		"no type":           {func(p *Proposal) { p.Type = "" }, ErrUnknownType},
		"no version":        {func(p *Proposal) { p.Version = 0 }, ErrUnknownType},
		"newer version":     {func(p *Proposal) { p.Version = Newest(p.Type) + 1 }, ErrUnknownType},
		"unknown type":      {func(p *Proposal) { p.Type = "approval.eaten" }, ErrUnknownType},
	} {
		p := sample
		c.change(&p)
		if err := p.Validate(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if b, err := p.Marshal(); c.want == ErrInvalid && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: Marshal: %d bytes, %v", name, len(b), err)
		}
	}
}

func TestCorrupt(t *testing.T) {
	good, err := sample.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"empty":         {},
		"truncated":     good[:len(good)-1],
		"unknown field": appendString(bytes.Clone(good), 14, "x"),
		"twice":         appendBytes(bytes.Clone(good), pCause, sample.Cause[:]),
		"descending":    append(appendUint(nil, pVersion, 1), good...),
		"wire type":     appendUint(nil, pID, 5),
		"explicit zero": {byte(pVersion << 3), 0},
		"short id":      appendBytes(nil, pID, []byte{1}),
		"big version":   appendUint(appendBytes(nil, pID, sample.ID[:]), pVersion, 1<<40),
	} {
		if _, err := UnmarshalProposal(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e := Event{Seq: 1}
	env := MarshalEnvelope(&e, good)
	for name, b := range map[string][]byte{
		"empty":       {},
		"no number":   MarshalEnvelope(&Event{}, good),
		"no proposal": appendUint(nil, eSeq, 1),
		"extra":       appendString(bytes.Clone(env), eProposal+1, "x"),
		"proposal":    MarshalEnvelope(&e, good[:8]),
	} {
		if _, err := UnmarshalEnvelope(b); !errors.Is(err, ErrCorrupt) {
			t.Errorf("envelope %s: %v", name, err)
		}
	}
}

func TestChain(t *testing.T) {
	a := Chain([32]byte{}, []byte("a"))
	if a == Chain([32]byte{}, []byte("b")) || a == Chain([32]byte{1}, []byte("a")) {
		t.Fatal("the chain does not depend on all it is over")
	}
}

func TestID(t *testing.T) {
	a, b := NewID(), NewID()
	if a == b || a.IsZero() {
		t.Fatal("not random")
	}
	if got, err := ParseID(a.String()); err != nil || got != a {
		t.Fatalf("%v %v", got, err)
	}
	for _, s := range []string{"", "0", strings.Repeat("g", 32), strings.Repeat("0", 34)} {
		if _, err := ParseID(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
}

// Every type in payload.go is in the registry.
func TestKnown(t *testing.T) {
	src, err := os.ReadFile("payload.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(src)) {
		if strings.HasPrefix(strings.TrimSpace(line), "Type") && strings.Contains(line, "= \"") {
			n++
			if typ := strings.Split(line, "\"")[1]; !Known(typ, 1) || Known(typ, 0) {
				t.Errorf("%s is not known", typ)
			}
		}
	}
	if n != len(kinds) {
		t.Errorf("%d types, %d known", n, len(kinds))
	}
}

// Whatever is accepted is the one encoding of what it means.
func FuzzUnmarshal(f *testing.F) {
	good, err := sample.Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(MarshalEnvelope(&Event{Seq: 1, Index: 2, Sub: 3, Term: 4, Time: time.Unix(0, 5), AggregateVersion: 6}, good))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := UnmarshalProposal(b); err == nil {
			again, err := p.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if q, err := UnmarshalProposal(again); err != nil || !reflect.DeepEqual(p, q) {
				t.Fatalf("%+v became %+v, %v", p, q, err)
			}
		}
		UnmarshalEnvelope(b)
	})
}

package fsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
)

type node struct {
	*FSM
	fs    *vfs.MemFS
	fatal error
}

func mustOpen(t testing.TB, fs *vfs.MemFS) *node {
	t.Helper()
	n := &node{fs: fs}
	f, err := Open(Config{Dir: "data/state", FS: fs, Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { n.fatal = err }})
	if err != nil {
		t.Fatal(err)
	}
	n.FSM = f
	t.Cleanup(func() { n.FSM.Close() })
	return n
}

func fresh(t testing.TB) *node { return mustOpen(t, vfs.NewCrashableMem()) }

func proposal(id byte, aggregate string, expect uint64) event.Proposal {
	return event.Proposal{ID: event.ID{id}, Type: event.TypeRevoked, Version: 1, Aggregate: aggregate, Expect: expect, Payload: []byte{id}}
}

// command is a log entry as a leader with that head makes it.
func command(t testing.TB, index uint64, nanos int64, h Head, ps ...event.Proposal) *raft.Log {
	t.Helper()
	c := Command{TimeNanos: nanos, Seq: h.Seq, Chain: h.Chain}
	for _, p := range ps {
		b, err := p.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		c.Proposals = append(c.Proposals, b)
	}
	b, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return &raft.Log{Index: index, Term: 2, Type: raft.LogCommand, Data: b}
}

func (n *node) apply(t testing.TB, l *raft.Log) Result {
	t.Helper()
	r, _ := n.Apply(l).(Result)
	return r
}

func TestApply(t *testing.T) {
	n := fresh(t)
	r := n.apply(t, command(t, 3, 100, n.Head(), proposal(1, "a", 0), proposal(2, "a", 1), proposal(3, "b", event.Any)))
	if r.Err != nil || len(r.Events) != 3 {
		t.Fatalf("%+v", r)
	}
	for i, e := range r.Events {
		if e.Seq != uint64(i+1) || e.Index != 3 || e.Sub != uint32(i) || e.Term != 2 || e.Time.UnixNano() != int64(100+i) {
			t.Errorf("event %d: %+v", i, e)
		}
	}
	// A leader whose clock is behind: time goes on all the same.
	r = n.apply(t, command(t, 5, 50, n.Head(), proposal(4, "b", 1)))
	if r.Err != nil || r.Events[0].Time.UnixNano() != 103 || r.Events[0].AggregateVersion != 2 {
		t.Fatalf("%+v", r)
	}
	got, err := n.Events(0, 0)
	if err != nil || len(got) != 4 || !reflect.DeepEqual(got[3], r.Events[0]) {
		t.Fatalf("%+v %v", got, err)
	}
	if got, err = n.Events(2, 2); err != nil || len(got) != 2 || got[0].Seq != 2 {
		t.Fatalf("%+v %v", got, err)
	}
	if got, err = n.Events(5, 1); err != nil || got != nil {
		t.Fatalf("%+v %v", got, err)
	}
	if got, err = n.AtIndex(3); err != nil || len(got) != 3 {
		t.Fatalf("%+v %v", got, err)
	}
	if got, err = n.AtIndex(4); err != nil || got != nil {
		t.Fatalf("%+v %v", got, err)
	}
	// An entry seen before changes nothing, and a configuration only the index.
	h := n.Head()
	n.Apply(command(t, 5, 200, h, proposal(9, "z", 0)))
	if n.Head() != h {
		t.Fatal("an old entry was applied again")
	}
	n.Apply(&raft.Log{Index: 6, Term: 2, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(raft.Configuration{})})
	if g := n.Head(); g.Applied != 6 || g.Seq != h.Seq || g.Chain != h.Chain {
		t.Fatalf("%+v", g)
	}
}

func TestRejections(t *testing.T) {
	for _, c := range []struct {
		name     string
		ps       []event.Proposal
		conflict *Conflict
		reused   bool
		earlier  []uint64
	}{
		{name: "must not exist", ps: []event.Proposal{proposal(9, "a", 0)}, conflict: &Conflict{"a", 0, 2}},
		{name: "too old", ps: []event.Proposal{proposal(9, "a", 1)}, conflict: &Conflict{"a", 1, 2}},
		{name: "of the future", ps: []event.Proposal{proposal(9, "new", 1)}, conflict: &Conflict{"new", 1, 0}},
		{name: "second of a batch", ps: []event.Proposal{proposal(8, "new", 0), proposal(9, "new", 0)}, conflict: &Conflict{"new", 0, 1}},
		{name: "same again", ps: []event.Proposal{proposal(1, "a", 0)}, earlier: []uint64{1}},
		{name: "same batch again", ps: []event.Proposal{proposal(1, "a", 0), proposal(2, "a", 1)}, earlier: []uint64{1, 2}},
		{name: "half again", ps: []event.Proposal{proposal(1, "a", 0), proposal(9, "x", 0)}, reused: true},
		{name: "other half again", ps: []event.Proposal{proposal(9, "x", 0), proposal(2, "a", 0)}, reused: true},
		{name: "other aggregate", ps: []event.Proposal{proposal(1, "x", 0)}, reused: true},
		{name: "twice in a batch", ps: []event.Proposal{proposal(9, "x", 0), proposal(9, "x", 1)}, reused: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := fresh(t)
			n.apply(t, command(t, 1, 1, n.Head(), proposal(1, "a", 0), proposal(2, "a", 1)))
			h := n.Head()
			r := n.apply(t, command(t, 2, 2, h, c.ps...))
			var conflict *Conflict
			errors.As(r.Err, &conflict)
			if !reflect.DeepEqual(conflict, c.conflict) || errors.Is(r.Err, ErrIDReused) != c.reused {
				t.Fatalf("%v", r.Err)
			}
			var seqs []uint64
			for _, e := range r.Events {
				seqs = append(seqs, e.Seq)
			}
			if !reflect.DeepEqual(seqs, c.earlier) {
				t.Fatalf("events %v, want %v", seqs, c.earlier)
			}
			g := n.Head()
			h.Applied = 2
			if g != h || n.fatal != nil {
				t.Fatalf("head %+v, want %+v; %v", g, h, n.fatal)
			}
			if v, _ := n.Version("new"); v != 0 {
				t.Fatal("half a batch was written")
			}
		})
	}
}

func TestHalt(t *testing.T) {
	other := func(t *testing.T, n *node) Head {
		m := fresh(t)
		m.apply(t, command(t, 1, 7, m.Head(), proposal(1, "a", 0), proposal(2, "a", 1)))
		return m.Head()
	}
	unknown := proposal(5, "a", event.Any)
	unknown.Type = "not.yet"
	newer := proposal(5, "a", event.Any)
	newer.Version = event.Newest(newer.Type) + 1
	for _, c := range []struct {
		name string
		log  func(t *testing.T, n *node) *raft.Log
		want error
	}{
		{"unknown type", func(t *testing.T, n *node) *raft.Log { return command(t, 2, 2, n.Head(), unknown) }, event.ErrUnknownType},
		{"newer version", func(t *testing.T, n *node) *raft.Log { return command(t, 2, 2, n.Head(), newer) }, event.ErrUnknownType},
		{"second unknown", func(t *testing.T, n *node) *raft.Log {
			return command(t, 2, 2, n.Head(), proposal(6, "b", 0), unknown)
		}, event.ErrUnknownType},
		{"not a command", func(t *testing.T, n *node) *raft.Log {
			return &raft.Log{Index: 2, Type: raft.LogCommand, Data: []byte{2, 0}}
		}, errCommand},
		{"damaged proposal", func(t *testing.T, n *node) *raft.Log {
			l := command(t, 2, 2, n.Head(), proposal(5, "b", 0))
			l.Data = l.Data[:len(l.Data)-1]
			return l
		}, nil},
		{"leader's chain differs", func(t *testing.T, n *node) *raft.Log {
			return command(t, 2, 2, other(t, n), proposal(5, "b", 0))
		}, ErrDiverged},
		{"leader is ahead", func(t *testing.T, n *node) *raft.Log {
			h := n.Head()
			h.Seq = 99
			return command(t, 2, 2, h, proposal(5, "b", 0))
		}, ErrDiverged},
		{"old chain differs", func(t *testing.T, n *node) *raft.Log {
			h := n.Head()
			return command(t, 2, 2, Head{Seq: 1, Chain: h.Chain}, proposal(5, "b", 0))
		}, ErrDiverged},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := fresh(t)
			n.apply(t, command(t, 1, 1, n.Head(), proposal(1, "a", 0), proposal(2, "a", 1)))
			h := n.Head()
			good := command(t, 3, 3, h, proposal(7, "c", 0))
			rs := n.ApplyBatch([]*raft.Log{c.log(t, n), good})
			for _, r := range rs {
				if !errors.Is(r.(Result).Err, ErrHalted) {
					t.Fatalf("%+v", r)
				}
			}
			if n.fatal == nil || c.want != nil && !errors.Is(n.fatal, c.want) {
				t.Fatalf("fatal: %v, want %v", n.fatal, c.want)
			}
			if r := n.apply(t, good); !errors.Is(r.Err, ErrHalted) || n.Head() != h {
				t.Fatalf("went on after a halt: %+v", r)
			}
			if _, err := n.Snapshot(); !errors.Is(err, ErrHalted) {
				t.Fatalf("a snapshot after a halt: %v", err)
			}
			if err := n.Restore(io.NopCloser(strings.NewReader(""))); !errors.Is(err, ErrHalted) {
				t.Fatalf("a restore after a halt: %v", err)
			}
		})
	}
	t.Run("older chain agrees", func(t *testing.T) {
		n := fresh(t)
		n.apply(t, command(t, 1, 1, n.Head(), proposal(1, "a", 0)))
		old := n.Head()
		n.apply(t, command(t, 2, 2, old, proposal(2, "a", 1)))
		if r := n.apply(t, command(t, 3, 3, old, proposal(3, "a", 2))); r.Err != nil {
			t.Fatal(r.Err)
		}
		if r := n.apply(t, command(t, 4, 3, Head{}, proposal(4, "a", 3))); r.Err != nil {
			t.Fatal(r.Err)
		}
	})
}

// randomLogs are entries as a cluster makes them: conflicts, repeats, leaders
// that lag, configurations, gaps in the index.
func randomLogs(t testing.TB, rng *rand.Rand, n int) []*raft.Log {
	m := fresh(t)
	heads := []Head{{}}
	var logs []*raft.Log
	index := uint64(0)
	for range n {
		index += 1 + rng.Uint64N(2)
		if rng.IntN(10) == 0 {
			logs = append(logs, &raft.Log{Index: index, Term: 2, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(raft.Configuration{})})
		} else {
			var ps []event.Proposal
			for range 1 + rng.IntN(4) {
				p := proposal(1, fmt.Sprintf("a%d", rng.IntN(5)), []uint64{event.Any, event.Any, rng.Uint64N(4)}[rng.IntN(3)])
				p.ID = event.ID{byte(rng.IntN(4)), byte(rng.IntN(256)), 1}
				ps = append(ps, p)
			}
			logs = append(logs, command(t, index, rng.Int64N(1000), heads[max(0, len(heads)-1-rng.IntN(3))], ps...))
		}
		m.Apply(logs[len(logs)-1])
		heads = append(heads, m.Head())
	}
	if m.fatal != nil {
		t.Fatal(m.fatal)
	}
	return logs
}

func dump(t testing.TB, n *node) []byte {
	t.Helper()
	e, err := n.Export()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	b, err := io.ReadAll(e)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(b)) != e.Size {
		t.Fatalf("the stream has %d bytes, said was %d", len(b), e.Size)
	}
	return b
}

// However the entries are batched, and however often a crash makes raft apply
// some again, the bytes of the state are the same.
func TestDeterminism(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	logs := randomLogs(t, rng, 300)
	one := fresh(t)
	for _, l := range logs {
		one.Apply(l)
	}
	want := dump(t, one)

	n, crashes := fresh(t), 0
	for i := 0; i < len(logs); {
		k := min(len(logs), i+1+rng.IntN(20))
		n.ApplyBatch(logs[i:k])
		i = k
		if crashes < 6 && rng.IntN(5) == 0 { // unsynced batches may be lost, whole ones
			crashes++
			n = mustOpen(t, n.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rng}))
			i = 0
			for i < len(logs) && logs[i].Index <= n.Head().Applied {
				i++
			}
			i = max(0, i-rng.IntN(10))
		}
	}
	if got := dump(t, n); !bytes.Equal(got, want) {
		t.Fatal("two nodes differ")
	}
	// And from a snapshot in the middle.
	half := fresh(t)
	half.ApplyBatch(logs[:150])
	rest := fresh(t)
	if err := rest.Restore(io.NopCloser(bytes.NewReader(dump(t, half)))); err != nil {
		t.Fatal(err)
	}
	rest.ApplyBatch(logs) // those before the snapshot are skipped
	if got := dump(t, rest); !bytes.Equal(got, want) {
		t.Fatal("a restored node differs")
	}
}

func TestRestore(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	logs := randomLogs(t, rng, 100)
	source := fresh(t)
	source.ApplyBatch(logs)
	snap := dump(t, source)
	if h, err := SnapshotHead(bytes.NewReader(snap)); err != nil || h != source.Head() {
		t.Fatalf("%+v %v", h, err)
	}
	restore := func(n *node, b []byte) error { return n.Restore(io.NopCloser(bytes.NewReader(b))) }

	behind := fresh(t)
	behind.ApplyBatch(logs[:40])
	changed := behind.Changed()
	if err := restore(behind, snap); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Fatal("readers were not woken")
	}
	if !bytes.Equal(dump(t, behind), snap) {
		t.Fatal("the restored state differs")
	}
	// It is durable at once.
	again := mustOpen(t, behind.fs.CrashClone(vfs.CrashCloneCfg{}))
	if again.Head() != source.Head() || !bytes.Equal(dump(t, again), snap) {
		t.Fatal("the restored state is lost in a crash")
	}
	// An older one changes nothing.
	older := fresh(t)
	older.ApplyBatch(logs[:40])
	if err := restore(behind, dump(t, older)); err != nil || behind.Head() != source.Head() {
		t.Fatalf("an older snapshot: %v", err)
	}
	// Damage is found, and leaves the state as it was.
	for _, at := range []int{0, 9, 60, 200, len(snap) / 2, len(snap) - 40, len(snap) - 1} {
		n := fresh(t)
		n.ApplyBatch(logs[:10])
		before := dump(t, n)
		bad := bytes.Clone(snap)
		bad[at] ^= 1
		if err := restore(n, bad); err == nil {
			t.Errorf("a flipped bit at %d was not found", at)
		} else if n.fatal == nil && !bytes.Equal(dump(t, n), before) {
			t.Errorf("a bad snapshot (%v) changed the state", err)
		}
	}
	for _, bad := range [][]byte{nil, snap[:5], snap[:len(snap)/2], snap[:len(snap)-1], append(bytes.Clone(snap), 0)} {
		if err := restore(fresh(t), bad); err == nil {
			t.Errorf("a snapshot of %d bytes, not %d, was taken", len(bad), len(snap))
		}
	}
	// One that contradicts us stops the node, newer or older.
	for _, mine := range []int{5, 200} {
		n := fresh(t)
		for i := range mine {
			n.Apply(command(t, uint64(i+1), int64(i), n.Head(), proposal(byte(i+1), fmt.Sprint("mine", i), 0)))
		}
		if err := restore(n, snap); !errors.Is(err, ErrDiverged) || !errors.Is(n.fatal, ErrDiverged) {
			t.Errorf("another history (%d entries): %v", mine, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	n := fresh(t)
	if err := n.db.Set(keyFormat, []byte{stateFormat + 1}, nil); err != nil {
		t.Fatal(err)
	}
	if err := n.db.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := Open(Config{Dir: "data/state", FS: n.fs, Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "format") {
		t.Fatalf("a newer format: %v", err)
	}
	n.FSM, _ = Open(Config{Dir: "other", FS: n.fs, Log: slog.New(slog.DiscardHandler)}) // for Cleanup
}

func FuzzCommand(f *testing.F) {
	f.Add(command(f, 1, 1, Head{Seq: 1, Chain: [32]byte{1}}, proposal(1, "a", 0), proposal(2, "b", 1)).Data)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := unmarshalCommand(b)
		if err != nil {
			return
		}
		again, err := c.Marshal()
		if err != nil {
			return // larger than its own limit by non-minimal numbers
		}
		if d, err := unmarshalCommand(again); err != nil || !reflect.DeepEqual(c.Proposals, d.Proposals) {
			t.Fatalf("%+v became %+v, %v", c, d, err)
		}
	})
}

func BenchmarkApply(b *testing.B) {
	n := fresh(b)
	i := 0
	for b.Loop() {
		p := proposal(1, fmt.Sprint(i), 0)
		p.ID = event.NewID()
		n.Apply(command(b, uint64(i+1), int64(i), n.Head(), p))
		i++
	}
}

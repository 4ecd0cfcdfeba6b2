package fsm

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	"github.com/sallyport/sallyport/raftstore/event"
)

var rewrite = flag.Bool("rewrite", false, "write what the corpus leads to; only for a change that no cluster has stored yet")

// corpus is a log as a cluster writes it over days: conflicts, repeats, a
// raised level, leaders that lag, ids that are forgotten. It is the same on
// every machine.
func corpus(t testing.TB) []*raft.Log {
	rng := rand.New(rand.NewPCG(20260101, 7))
	m := fresh(t)
	var logs []*raft.Log
	heads := []Head{{}}
	index, nanos := uint64(0), int64(1_700_000_000_000_000_000)
	for i := range 400 {
		index += 1 + rng.Uint64N(2)
		nanos += rng.Int64N(day / 100)
		var ps []event.Proposal
		if i == 50 {
			ps = append(ps, event.RaiseTo(2, event.Any, event.ID{0xff}, event.Actor{}))
		}
		for k := range 1 + rng.IntN(40) {
			expect := event.Any
			if k == 3 && rng.IntN(10) == 0 {
				expect = rng.Uint64N(30)
			}
			p := proposal(1, fmt.Sprintf("a%d", rng.IntN(300)), expect)
			binary.BigEndian.PutUint64(p.ID[:], rng.Uint64N(1<<40))
			p.Payload = binary.BigEndian.AppendUint64(nil, rng.Uint64())
			ps = append(ps, p)
		}
		l := command(t, index, nanos, heads[max(0, len(heads)-1-rng.IntN(3))], ps...)
		if rng.IntN(8) == 0 && len(logs) > 0 { // the same again
			l.Data = logs[rng.IntN(len(logs))].Data
		}
		if c, err := unmarshalCommand(l.Data); err != nil {
			t.Fatal(err)
		} else if m.Level() >= LevelDigest && c.Digest.Seq == 0 {
			c.Digest = m.Digest()
			if l.Data, err = c.Marshal(); err != nil {
				t.Fatal(err)
			}
		}
		m.Apply(l)
		logs = append(logs, l)
		heads = append(heads, m.Head())
	}
	if m.fatal != nil || m.now.ids < 500 || m.Digest().Seq < 5*digestEvery {
		t.Fatalf("the corpus does not reach everything: %v, ids forgotten up to %d, digest %d", m.fatal, m.now.ids, m.Digest().Seq)
	}
	return logs
}

// The corpus leads to the same bytes whatever the batches, the number of
// processors and the seeds of maps, on every machine and in every build.
func TestReplayCorpus(t *testing.T) {
	logs := corpus(t)
	rng := rand.New(rand.NewPCG(uint64(os.Getpid()), 3))
	var first []byte
	for _, procs := range []int{1, 2, 7} {
		func() {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
			n := fresh(t)
			for i := 0; i < len(logs); {
				k := i + 1
				if procs > 1 {
					k = min(len(logs), i+1+rng.IntN(60))
				}
				n.ApplyBatch(logs[i:k])
				i = k
			}
			h, sum := n.Head(), n.now.sum.marshal()
			got := fmt.Sprintf("events %d\nchain %x\ndigest %x\nforgotten %d\n", h.Seq, h.Chain, sum, n.now.ids-1)
			name := filepath.Join("testdata", "corpus.txt")
			if *rewrite {
				if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("with %d processors\n%swant\n%s", procs, got, want)
			}
			d := dump(t, n)
			if first == nil {
				first = d
			} else if !bytes.Equal(first, d) {
				t.Errorf("with %d processors the state differs", procs)
			}
		}()
	}
}

// Nothing in the state machine may depend on the machine or the moment, and
// nothing that applies may run beside what applies: the one goroutine is the
// builder of the history, which decides nothing.
func TestDeterministicSource(t *testing.T) {
	forbidden := map[string]bool{
		"time": true, "os": true, "math/rand": true, "math/rand/v2": true, "crypto/rand": true, "net": true, "runtime": true, "syscall": true,
		"unsafe": true, "reflect": true, "maps": true, "math": true, "os/exec": true, "hash/maphash": true, "unique": true,
	}
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		n++
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			if path, _ := strconv.Unquote(i.Path.Value); forbidden[path] {
				t.Errorf("%s imports %s", name, path)
			}
		}
		ast.Inspect(f, func(node ast.Node) bool {
			switch node := node.(type) {
			case *ast.GoStmt, *ast.SelectStmt:
				if name != "history.go" {
					t.Errorf("%s: a goroutine or a select", name)
				}
			case *ast.Ident:
				if node.Name == "float64" || node.Name == "float32" {
					t.Errorf("%s: a floating-point number", name)
				}
			case *ast.MapType:
				if name != "fsm.go" { // nextVersions looks up in one and does not range over it
					t.Errorf("%s: a map", name)
				}
			}
			return true
		})
	}
	if n < 6 {
		t.Fatalf("%d files", n)
	}
}

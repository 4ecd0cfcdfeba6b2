package autopilot

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// nodes reads "name[@zone][:flags]": v a voter, s staged, d dead, q quiet for a
// moment, g may not be a voter, n new, c caught up.
func nodes(t *testing.T, spec string) (out []Node) {
	t.Helper()
	for _, f := range strings.Fields(spec) {
		name, flags, _ := strings.Cut(f, ":")
		name, zone, _ := strings.Cut(name, "@")
		n := Node{Name: name, Zone: zone, Eligible: true, Alive: true, Since: now.Add(-time.Minute)}
		for _, c := range flags {
			switch c {
			case 'v':
				n.InRaft, n.Voter, n.Caught = true, true, true
			case 's':
				n.InRaft = true
			case 'c':
				n.Caught = true
			case 'd':
				n.Alive, n.Silent = false, Dead
			case 'q':
				n.Alive, n.Silent = false, Dead/2
			case 'g':
				n.Eligible = false
			case 'n':
				n.Since = now.Add(-Stable / 2)
			default:
				t.Fatalf("flag %q", c)
			}
		}
		out = append(out, n)
	}
	return out
}

func TestPlan(t *testing.T) {
	for _, c := range []struct{ name, nodes, want string }{
		{"three are three", "a:v b:v c:v d e", ""},
		{"one alone", "a:v", ""},
		{"the second at once", "a:v b:n", "stage b"},
		{"a staged one waits for its log", "a:v b:sn", ""},
		{"and votes when it has it", "a:v b:scn", "promote b"},
		{"the third at once", "a:v b:v c:scn", "promote c"},
		{"gateways never", "a:v b:g c:g", ""},
		{"one at a time", "a:v b:s c d", ""},
		{"a new one waits where there are three", "a:v b:v c:vd d:n", ""},
		{"the dead are replaced", "a:v b:v c:vd d e", "stage d"},
		{"the dead are replaced: promote", "a:v b:v c:vd d:sc", "promote d"},
		{"the dead go after", "a:v b:v c:vd d:v", "withdraw c"},
		{"the quiet stay", "a:v b:v c:vq d", ""},
		{"three are not made two", "a:v b:v c:vd", ""},
		{"four are made three", "a:v b:v c:v d:vd", "withdraw d"},
		{"without the dead a majority lives again", "a:v b:vq c:vd d:v", "withdraw c"},
		{"no majority would be left", "a:v b:vd c:vd d:vd", ""},
		{"too many: not the leader", "a:v b:v c:v d:v", "withdraw b"},
		{"leaving, with a replacement", "a:v b:v c:vg d", "stage d"},
		{"leaving, replaced", "a:v b:v c:vg d:v", "withdraw c"},
		{"leaving, and nobody else", "a:v b:v c:vg", "withdraw c"},
		{"leaving, two of two", "a:v b:vg", "withdraw b"},
		{"the leader leaves", "a:vg b:v c:v", "transfer a"},
		{"the only one cannot leave", "a:vg", ""},
		{"no majority lives", "a:v b:vd c:vd d e", "stage d"}, // it can only wait for the commit
		{"staged and dead", "a:v b:v c:v d:sd", "withdraw d"},
		{"staged and leaving", "a:v b:v c:vd d:scg e", "withdraw d"},
		{"staged for nothing", "a:v b:v c:v d:sc", "withdraw d"},
		{"zones are even", "a@x:v b@y:v c@z:v d@w", ""},
		{"two in one zone and none in another", "a@x:v b@x:v c@y:v d@z", "stage d"},
		{"two in one zone and one in another", "a@x:v b@x:v c@y:v d@y", ""}, // as good
		{"three in one zone", "a@x:v b@x:v c@x:v d@y", "stage d"},
		{"three in one zone: promote", "a@x:v b@x:v c@x:v d@y:sc", "promote d"},
		{"three in one zone: withdraw", "a@x:v b@x:v c@x:v d@y:v", "withdraw b"},
		{"the replacement comes from the emptiest zone", "a@x:v b@y:v c@z:vd d@x e@z f@y", "stage e"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := Plan(3, "a", nodes(t, c.nodes), now)
			if got := strings.TrimSpace(fmt.Sprint(s.Action, " ", s.Node)); got != c.want {
				t.Errorf("%s: %q (%s), want %q", c.nodes, got, s.Why, c.want)
			}
			if s.Action != None && s.Why == "" {
				t.Error("no reason")
			}
		})
	}
	if s := Plan(5, "a", nodes(t, "a:v b:v c:v d e"), now); s.Action != Stage {
		t.Errorf("three of five: %+v", s)
	}
	if s := Plan(3, "a", nodes(t, "a:v b:v c:v d:v e:v"), now); s.Action != Withdraw {
		t.Errorf("five of three: %+v", s)
	}
}

// Whatever is alive, steps lead to an end, no step leaves the voters without a
// living majority that had one, and at the end the voters are those there can be.
func TestPlanSettles(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 5000 {
		want := 3 + 2*r.IntN(2)
		var ns []Node
		for i := range 2 + r.IntN(8) {
			n := Node{Name: fmt.Sprint("n", i), Zone: fmt.Sprint(r.IntN(3)), Eligible: r.IntN(4) > 0, Alive: r.IntN(4) > 0, Since: now.Add(-time.Hour)}
			if !n.Alive {
				n.Silent = Dead
			}
			if r.IntN(2) == 0 {
				n.InRaft, n.Voter, n.Caught = true, r.IntN(4) > 0, true
			}
			ns = append(ns, n)
		}
		ns[0].InRaft, ns[0].Voter, ns[0].Alive, ns[0].Eligible = true, true, true, true
		majority := func() (voters, alive int) {
			for _, n := range ns {
				if n.InRaft && n.Voter {
					voters++
					if n.Alive {
						alive++
					}
				}
			}
			return voters, alive
		}
		before := fmt.Sprintf("%+v", ns)
		voters, alive := majority()
		living := alive > voters/2
		steps := 0
		for ; ; steps++ {
			if steps > 60 {
				t.Fatalf("want %d: no end: %s", want, before)
			}
			s := Plan(want, "n0", ns, now)
			if s.Action == None {
				break
			}
			for i := range ns {
				if n := &ns[i]; n.Name == s.Node {
					switch s.Action {
					case Stage:
						n.InRaft, n.Caught = true, true
					case Promote:
						n.Voter = true
					case Withdraw:
						n.InRaft, n.Voter, n.Caught = false, false, false
					default:
						t.Fatalf("%+v: %s", s, before)
					}
				}
			}
			if voters, alive := majority(); living && alive <= voters/2 {
				t.Fatalf("want %d: %+v leaves %d of %d alive: %s", want, s, alive, voters, before)
			}
		}
		if !living {
			continue
		}
		able := 0
		for _, n := range ns {
			if n.Alive && n.Eligible {
				able++
			}
		}
		good := 0
		for _, n := range ns {
			if n.InRaft && n.Voter && n.Alive && n.Eligible {
				good++
			}
			if n.InRaft && !n.Voter {
				t.Fatalf("%s is left staged: %s", n.Name, before)
			}
		}
		if good != min(want, able) {
			t.Fatalf("want %d: %d good voters of %d: %s\nnow %+v", want, good, able, before, ns)
		}
	}
}

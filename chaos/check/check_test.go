package check

import (
	"strings"
	"testing"
	"time"
)

var t0 = time.Unix(1_700_000_000, 0)

// at is milliseconds after t0.
func at(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }

// op from call to ret ms; ret 0 is an unknown outcome.
func op(object, from, to string, call, ret int) Op {
	o := Op{Object: object, From: from, To: to, Call: at(call)}
	if ret > 0 {
		o.Return = at(ret)
	}
	return o
}

func TestLinearizable(t *testing.T) {
	for _, c := range []struct {
		name string
		ops  []Op
		ok   bool
	}{
		{"nothing", nil, true},
		{"changes one after the other", []Op{op("config", "", "1", 0, 10), op("config", "1", "2", 20, 30)}, true},
		{"two changes of the same state", []Op{op("config", "", "1", 0, 10), op("config", "1", "2", 20, 30), op("config", "1", "3", 25, 35)}, false},
		{"a change of a state never made", []Op{op("config", "", "1", 0, 10), op("config", "7", "2", 20, 30)}, false},
		{"of a state that an unknown change made", []Op{op("config", "", "1", 0, 0), op("config", "1", "2", 20, 30)}, true},
		{"an unknown change that never was", []Op{op("config", "9", "1", 0, 0), op("config", "", "2", 20, 30)}, true},
		{"both ways at once", []Op{op("config", "", "1", 0, 0), op("config", "1", "2", 20, 30), op("config", "", "3", 40, 50)}, false},

		{"approved and used", []Op{op("a", "", "approved", 0, 10), op("a", "approved", "used", 5, 20)}, true},
		{"used twice", []Op{op("a", "", "approved", 0, 10), op("a", "approved", "used", 5, 20), op("a", "approved", "used", 5, 20)}, false},
		{"used without approval", []Op{op("a", "approved", "used", 5, 20)}, false},
		{"used before it was approved", []Op{op("a", "approved", "used", 5, 20), op("a", "", "approved", 30, 40)}, false},
		{"approved and denied", []Op{op("a", "", "approved", 0, 10), op("a", "", "denied", 5, 20)}, false},
		{"denied, perhaps, and used", []Op{op("a", "", "denied", 0, 0), op("a", "", "approved", 0, 10), op("a", "approved", "used", 5, 20)}, true},

		{"let in, revoked, refused", []Op{op("s", "", Same, 0, 10), op("s", Any, "revoked", 20, 30), op("s", "revoked", Same, 40, 50)}, true},
		{"let in after revoke returned", []Op{op("s", Any, "revoked", 20, 30), op("s", "", Same, 40, 50)}, false},
		{"let in while revoke runs", []Op{op("s", Any, "revoked", 20, 30), op("s", "", Same, 25, 50)}, true},
		{"refused, then let in", []Op{op("s", Any, "revoked", 0, 0), op("s", "revoked", Same, 20, 30), op("s", "", Same, 40, 50)}, false},
		{"refused without a reason", []Op{op("s", "revoked", Same, 20, 30)}, false},
		{"of other subjects", []Op{op("s", Any, "revoked", 20, 30), op("r", "", Same, 40, 50)}, true},
	} {
		if err := Linearizable(c.ops); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestLogs(t *testing.T) {
	log := func(chains string) (es []Event) {
		for i, c := range chains {
			es = append(es, Event{uint64(i + 1), string(c)})
		}
		return es
	}
	gap := append(log("ab"), Event{4, "d"})
	twice := []Event{{1, "a"}, {1, "a"}, {2, "b"}}
	for _, c := range []struct {
		name string
		logs map[string][]Event
		ok   bool
	}{
		{"equal", map[string][]Event{"n1": log("abc"), "n2": log("abc")}, true},
		{"one shorter", map[string][]Event{"n1": log("abc"), "n2": log("ab")}, false},
		{"one differs", map[string][]Event{"n1": log("abc"), "n2": log("axc")}, false},
		{"a gap", map[string][]Event{"n1": gap, "n2": gap}, false},
		{"one twice", map[string][]Event{"n1": twice, "n2": twice}, false},
	} {
		if err := Logs(c.logs); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestOnce(t *testing.T) {
	if err := Once([]string{"a", "b"}, []string{"x", "b", "a"}); err != nil {
		t.Error(err)
	}
	if Once([]string{"a"}, []string{"b"}) == nil {
		t.Error("a lost change passes")
	}
	if Once([]string{"a"}, []string{"a", "a"}) == nil {
		t.Error("a change made twice passes")
	}
}

func TestLeaders(t *testing.T) {
	if err := Leaders([]Leader{{"n1", 1}, {"n1", 1}, {"n2", 2}}, map[string][]uint64{"n1": {1, 1, 2}}); err != nil {
		t.Error(err)
	}
	if Leaders([]Leader{{"n1", 1}, {"n2", 1}}, nil) == nil {
		t.Error("two leaders of a term pass")
	}
	if Leaders(nil, map[string][]uint64{"n1": {1, 2, 1}}) == nil {
		t.Error("a term that goes back passes")
	}
}

func TestRows(t *testing.T) {
	acked := map[string]int{"w": 2}
	if err := Rows(acked, map[string]map[int]int{"w": {1: 1, 2: 1, 3: 1}}); err != nil {
		t.Error(err)
	}
	for name, found := range map[string]map[int]int{"a lost row": {1: 1}, "a row twice": {1: 1, 2: 2}} {
		if Rows(acked, map[string]map[int]int{"w": found}) == nil {
			t.Errorf("%s passes", name)
		}
	}
}

func TestFence(t *testing.T) {
	late := []Late{{Node: "n1", Leg: "client", Bytes: 4096, Last: at(60)}}
	rev := func(state string, level int, change func(*Revocation)) []Revocation {
		r := Revocation{Subject: "x", Called: at(0), Returned: at(50), Nodes: []Fenced{{Node: "n1", State: state, Level: level}, {Node: "n2", State: Confirmed, Level: level}}}
		if change != nil {
			change(&r)
		}
		return []Revocation{r}
	}
	stopped := func(r *Revocation) { r.Late, r.Stopped = late, []string{"n1"} }
	for _, c := range []struct {
		name string
		revs []Revocation
		want string // "" when it passes
	}{
		{"nothing late", rev(Confirmed, 1, nil), ""},
		{"late after it confirmed", rev(Confirmed, 1, func(r *Revocation) { r.Late = late }), "n1 (confirmed"},
		{"late after it confirmed, stopped since", rev(Confirmed, 1, stopped), "n1 (confirmed"},
		{"late after expiry, running", rev(ByExpiry, 1, func(r *Revocation) { r.Late = late }), "n1 (fenced by expiry, level 1)"},
		{"late after expiry, stopped, level 1", rev(ByExpiry, 1, stopped), ""},
		{"late after expiry, stopped, level 2", rev(ByExpiry, 2, stopped), "n1 (fenced by expiry, level 2)"},
		{"late, and the answer was not complete", rev(Unconfirmed, 1, func(r *Revocation) { r.Late = late }), ""},
		{"late from a node that the answer leaves out", rev(Confirmed, 1, func(r *Revocation) { r.Late = []Late{{Node: "n9", Bytes: 1, Last: at(60)}} }), "n9"},
		{"confirmed by who could not speak", rev(Confirmed, 1, func(r *Revocation) { r.Silent = []string{"n2"} }), "n2 confirmed"},
	} {
		rep, err := Fence(c.revs)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", c.name, err)
		}
		if c.name == "late after expiry, stopped, level 1" && (rep.AllowedBytes != 4096 || rep.AllowedFlows != 1 || rep.ByExpiry != 1) {
			t.Errorf("%s is counted as %+v", c.name, rep)
		}
	}
}

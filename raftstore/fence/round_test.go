package fence

import "testing"

func TestTally(t *testing.T) {
	type answer struct {
		voter       string
		nonce, term uint64
	}
	three, five := []string{"a", "b", "c"}, []string{"a", "b", "c", "d", "e"}
	for _, c := range []struct {
		name              string
		voters            []string
		self              string
		answers           []answer
		confirmed, failed bool
	}{
		{"alone", []string{"a"}, "a", nil, true, false},
		{"nobody answered", three, "a", nil, false, false},
		{"one of two others", three, "a", []answer{{"b", 7, 3}}, true, false},
		{"an earlier question's answer", three, "a", []answer{{"b", 6, 3}, {"c", 6, 3}}, false, false},
		{"an earlier term", three, "a", []answer{{"b", 7, 2}}, false, false},
		{"all in an earlier term", three, "a", []answer{{"b", 7, 2}, {"c", 7, 2}}, false, true},
		{"a later term", three, "a", []answer{{"b", 7, 4}}, false, true},
		{"a later term after a majority", three, "a", []answer{{"b", 7, 3}, {"c", 7, 4}}, false, true},
		{"no voter", three, "a", []answer{{"x", 7, 3}, {"y", 7, 3}}, false, false},
		{"the same one twice", five, "a", []answer{{"b", 7, 3}, {"b", 7, 3}}, false, false},
		{"itself", five, "a", []answer{{"a", 7, 3}, {"a", 7, 3}}, false, false},
		{"three of five", five, "a", []answer{{"b", 7, 3}, {"c", 7, 3}}, true, false},
		{"two of four", five[:4], "a", []answer{{"b", 7, 3}}, false, false},
		{"not a voter itself", three, "x", []answer{{"b", 7, 3}}, false, false},
		{"not a voter itself, and two", three, "x", []answer{{"b", 7, 3}, {"c", 7, 3}}, true, false},
	} {
		y := NewTally(3, 7, c.voters, c.self)
		for _, a := range c.answers {
			y.Answer(a.voter, a.nonce, a.term)
		}
		if y.Confirmed() != c.confirmed || y.Failed() != c.failed {
			t.Errorf("%s: confirmed %v, failed %v", c.name, y.Confirmed(), y.Failed())
		}
	}
}

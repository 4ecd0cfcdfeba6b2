package policy

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Tolerance is how long a session may run on while its node cannot learn what
// was revoked, counted from the last word that it could. It comes from
// @revocation on the permit rules for connect; of several, the smallest holds.
// The zero value is Strict, and what a rule without the annotation says.
type Tolerance time.Duration

const (
	// Strict sessions stop when their node's lease ends.
	Strict Tolerance = 0
	// BestEffort sessions run on: nothing bounds a revocation that cannot
	// reach their node.
	BestEffort Tolerance = math.MaxInt64

	// MinBounded is the least of bounded(S). A lease is never longer: a shorter
	// bound would mean less than strict does.
	MinBounded = 10 * time.Second
	// MaxBounded is the most of bounded(S): a revocation waits as long for a
	// node that cannot be reached.
	MaxBounded = 24 * time.Hour
)

// String is as @revocation has it.
func (t Tolerance) String() string {
	switch t {
	case Strict:
		return "strict"
	case BestEffort:
		return "best_effort"
	}
	return "bounded(" + shortDuration(time.Duration(t)) + ")"
}

// shortDuration is d without the zeros that time.Duration prints at the end.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = s[:len(s)-2]
	}
	if strings.HasSuffix(s, "h0m") {
		s = s[:len(s)-2]
	}
	return s
}

func parseTolerance(v string) (Tolerance, error) {
	switch v {
	case "strict":
		return Strict, nil
	case "best_effort":
		return BestEffort, nil
	}
	if s, ok := strings.CutPrefix(v, "bounded("); ok {
		if s, ok = strings.CutSuffix(s, ")"); ok {
			d, err := time.ParseDuration(s)
			if err == nil && d >= MinBounded && d <= MaxBounded {
				return Tolerance(d), nil
			}
			return 0, fmt.Errorf(`@revocation(%q): the bound must be a time from %s to %s, such as "bounded(5m)"`, v, shortDuration(MinBounded), shortDuration(MaxBounded))
		}
	}
	return 0, fmt.Errorf(`@revocation(%q): want "strict" (the default), "bounded(5m)" or "best_effort"`, v)
}

// LeastBounded is the smallest bound of a bounded(S), 0 when there is none.
func (s *Set) LeastBounded() time.Duration {
	var least time.Duration
	for _, r := range s.rules {
		if d := time.Duration(r.tolerance); r.tolerance != Strict && r.tolerance != BestEffort && (least == 0 || d < least) {
			least = d
		}
	}
	return least
}

// LargestTolerance is the most that a rule grants to a session:
// no session that s permits has a larger one. A nil Set permits none.
func (s *Set) LargestTolerance() Tolerance {
	if s == nil {
		return Strict
	}
	most := Strict
	for _, r := range s.rules {
		if r.permit {
			most = max(most, r.tolerance)
		}
	}
	return most
}

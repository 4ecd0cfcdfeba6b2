package storetest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// Ratio is one line of what `make bench-raft` prints: something measured, by
// what the machine can do at best, measured in the same run.
type Ratio struct {
	Target string  `json:"target"` // T1 …
	What   string  `json:"what"`
	Ratio  float64 `json:"ratio"`
	Bound  float64 `json:"bound"` // the ratio aimed at, at most
	// AtLeast says that the bound is one from below.
	AtLeast bool `json:"at_least,omitempty"`
	// Beside is what the ratio was made of, for people.
	Beside string `json:"beside,omitempty"`
}

// Met says whether the ratio is what is aimed at.
func (r Ratio) Met() bool {
	if r.AtLeast {
		return r.Ratio >= r.Bound
	}
	return r.Ratio <= r.Bound
}

func (r Ratio) String() string {
	verdict, bound := "missed", "at most "
	if r.Met() {
		verdict = "met"
	}
	if r.AtLeast {
		bound = "at least"
	}
	return fmt.Sprintf("%-4s %-66s %8.3f   target %s %-5.4g %-6s  %s", r.Target, r.What, r.Ratio, bound, r.Bound, verdict, r.Beside)
}

// Keep adds rs to those in the file, by name, and returns all, in the order of
// their numbers: two test binaries measure for one table.
func Keep(path string, rs []Ratio) ([]Ratio, error) {
	var all []Ratio
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(o Ratio) bool {
		return slices.ContainsFunc(rs, func(r Ratio) bool { return r.Target == o.Target })
	})
	all = append(all, rs...)
	number := func(r Ratio) (n int) { fmt.Sscanf(r.Target, "T%d", &n); return n }
	slices.SortStableFunc(all, func(a, b Ratio) int { return number(a) - number(b) })
	if b, err = json.MarshalIndent(all, "", "  "); err != nil {
		return nil, err
	}
	return all, os.WriteFile(path, append(b, '\n'), 0o644)
}

// Durations are samples.
type Durations []time.Duration

// Time adds how long f took.
func (s *Durations) Time(f func() error) error {
	began := time.Now()
	err := f()
	*s = append(*s, time.Since(began))
	return err
}

// At is a percentile; 0 of nothing.
func (s Durations) At(percent int) time.Duration {
	if len(s) == 0 {
		return 0
	}
	o := slices.Sorted(slices.Values(s))
	return o[min(len(o)-1, len(o)*percent/100)]
}

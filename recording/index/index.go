// Package index finds recordings in a store of many: by who, from which commit,
// to where, what was done to which table, how it was decided, and by the text
// of statements.
//
// It keeps one row for each finished recording in Parquet files beside the
// recordings, by day. The index is a hint and never evidence: whoever can write
// to the store can write any row. So Search lists the recordings that there
// are, looks up those that the index covers, reads the rest, and shows nothing
// but what it has read from a recording itself, with how that verified.
//
// Statements are not kept: a row has a filter of their trigrams, which can tell
// that a text is not in a recording and never that it is.
package index

import (
	"cmp"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
)

// Row is what the index knows of one recording. Times are microseconds since
// 1970 UTC.
type Row struct {
	Name    string `parquet:"name"`    // YYYY/MM/DD/session
	Objects int32  `parquet:"objects"` // of the recording when the row was made,
	Bytes   int64  `parquet:"bytes"`   // and their size: a recording that has others is read anew

	Kind        string   `parquet:"kind"`
	Node        string   `parquet:"node"`
	Started     int64    `parquet:"started,timestamp(microsecond)"`
	Ended       int64    `parquet:"ended,timestamp(microsecond)"`
	Ending      string   `parquet:"ending"`
	Subject     string   `parquet:"subject"`
	SubjectKind string   `parquet:"subject_kind"`
	Repository  string   `parquet:"repository"`
	Ref         string   `parquet:"ref"`
	Commit      string   `parquet:"commit"`
	PullRequest string   `parquet:"pull_request"`
	Run         string   `parquet:"run"`
	Claims      []string `parquet:"claims,list"` // NAME=VALUE
	Client      string   `parquet:"client"`
	Protocol    string   `parquet:"protocol"`
	Target      string   `parquet:"target"`
	Profile     string   `parquet:"profile"`
	Database    string   `parquet:"database"`

	Entries   int64    `parquet:"entries"`
	Actions   []string `parquet:"actions,list"`   // postgres:select
	Resources []string `parquet:"resources,list"` // prod-db.shop.public.users
	Decisions []string `parquet:"decisions,list"` // permit, refuse, hold
	Rules     []string `parquet:"rules,list"`
	Actors    []string `parquet:"actors,list"` // who approved, denied, called or was refused

	// Partial says that a set above was cut: that something is not in it means
	// nothing.
	Partial bool `parquet:"partial"`
	// Trigrams is the filter of the texts; empty when there were too many, and
	// nothing can be told from it.
	Trigrams []byte `parquet:"trigrams"`
}

const (
	maxSet    = 2048    // elements of a set of one row
	maxWord   = 1 << 10 // bytes of one element
	maxClaims = 64
)

// A summary gathers the row of one recording.
type summary struct {
	row     Row
	sets    [5]map[string]struct{}
	text    trigrams
	partial bool
}

const (
	setActions = iota
	setResources
	setDecisions
	setRules
	setActors
)

// add takes an entry into account. It keeps nothing of it.
func (s *summary) add(e *recording.Entry) {
	s.row.Entries++
	for _, a := range e.Actions {
		action, resource, _ := strings.Cut(a, " ")
		s.put(setActions, action)
		s.put(setResources, resource)
	}
	if e.Type == recording.Decided {
		s.put(setDecisions, e.Effect)
	}
	s.put(setRules, e.Rule)
	s.put(setActors, e.Actor)
	s.text.add(e.Text)
}

func (s *summary) put(set int, word string) {
	if word == "" {
		return
	}
	if len(word) > maxWord {
		s.partial = true
		return
	}
	m := s.sets[set]
	if _, ok := m[word]; ok {
		return
	}
	if len(m) == maxSet {
		s.partial = true
		return
	}
	if m == nil {
		m = map[string]struct{}{}
		s.sets[set] = m
	}
	m[strings.Clone(word)] = struct{}{}
}

// finish returns the row of a recording that was read whole.
func (s *summary) finish(item replay.Item, h *recording.Header, end *recording.Ending) Row {
	r := s.row
	r.Name, r.Objects, r.Bytes = item.Name(), int32(item.Objects()), item.Bytes()
	describe(&r, h)
	if end != nil {
		r.Ended, r.Ending = end.At.UnixMicro(), end.Reason
	}
	for i, to := range []*[]string{&r.Actions, &r.Resources, &r.Decisions, &r.Rules, &r.Actors} {
		*to = slices.Sorted(maps.Keys(s.sets[i]))
	}
	r.Partial = s.partial
	r.Trigrams = s.text.filter()
	return r
}

// describe fills in what follows from the header.
func describe(r *Row, h *recording.Header) {
	r.Kind, r.Node, r.Started = h.Kind, h.Node, h.Started.UnixMicro()
	r.Subject, r.SubjectKind, r.Client, r.Protocol = h.Subject, h.SubjectKind, h.Client, h.Protocol
	r.Target, r.Profile, r.Database = h.Target, h.Profile, h.Database
	o := OriginOf(h.Claims)
	r.Repository, r.Ref, r.Commit, r.PullRequest, r.Run = o.Repository, o.Ref, o.Commit, o.PullRequest, o.Run
	for _, k := range slices.Sorted(maps.Keys(h.Claims)) {
		if v, ok := scalar(h.Claims[k]); ok && len(r.Claims) < maxClaims && len(k)+len(v) < maxWord {
			r.Claims = append(r.Claims, k+"="+v)
		}
	}
}

// Origin says what in a CI platform a session came from.
type Origin struct{ Repository, Ref, Commit, PullRequest, Run string }

// The claims that CI platforms name these by, in the order in which they are
// looked for: GitHub, GitLab, Buildkite and what is set by hand.
var (
	repositoryClaims = []string{"repository", "project_path", "repo"}
	refClaims        = []string{"ref", "build_branch", "branch"}
	commitClaims     = []string{"sha", "build_commit", "commit", "commit_sha"}
	pullClaims       = []string{"pull_request", "pull_request_number", "merge_request_iid", "pr"}
	runClaims        = []string{"run_id", "pipeline_id", "build_number", "run"}
)

// OriginOf reads the origin from a token's claims. GitHub's token names a pull
// request by its ref only, refs/pull/N/merge.
func OriginOf(claims map[string]any) Origin {
	get := func(names []string) string {
		for _, n := range names {
			if v, ok := scalar(claims[n]); ok {
				return v
			}
		}
		return ""
	}
	o := Origin{get(repositoryClaims), get(refClaims), get(commitClaims), get(pullClaims), get(runClaims)}
	if o.PullRequest == "" {
		for _, prefix := range []string{"refs/pull/", "refs/merge-requests/"} {
			if rest, ok := strings.CutPrefix(o.Ref, prefix); ok {
				o.PullRequest, _, _ = strings.Cut(rest, "/")
			}
		}
	}
	return o
}

// scalar is a claim's value as text, when it is a single one that fits a row.
func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, v != "" && len(v) <= maxWord
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64), true
	case int:
		return strconv.Itoa(v), true
	}
	return "", false
}

var seed = maphash.MakeSeed()

// digest tells whether two rows are the same, within one process.
func (r *Row) digest() uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	c := *r
	for _, set := range []*[]string{&c.Claims, &c.Actions, &c.Resources, &c.Decisions, &c.Rules, &c.Actors} {
		if len(*set) == 0 {
			*set = nil // a file does not tell an empty list from none
		}
	}
	if len(c.Trigrams) == 0 {
		c.Trigrams = nil
	}
	fmt.Fprintf(&h, "%#v", c)
	return h.Sum64()
}

// byName orders rows for a file.
func byName(a, b Row) int { return cmp.Compare(a.Name, b.Name) }

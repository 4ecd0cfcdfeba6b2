// Package replay reads recordings from a store alone: it lists, verifies and
// shows them. It needs no cluster and no private key, and it trusts nothing the
// store returns: who could write to the store is one of those it is to expose.
package replay

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/format"
)

// Filter selects recordings; zero fields select all.
type Filter struct {
	From, To time.Time // by when they started; From included, To not
	Node     string
	Kind     string // "session" or "node"
	Subject  string
	Target   string
	// Match is asked last, by several goroutines; nil selects all. It must not
	// change the header.
	Match func(*recording.Header) bool
}

func (f *Filter) matches(h *recording.Header) bool {
	switch {
	case !f.From.IsZero() && h.Started.Before(f.From),
		!f.To.IsZero() && !h.Started.Before(f.To),
		f.Node != "" && h.Node != f.Node,
		f.Kind != "" && h.Kind != f.Kind,
		f.Subject != "" && h.Subject != f.Subject,
		f.Target != "" && h.Target != f.Target:
		return false
	}
	return f.Match == nil || f.Match(h)
}

// Summary is one recording in a list. What it says is not verified.
type Summary struct {
	// Name is what Open and Verify find it by at once: "YYYY/MM/DD/session".
	Name     string
	Header   recording.Header
	Segments int               // in the store
	Ending   *recording.Ending // nil: unfinished, or Err
	Entries  uint64            // as the trailer says; 0 when unfinished
	Written  time.Time         // when its newest object was
	Err      error             // why header or trailer cannot be read; Header may be empty
}

const (
	listReaders = 16  // recordings whose header and trailer are read at a time
	listBatch   = 512 // recordings that are read before fn is told of them in order
)

// List calls fn for the recordings that f selects, by day and then by
// session. One whose header cannot be read is passed whatever f says.
func List(ctx context.Context, store recording.Store, f Filter, fn func(Summary) error) error {
	batch := make([]*group, 0, listBatch)
	flush := func() error {
		found := make([]*Summary, len(batch))
		eg, ectx := errgroup.WithContext(ctx)
		eg.SetLimit(listReaders)
		for i, g := range batch {
			eg.Go(func() (err error) {
				found[i], err = summarize(ectx, store, f, g)
				return err
			})
		}
		batch = batch[:0]
		if err := eg.Wait(); err != nil {
			return err
		}
		for _, s := range found {
			if s == nil {
				continue
			}
			if err := fn(*s); err != nil {
				return err
			}
		}
		return nil
	}
	stopped := false
	err := groups(ctx, store, f.From, f.To, func(g *group) error {
		if g.prefix == "" {
			return nil
		}
		if batch = append(batch, g); len(batch) < listBatch {
			return nil
		}
		err := flush()
		stopped = errors.Is(err, recording.ErrStop)
		return err
	})
	if err != nil || stopped {
		return err
	}
	if err := flush(); !errors.Is(err, recording.ErrStop) {
		return err
	}
	return nil
}

// summarize reads what a list tells of a recording; nil when f does not select
// it.
func summarize(ctx context.Context, store recording.Store, f Filter, g *group) (*Summary, error) {
	s := &Summary{Name: g.name(), Segments: len(g.segments), Written: g.written}
	h, err := getHeader(ctx, store, g.prefix)
	if err != nil {
		if !isContent(err) {
			return nil, err
		}
		s.Err = err
		s.Header.Session = g.session()
		return s, nil
	}
	s.Header = h.Header
	if !f.matches(&s.Header) {
		return nil, nil
	}
	if g.trailer {
		b, err := store.Get(ctx, g.prefix+recording.TrailerName)
		if err != nil && !isContent(err) {
			return nil, err
		}
		var t *format.Trailer
		if err == nil {
			t, err = format.ParseTrailer(b)
		}
		if err != nil {
			s.Err = fmt.Errorf("trailer: %w", err)
		} else {
			s.Ending, s.Entries = &t.Ending, t.Entries
		}
	}
	return s, nil
}

func getHeader(ctx context.Context, store recording.Store, prefix string) (*format.Header, error) {
	b, err := store.Get(ctx, prefix+recording.HeaderName)
	if err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	return format.ParseHeader(b)
}

// isContent tells what is wrong with a recording from what is wrong with the
// way to the store.
func isContent(err error) bool {
	return errors.Is(err, format.ErrMalformed) || errors.Is(err, recording.ErrNotFound) || errors.Is(err, recording.ErrTooLarge)
}

// A group is what the listing shows of one recording. With an empty prefix it
// holds objects that belong to none.
type group struct {
	prefix   string
	header   bool
	trailer  bool
	segments []uint64 // ascending
	foreign  []string // keys of other objects, the first maxForeign of them
	written  time.Time
	bytes    int64
}

const maxForeign = 100 // enough to see what is going on

func (g *group) name() string {
	return strings.TrimSuffix(strings.TrimPrefix(g.prefix, recording.Root), "/")
}
func (g *group) session() string { return g.name()[strings.LastIndexByte(g.name(), '/')+1:] }

// add takes an object of this group. Keys come in order, so segments do.
func (g *group) add(o recording.Object) {
	if o.Modified.After(g.written) {
		g.written = o.Modified
	}
	g.bytes += o.Size
	name := strings.TrimPrefix(o.Key, g.prefix)
	switch {
	case g.prefix == "":
	case name == recording.HeaderName:
		g.header = true
		return
	case name == recording.TrailerName:
		g.trailer = true
		return
	default:
		if digits, ok := strings.CutSuffix(name, ".seg"); ok {
			if n, err := strconv.ParseUint(digits, 10, 32); err == nil && n > 0 && recording.SegmentName(n) == name {
				g.segments = append(g.segments, n)
				return
			}
		}
	}
	if len(g.foreign) < maxForeign {
		g.foreign = append(g.foreign, o.Key)
	}
}

// prefixOf returns the recording that key belongs to: sessions/YYYY/MM/DD/ID/.
func prefixOf(key string) (string, bool) {
	rest, ok := strings.CutPrefix(key, recording.Root)
	part := strings.Split(rest, "/")
	if !ok || len(part) != 5 || recording.CheckSession(part[3]) != nil {
		return "", false
	}
	if _, err := time.Parse("2006/01/02", strings.Join(part[:3], "/")); err != nil {
		return "", false
	}
	return strings.TrimSuffix(key, part[4]), true
}

// groups lists the store and calls fn for each recording that began on a day
// from that of from to that of to, and once for objects that belong to none.
func groups(ctx context.Context, store recording.Store, from, to time.Time, fn func(*group) error) error {
	after := ""
	if !from.IsZero() {
		after = recording.Root + from.UTC().Format("2006/01/02") // less than every key of that day
	}
	last := ""
	if !to.IsZero() {
		last = recording.Root + to.UTC().Format("2006/01/02") + "0" // greater than every key of that day
	}
	return between(ctx, store, after, last, fn)
}

// between is groups for the keys after one and up to another, "" for no bound.
func between(ctx context.Context, store recording.Store, after, last string, fn func(*group) error) error {
	var cur *group
	none := &group{}
	stop := false
	flush := func() error {
		if cur == nil {
			return nil
		}
		g := cur
		cur = nil
		return fn(g)
	}
	err := store.List(ctx, recording.Root, after, func(o recording.Object) error {
		if last != "" && o.Key > last {
			return recording.ErrStop
		}
		prefix, ok := prefixOf(o.Key)
		if !ok {
			none.add(o)
			return nil
		}
		if cur == nil || cur.prefix != prefix {
			if err := flush(); err != nil {
				stop = errors.Is(err, recording.ErrStop)
				return err
			}
			cur = &group{prefix: prefix}
		}
		cur.add(o)
		return nil
	})
	if err != nil || stop {
		return err
	}
	err = flush()
	if err == nil && len(none.foreign) > 0 {
		err = fn(none)
	}
	if errors.Is(err, recording.ErrStop) {
		return nil
	}
	return err
}

// find returns the recording of that name: a session, or YYYY/MM/DD/session.
// For a session alone it looks at each day there is, with two short listings.
func find(ctx context.Context, store recording.Store, name string) (*group, error) {
	if prefix := recording.Root + name + "/"; strings.Contains(name, "/") {
		if _, ok := prefixOf(prefix + recording.HeaderName); !ok {
			return nil, fmt.Errorf("recording: %q is neither a session nor YYYY/MM/DD/session", name)
		}
		return list(ctx, store, prefix)
	}
	if err := recording.CheckSession(name); err != nil {
		return nil, err
	}
	var found []string
	days, err := Days(ctx, store, time.Time{}, time.Time{})
	if err != nil {
		return nil, err
	}
	for _, day := range days {
		prefix := recording.Root + day + "/" + name + "/"
		err := store.List(ctx, prefix, "", func(recording.Object) error {
			found = append(found, prefix)
			return recording.ErrStop
		})
		if err != nil {
			return nil, err
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("recording: no recording of session %s in %s: %w", name, store, recording.ErrNotFound)
	case 1:
		return list(ctx, store, found[0])
	}
	return nil, fmt.Errorf("recording: session %s was recorded more than once: name one of them as YYYY/MM/DD/session: %s", name, strings.Join(found, ", "))
}

func list(ctx context.Context, store recording.Store, prefix string) (*group, error) {
	g := &group{prefix: prefix}
	if err := store.List(ctx, prefix, "", func(o recording.Object) error {
		g.add(o)
		return nil
	}); err != nil {
		return nil, err
	}
	if !g.header && !g.trailer && len(g.segments) == 0 {
		return nil, fmt.Errorf("recording: no recording %s in %s: %w", g.name(), store, recording.ErrNotFound)
	}
	return g, nil
}

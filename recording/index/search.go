package index

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
)

// Options say how Search goes about it.
type Options struct {
	Trust replay.Trust
	// Index are the stores whose index is used; none: every recording is read.
	Index []recording.Store
	// Limit ends the search after so many hits: 1000 when zero.
	Limit int
	// Progress, when not nil, is told how many recordings are decided of how
	// many that were listed so far. It must be quick.
	Progress func(done, listed int)
}

// Hit is a recording that matches, as it was read from the store.
type Hit struct {
	Name    string            `json:"name"`
	Header  recording.Header  `json:"header"`
	Ending  *recording.Ending `json:"ending,omitempty"`
	Entries uint64            `json:"entries"`
	// State is verified, unfinished (whole as far as it goes) or broken; Problem
	// says why.
	State   string `json:"state"`
	Problem string `json:"problem,omitempty"`
	// Matches counts the operations that match, when one was asked for;
	// Operations are the first of them.
	Matches    int         `json:"matches,omitempty"`
	Operations []Operation `json:"operations,omitempty"`
	// Indexed says that the index led to it; Contradicted that the index holds
	// a row of this recording that does not follow from it.
	Indexed      bool `json:"indexed"`
	Contradicted bool `json:"contradicted,omitempty"`
}

// Stats say how a search went.
type Stats struct {
	Listed   int  `json:"listed"`    // recordings of the days in question
	LookedUp int  `json:"looked_up"` // that the index decided about, or led to
	Scanned  int  `json:"scanned"`   // that it does not cover: their header was read, and the rest where it had to be
	Read     int  `json:"read"`      // to their end
	Hits     int  `json:"hits"`
	More     bool `json:"more"` // the limit ended the search
	// Broken are recordings that are not as their node wrote them and do not
	// match as far as they can be read: what they held is not known.
	Broken     []string `json:"broken,omitempty"`
	MoreBroken int      `json:"more_broken,omitempty"`
	// Contradicted are recordings that do not match although the index said so
	// in a row that does not follow from them.
	Contradicted []string  `json:"contradicted,omitempty"`
	IndexFiles   int       `json:"index_files"`
	BadFiles     []BadFile `json:"bad_index_files,omitempty"`
}

const (
	// readers is how many recordings are read at a time; each holds a segment,
	// decompressed.
	readers = 8
	// batch is how many candidates are read before their hits are passed on in
	// order.
	batch = 256
	// maxDay bounds the recordings of one day: what is kept of each in memory is
	// some 300 bytes.
	maxDay      = 5_000_000
	maxNamed    = 100 // recordings that Stats name
	defaultHits = 1000
)

// candidate is a recording of the day in question.
type candidate struct {
	item    replay.Item
	covered bool
	match   bool   // by the index
	digest  uint64 // of the row that says so
}

// Search calls each with every recording of the store that matches q, in the
// order of their names.
//
// A recording that the index does not cover, or covers as it was before, is
// read. Whether one is missed that the index covers depends on the truth of the
// index: ask without one when that matters.
func Search(ctx context.Context, store recording.Store, q Query, o Options, each func(*Hit) error) (*Stats, error) {
	if o.Trust.Roots == nil {
		return nil, errors.New("recording: searching needs the cluster's CA certificate")
	}
	if err := q.prepare(); err != nil {
		return nil, err
	}
	if o.Limit == 0 {
		o.Limit = defaultHits
	}
	o.Trust.Remember()
	s := &searcher{store: store, q: &q, o: o, each: each, stats: &Stats{}}
	from, to := q.days()
	err := days(ctx, store, from, to, func(day string, items []replay.Item) error {
		return s.day(ctx, day, items)
	})
	if errors.Is(err, errLimit) {
		s.stats.More, err = true, nil
	}
	return s.stats, err
}

var errLimit = errors.New("recording: as many hits as were asked for")

// daysAhead is how many days are listed while one is worked on: a bucket gives a
// thousand names for each request, one after another.
const daysAhead = 3

// days lists the store and calls fn with the recordings of each day.
func days(ctx context.Context, store recording.Store, from, to time.Time, fn func(day string, items []replay.Item) error) error {
	names, err := replay.Days(ctx, store, from, to)
	if err != nil {
		return err
	}
	type listing struct {
		items []replay.Item
		err   error
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	lists := make([]chan listing, len(names))
	start := func(i int) {
		if i >= len(names) {
			return
		}
		lists[i] = make(chan listing, 1)
		wg.Go(func() {
			items, err := replay.DayItems(ctx, store, names[i], maxDay)
			lists[i] <- listing{items, err}
		})
	}
	for i := range daysAhead {
		start(i)
	}
	for i, day := range names {
		l := <-lists[i]
		start(i + daysAhead)
		if l.err != nil {
			return l.err
		}
		if len(l.items) == 0 {
			continue
		}
		if err := fn(day, l.items); err != nil {
			return err
		}
	}
	return nil
}

type searcher struct {
	store recording.Store
	q     *Query
	o     Options
	each  func(*Hit) error
	stats *Stats
	done  int
}

func (s *searcher) day(ctx context.Context, day string, items []replay.Item) error {
	s.stats.Listed += len(items)
	cands := make([]candidate, len(items))
	place := make(map[string]int, len(items))
	for i, it := range items {
		cands[i].item = it
		place[it.Name()] = i
	}
	if len(s.o.Index) > 0 {
		d, err := load(ctx, s.o.Index, day, func(r *Row) {
			i, ok := place[r.Name]
			if !ok || !covers(r, cands[i].item) || !cands[i].item.Finished() {
				return
			}
			// When rows differ, one that matches is enough.
			c := &cands[i]
			c.covered = true
			if s.q.row(r) {
				c.match, c.digest = true, r.digest()
			}
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil: // what it covers is scanned
			s.stats.BadFiles = append(s.stats.BadFiles, BadFile{dayPrefix(day), err.Error()})
		default:
			s.stats.IndexFiles += len(d.names)
			s.stats.BadFiles = append(s.stats.BadFiles, d.bad[:min(len(d.bad), maxNamed)]...)
		}
	}
	clear(place)
	for part := cands; len(part) > 0; {
		todo := make([]*candidate, 0, batch)
		n := 0
		for ; n < len(part) && len(todo) < batch; n++ {
			c := &part[n]
			if c.covered {
				s.stats.LookedUp++
			} else {
				s.stats.Scanned++
			}
			if !c.covered || c.match {
				todo = append(todo, c)
			}
		}
		part = part[n:]
		if err := s.readAll(ctx, todo); err != nil {
			return err
		}
		if s.done += n; s.o.Progress != nil {
			s.o.Progress(s.done, s.stats.Listed)
		}
	}
	return nil
}

// readAll reads candidates and passes on those that match.
func (s *searcher) readAll(ctx context.Context, todo []*candidate) error {
	found := make([]*finding, len(todo))
	eg, ectx := errgroup.WithContext(ctx)
	eg.SetLimit(readers)
	for i, c := range todo {
		eg.Go(func() (err error) {
			found[i], err = s.read(ectx, c)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	for _, f := range found {
		if f.whole {
			s.stats.Read++
		}
		switch {
		case f.hit != nil:
			if s.stats.Hits == s.o.Limit {
				return errLimit
			}
			s.stats.Hits++
			if err := s.each(f.hit); err != nil {
				return err
			}
		case f.broken:
			if len(s.stats.Broken) < maxNamed {
				s.stats.Broken = append(s.stats.Broken, f.name)
			} else {
				s.stats.MoreBroken++
			}
		case f.contradicted && len(s.stats.Contradicted) < maxNamed:
			s.stats.Contradicted = append(s.stats.Contradicted, f.name)
		}
	}
	return nil
}

// finding is what was read of a candidate.
type finding struct {
	name                        string
	hit                         *Hit // nil: no match
	whole, broken, contradicted bool
}

func (s *searcher) read(ctx context.Context, c *candidate) (*finding, error) {
	f := &finding{name: c.item.Name()}
	m := &matcher{q: s.q}
	sum := &summary{}
	ops := s.q.wantsOperation()
	res, err := c.item.Read(ctx, s.store, s.o.Trust, replay.Reading{
		Want: func(h *recording.Header) bool {
			var r Row
			describe(&r, h)
			return c.match || s.q.session(&r)
		},
		Each: func(e *recording.Entry) error {
			if c.match {
				sum.add(e)
			}
			if ops {
				m.add(e)
			}
			return nil
		},
	})
	if errors.Is(err, recording.ErrStop) {
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	f.whole = true
	state := res.State()
	f.broken = state == "broken"
	if res.Header == nil {
		return f, nil
	}
	if c.match && !f.broken {
		row := sum.finish(c.item, res.Header, res.Ending)
		f.contradicted = row.digest() != c.digest
	}
	var r Row
	describe(&r, res.Header)
	if res.Ending != nil {
		r.Ended = res.Ending.At.UnixMicro()
	}
	if !s.q.session(&r) || ops && m.n == 0 {
		return f, nil
	}
	f.hit = &Hit{
		Name: f.name, Header: *res.Header, Ending: res.Ending, Entries: res.Entries, State: state, Problem: res.Why(),
		Matches: m.n, Operations: m.operations(), Indexed: c.match, Contradicted: f.contradicted,
	}
	return f, nil
}

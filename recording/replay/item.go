package replay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/terminal"
)

// Item is one recording as a listing of the store shows it: nothing of it has
// been read.
type Item struct{ g *group }

// Items calls fn for each recording that began on a day from that of from to
// that of to (zero: no bound), by day and then by session. It ends with fn's
// error, without one when that is recording.ErrStop.
func Items(ctx context.Context, store recording.Store, from, to time.Time, fn func(Item) error) error {
	return groups(ctx, store, from, to, func(g *group) error {
		if g.prefix == "" {
			return nil
		}
		return fn(Item{g})
	})
}

// Days returns the days, YYYY/MM/DD, from that of from to that of to (zero: no
// bound) that recordings in the store began on, with a short listing for each.
func Days(ctx context.Context, store recording.Store, from, to time.Time) ([]string, error) {
	after := ""
	if !from.IsZero() {
		after = recording.Root + from.UTC().Format("2006/01/02") // less than every key of that day
	}
	last := ""
	if !to.IsZero() {
		last = recording.Root + to.UTC().Format("2006/01/02") + "0" // greater than every key of that day
	}
	var days []string
	for {
		day := ""
		err := store.List(ctx, recording.Root, after, func(o recording.Object) error {
			if last != "" && o.Key > last {
				return recording.ErrStop
			}
			if prefix, ok := prefixOf(o.Key); ok {
				day = prefix[len(recording.Root):len(recording.Root+"2006/01/02")]
				return recording.ErrStop
			}
			return nil
		})
		if err != nil || day == "" {
			return days, err
		}
		days = append(days, day)
		after = recording.Root + day + "0"
	}
}

const (
	// plainDay is how many recordings of a day are listed before the rest is
	// listed in parts.
	plainDay  = 2000
	listParts = 4 // at a time
)

// partsOfDay are beginnings of sessions at which a large day's listing is cut:
// ids are lower-case letters and digits from 2 to 7, each as often as another.
var partsOfDay = []string{"5", "a", "e", "i", "m", "q", "u"}

// DayItems returns the recordings of a day, YYYY/MM/DD, at most max of them, by
// session. A bucket gives a thousand names for each request, one after another,
// so a day of many is listed in parts side by side.
func DayItems(ctx context.Context, store recording.Store, day string, max int) ([]Item, error) {
	if _, err := time.Parse("2006/01/02", day); err != nil {
		return nil, fmt.Errorf("recording: %q is no day", day)
	}
	root := recording.Root + day + "/"
	list := func(ctx context.Context, after, last string, most int) (items []Item, err error) {
		err = between(ctx, store, after, last, func(g *group) error {
			if g.prefix == "" {
				return nil
			}
			if len(items) == most {
				return errMoreItems
			}
			items = append(items, Item{g})
			return nil
		})
		return items, err
	}
	end := recording.Root + day + "0" // after every key of the day
	first, err := list(ctx, root, end, min(max, plainDay))
	if !errors.Is(err, errMoreItems) {
		return first, err
	}
	if max <= plainDay {
		return nil, fmt.Errorf("recording: more than %d recordings on %s", max, day)
	}
	after := root + first[len(first)-1].g.session() + "0" // after every key of that session
	bounds := []string{after}
	for _, p := range partsOfDay {
		if root+p > after {
			bounds = append(bounds, root+p)
		}
	}
	bounds = append(bounds, end)
	parts := make([][]Item, len(bounds)-1)
	eg, ectx := errgroup.WithContext(ctx)
	eg.SetLimit(listParts)
	for i := range parts {
		eg.Go(func() (err error) {
			parts[i], err = list(ectx, bounds[i], bounds[i+1], max)
			return err
		})
	}
	if err := eg.Wait(); err != nil && !errors.Is(err, errMoreItems) {
		return nil, err
	}
	all := first
	for _, p := range parts {
		if all = append(all, p...); len(all) > max {
			return nil, fmt.Errorf("recording: more than %d recordings on %s", max, day)
		}
	}
	return all, nil
}

var errMoreItems = errors.New("recording: more than were asked for")

// Find returns the recording of that name: a session, or YYYY/MM/DD/session.
func Find(ctx context.Context, store recording.Store, name string) (Item, error) {
	g, err := find(ctx, store, name)
	return Item{g}, err
}

// Name is the recording's: YYYY/MM/DD/session.
func (i Item) Name() string { return i.g.name() }

// Day is the first part of its name: YYYY/MM/DD.
func (i Item) Day() string { return i.g.name()[:len("2006/01/02")] }

// Finished says that the store has its header and its trailer, so that no
// object will be added.
func (i Item) Finished() bool { return i.g.header && i.g.trailer }

// Objects and Bytes are how many objects of it the store has, and their size.
func (i Item) Objects() int {
	return len(i.g.segments) + len(i.g.foreign) + btoi(i.g.header) + btoi(i.g.trailer)
}

// Bytes is the size of its objects together.
func (i Item) Bytes() int64 { return i.g.bytes }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// A Reading says what of a recording is wanted. Nil functions want all, and
// nothing.
type Reading struct {
	// Want is asked about a header that is the node's; when it says no, nothing
	// more is read and Read returns recording.ErrStop.
	Want func(*recording.Header) bool
	// Each gets the entries in order: those of segments that are the node's, in
	// their place. Its error ends the reading and is returned.
	Each func(*recording.Entry) error
}

// Read verifies the recording to its end and passes on what can be believed.
// What is wrong is in the Result, as for Verify; the error is one of reading the
// store, or of the Reading. One segment at a time is in memory.
func (i Item) Read(ctx context.Context, store recording.Store, trust Trust, o Reading) (*Result, error) {
	if trust.Roots == nil {
		return nil, errors.New("recording: reading needs the cluster's CA certificate")
	}
	c := newCheck(store, trust, i.g)
	c.want, c.each = o.Want, o.Each
	if err := c.run(ctx); err != nil {
		return nil, err
	}
	c.res.Believed = c.valid
	return &c.res, nil
}

// State names what was found in a word: verified, unfinished or broken.
func (r *Result) State() string {
	switch {
	case r.Verified():
		return "verified"
	case len(r.Problems) == 1 && r.Problems[0].Kind == Unfinished:
		return "unfinished"
	}
	return "broken"
}

// Why is the first problem, safe to show; "" when there is none.
func (r *Result) Why() string {
	if len(r.Problems) == 0 {
		return ""
	}
	p := r.Problems[0]
	return terminal.EscapeLine(string(p.Kind) + " " + p.Object + ": " + p.Text)
}

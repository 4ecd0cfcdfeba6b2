package index

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
)

// BuildOptions say what Build does.
type BuildOptions struct {
	Trust replay.Trust
	// From and To are the days: From's to To's, both included; zero for no bound.
	From, To time.Time
	// Index are the stores whose index is taken up; To is where new files go,
	// one of them as a rule. With a nil Write nothing is written.
	Index []recording.Store
	Write recording.Store
	// Rebuild reads every recording and believes no row there is. Check too, and
	// names the rows that do not follow from their recordings; it writes nothing.
	Rebuild, Check bool
	Progress       func(done, listed int)
}

// BuildReport is what Build did.
type BuildReport struct {
	Days, Written int // days looked at; files written
	Listed        int // recordings
	Rows          int // in the index now, of the days that were written
	Read          int // recordings that were read to make or check a row
	Unfinished    int // not in the index: they are not closed
	// Broken are not in the index as they are not what their node wrote.
	// Contradicted have a row that does not follow from them.
	Broken, Contradicted         []string
	MoreBroken, MoreContradicted int
	BadFiles                     []BadFile
}

// Build brings the index up to date from the store alone: it reads the finished
// recordings that the index does not cover and writes each day that had any, or
// several files, anew as one generation. The rows of one day are in memory,
// about a kilobyte each.
func Build(ctx context.Context, store recording.Store, o BuildOptions) (*BuildReport, error) {
	if o.Trust.Roots == nil {
		return nil, errors.New("recording: indexing needs the cluster's CA certificate")
	}
	o.Trust.Remember()
	rep := &BuildReport{}
	done := 0
	err := days(ctx, store, o.From, o.To, func(day string, items []replay.Item) error {
		rep.Days++
		rep.Listed += len(items)
		err := buildDay(ctx, store, day, items, &o, rep, func(n int) {
			if done += n; o.Progress != nil {
				o.Progress(done, rep.Listed)
			}
		})
		return err
	})
	return rep, err
}

func buildDay(ctx context.Context, store recording.Store, day string, items []replay.Item, o *BuildOptions, rep *BuildReport, progress func(int)) error {
	place := make(map[string]int, len(items))
	for i, it := range items {
		place[it.Name()] = i
	}
	rows := make([]*Row, len(items))
	differ := make(map[int]bool) // rows of which there are several, not the same
	d, err := load(ctx, o.Index, day, func(r *Row) {
		i, ok := place[r.Name]
		if !ok || !items[i].Finished() || !covers(r, items[i]) {
			return
		}
		if rows[i] != nil && rows[i].digest() != r.digest() {
			differ[i] = true
		}
		c := *r
		rows[i] = &c
	})
	if err != nil {
		return err
	}
	rep.BadFiles = append(rep.BadFiles, d.bad[:min(len(d.bad), maxNamed)]...)
	changed := d.loose > 0 || len(d.bad) > 0 || o.Rebuild
	type made struct {
		row    *Row
		broken bool
	}
	for from := 0; from < len(items); from += batch {
		part := items[from:min(from+batch, len(items))]
		got := make([]made, len(part))
		read := make([]bool, len(part))
		eg, ectx := errgroup.WithContext(ctx)
		eg.SetLimit(readers)
		for i, it := range part {
			known := rows[from+i] != nil && !differ[from+i]
			if !it.Finished() {
				rep.Unfinished++
				continue
			}
			if known && !o.Rebuild && !o.Check {
				continue
			}
			read[i] = true
			eg.Go(func() error {
				row, err := RowOf(ectx, store, it, o.Trust)
				if errors.Is(err, errBroken) {
					got[i].broken = true
					return nil
				}
				got[i].row = row
				return err
			})
		}
		if err := eg.Wait(); err != nil {
			return err
		}
		for i := range part {
			if !read[i] {
				continue
			}
			rep.Read++
			old, now := rows[from+i], got[i].row
			if got[i].broken {
				name(&rep.Broken, &rep.MoreBroken, part[i].Name())
			}
			if old != nil && (now == nil || differ[from+i] || old.digest() != now.digest()) {
				name(&rep.Contradicted, &rep.MoreContradicted, part[i].Name())
				changed = true
			}
			changed = changed || now != nil && old == nil
			rows[from+i] = now
		}
		progress(len(part))
	}
	if !changed || o.Write == nil || o.Check {
		return nil
	}
	all := make([]Row, 0, len(rows))
	for _, r := range rows {
		if r != nil {
			all = append(all, *r)
		}
	}
	slices.SortFunc(all, byName)
	return writeDay(ctx, o.Write, day, d, all, rep)
}

func name(list *[]string, more *int, n string) {
	if len(*list) < maxNamed {
		*list = append(*list, n)
	} else {
		*more++
	}
}

// writeDay writes the day's next generation.
func writeDay(ctx context.Context, store recording.Store, day string, d *dayIndex, all []Row, rep *BuildReport) error {
	parts := split(all)
	gen := d.newest + 1
	for try := 0; ; try++ {
		err := writeGeneration(ctx, store, day, gen, parts, d.nodes, rep)
		if !errors.Is(err, recording.ErrExists) || try == 10 {
			if err == nil {
				rep.Rows += len(all)
			}
			return err
		}
		gen++ // somebody else writes one too
	}
}

func writeGeneration(ctx context.Context, store recording.Store, day string, gen int, parts [][]Row, supersedes []string, rep *BuildReport) error {
	for i, p := range parts {
		m := meta{Parts: len(parts)}
		if i == 0 {
			m.Supersedes = supersedes
		}
		b, err := encode(day, m, p)
		if err != nil {
			return err
		}
		if err := put(ctx, store, dayPrefix(day)+dayName(gen, i+1), b); err != nil {
			return err
		}
		rep.Written++
	}
	return nil
}

// errBroken: the recording is not as its node wrote it.
var errBroken = errors.New("recording: broken")

// RowOf reads a finished recording and returns its row.
func RowOf(ctx context.Context, store recording.Store, item replay.Item, trust replay.Trust) (*Row, error) {
	sum := &summary{}
	res, err := item.Read(ctx, store, trust, replay.Reading{Each: func(e *recording.Entry) error {
		sum.add(e)
		return nil
	}})
	if err != nil {
		return nil, err
	}
	if !res.Verified() {
		return nil, fmt.Errorf("%w: %s: %s", errBroken, item.Name(), res.Why())
	}
	r := sum.finish(item, res.Header, res.Ending)
	return &r, nil
}

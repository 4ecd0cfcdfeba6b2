package index

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
)

const (
	// waiting bounds the recordings that an Appender still has to read. What
	// comes above it is left to `recordings index`.
	waiting = 10_000
	// appendRows and appendAge close a file.
	appendRows = 1000
	appendAge  = 5 * time.Minute
	// readTimeout bounds the reading of one recording.
	readTimeout = 2 * time.Minute
	// farewell is how long an Appender that is stopped may take for the rows it
	// has.
	farewell = 5 * time.Second
)

// Appender adds a node's finished recordings to the index: it reads each back
// from the store, so that a row says what is there, and writes rows in small
// files. What it cannot add is left out without harm: Search reads it.
type Appender struct {
	store recording.Store
	trust replay.Trust
	log   *slog.Logger
	queue chan string
	age   time.Duration
}

// NewAppender returns an Appender for recordings in store that trust holds for.
func NewAppender(store recording.Store, trust replay.Trust, log *slog.Logger) *Appender {
	return &Appender{store: store, trust: trust, log: log, queue: make(chan string, waiting), age: appendAge}
}

// Stored tells that the recording of that name, YYYY/MM/DD/session, is in the
// store to its end. It does not block.
func (a *Appender) Stored(name string) {
	select {
	case a.queue <- name:
	default: // as many wait as may
	}
}

// Run adds recordings until ctx ends.
func (a *Appender) Run(ctx context.Context) error {
	days := map[string][]Row{}
	rows := 0
	flush := func(ctx context.Context) {
		for day, r := range days {
			if err := a.write(ctx, day, r); err != nil {
				a.log.Warn("recordings were not added to the index; they are found all the same, more slowly, and `sallyport recordings index` adds them", "day", day, "recordings", len(r), "err", err)
			}
		}
		clear(days)
		rows = 0
	}
	t := time.NewTicker(a.age)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
			defer cancel()
			flush(fctx)
			return nil
		case <-t.C:
			flush(ctx)
		case name := <-a.queue:
			row, err := a.row(ctx, name)
			if err != nil {
				if ctx.Err() == nil {
					a.log.Warn("a recording was not added to the index", "recording", name, "err", err)
				}
				continue
			}
			day := row.Name[:len("2006/01/02")]
			days[day] = append(days[day], *row)
			if rows++; rows >= appendRows {
				flush(ctx)
			}
		}
	}
}

func (a *Appender) row(ctx context.Context, name string) (*Row, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	item, err := replay.Find(ctx, a.store, name)
	if err != nil {
		return nil, err
	}
	if !item.Finished() {
		return nil, errors.New("it is not in the store to its end")
	}
	return RowOf(ctx, a.store, item, a.trust)
}

// write makes a file of rows.
func (a *Appender) write(ctx context.Context, day string, rows []Row) error {
	slices.SortFunc(rows, byName)
	b, err := encode(day, meta{}, rows)
	if err != nil {
		return err
	}
	key := fmt.Sprintf("%snode.%s.%013d.%08x.parquet", dayPrefix(day), rows[0].Node, time.Now().UnixMilli(), rand.Uint32())
	return put(ctx, a.store, key, b)
}

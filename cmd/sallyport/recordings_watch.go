package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
)

func recordingsWatch(s *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use: "watch SESSION", Short: "Follow a live session", Args: exactArgs("SESSION"),
		Long: `Shows what a live session has done and follows it, whichever node it runs on and
whichever is asked. It shows what is recorded: masked values are masked. Each
look is a call of the API, recorded, which needs the action sessions:watch.
What is shown comes from the node and is not verified; when the session has
ended, the rest is read from the store, if it can be, and verified.`,
		Example: `  sallyport sessions list
  sallyport recordings watch ge27fhwculckxrxt`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := s.client()
			if err != nil {
				return err
			}
			return watch(cmd.Context(), cmd.OutOrStdout(), cl, s, args[0])
		},
	}
}

const (
	watchWait = 20 * time.Second
	// watchPatience is how long a node may be away before watching ends.
	watchPatience = time.Minute
	// storeWait is how long the end of a session is waited for in the store.
	storeWait = 10 * time.Second
)

func watch(ctx context.Context, w io.Writer, cl *api.Client, s *storeFlags, session string) error {
	var last *api.Watched
	var p *replay.EntryPrinter
	show := func(e *recording.Entry) error {
		if s.json {
			return printJSON(w, e)
		}
		if p == nil {
			p = replay.NewEntryPrinter(w, e.At, "postgres", formatData())
			say(w, "session %s; times are since %s", session, stamp(e.At))
		}
		return p.Print(e)
	}
	var failing time.Time
	for {
		v, err := cl.Watch(ctx, session, last, watchWait)
		var f *api.Failure
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &f) && f.Status == http.StatusNotFound && last != nil:
			return watchRest(ctx, w, s, last, show)
		case errors.As(err, &f) && f.Status != http.StatusServiceUnavailable && f.Status != http.StatusBadGateway:
			return err
		case err != nil:
			if failing.IsZero() {
				failing = time.Now()
			}
			if last == nil || time.Since(failing) > watchPatience {
				return err
			}
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		failing, last = time.Time{}, v
		for i := range v.Entries {
			if err := show(&v.Entries[i]); err != nil {
				return err
			}
		}
		if v.Ending != nil {
			if !s.json {
				say(w, "ended: %s  %s", v.Ending.Reason, v.Ending.Detail)
			}
			return nil
		}
	}
}

// watchRest shows what came after the last look, from the store.
func watchRest(ctx context.Context, w io.Writer, s *storeFlags, last *api.Watched, show func(*recording.Entry) error) error {
	hint := fmt.Errorf("the session has ended; its last entries may be missing here: sallyport recordings replay %s", last.Name)
	store, trust, err := s.open(ctx)
	if err != nil {
		return hint
	}
	for deadline := time.Now().Add(storeWait); ; {
		r, err := replay.Open(ctx, store, last.Name, trust)
		if err != nil {
			return errors.Join(hint, err)
		}
		var rest []recording.Entry
		for e, err := range r.Entries(ctx) {
			if err != nil {
				return errors.Join(hint, err)
			}
			if uint64(e.LSN) > last.After && len(rest) < 10_000 { // what a session does between two looks
				rest = append(rest, *e)
			}
		}
		if r.Ending == nil && time.Now().Before(deadline) {
			select {
			case <-time.After(200 * time.Millisecond):
				continue
			case <-ctx.Done():
				return nil
			}
		}
		for i := range rest {
			if err := show(&rest[i]); err != nil {
				return err
			}
		}
		if r.Ending == nil {
			return hint
		}
		if !s.json {
			say(w, "ended: %s  %s", r.Ending.Reason, r.Ending.Detail)
		}
		return nil
	}
}

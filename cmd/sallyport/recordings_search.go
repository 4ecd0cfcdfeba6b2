package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/index"
	"github.com/sallyport/sallyport/recording/upload"
)

// indexDir opens the directory that an auditor keeps the index in who cannot
// write to the store; nil when there is none.
func indexDir(ctx context.Context, dir string) (recording.Store, error) {
	if dir == "" {
		return nil, nil
	}
	return upload.Open(ctx, dir)
}

// bar is a progress bar on a terminal; it does nothing elsewhere.
type bar struct{ b *progressbar.ProgressBar }

func newBar(what string, o ...progressbar.Option) *bar {
	if !isTerminal(os.Stderr) {
		return &bar{}
	}
	o = append([]progressbar.Option{progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetDescription(what),
		progressbar.OptionShowCount(), progressbar.OptionShowIts(), progressbar.OptionThrottle(100 * time.Millisecond),
		progressbar.OptionClearOnFinish(), progressbar.OptionSetRenderBlankState(true)}, o...)
	return &bar{progressbar.NewOptions64(-1, o...)}
}

// set shows how much is done of how much there is known to be.
func (b *bar) set(done, of int64) {
	if b.b == nil || of <= 0 {
		return
	}
	if b.b.GetMax64() != of {
		b.b.ChangeMax64(of)
	}
	_ = b.b.Set64(done) // what cannot be drawn is not missed
}

func (b *bar) finish() {
	if b.b != nil {
		_ = b.b.Finish()
	}
}

// parseTime reads a day or a time; a day is its beginning in UTC.
func parseTime(flag, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339Nano, time.DateOnly, "2006-01-02T15:04:05", "2006-01-02T15:04"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, usageError{fmt.Errorf("--%s: %q is neither a day (2026-11-28) nor a time (2026-11-28T14:00:00Z)", flag, s)}
}

// timeFlags are --since, --from and --to.
type timeFlags struct {
	since    time.Duration
	from, to string
}

func (t *timeFlags) register(c *cobra.Command, what string) {
	fl := c.Flags()
	fl.DurationVar(&t.since, "since", 0, "only "+what+" within this time until now, such as 24h")
	fl.StringVar(&t.from, "from", "", "only "+what+" from then on: a day or a time, UTC")
	fl.StringVar(&t.to, "to", "", "only "+what+" before then")
}

func (t *timeFlags) parse() (from, to time.Time, err error) {
	if from, err = parseTime("from", t.from); err != nil {
		return
	}
	if to, err = parseTime("to", t.to); err != nil {
		return
	}
	if t.since > 0 {
		if !from.IsZero() {
			return from, to, usageError{errors.New("--since and --from say the same: give one")}
		}
		from = time.Now().Add(-t.since)
	}
	return from, to, nil
}

func recordingsSearch(s *storeFlags) *cobra.Command {
	var q index.Query
	var times timeFlags
	var o index.Options
	var noIndex bool
	var dir string
	c := &cobra.Command{
		Use: "search", Short: "Find recordings by who, where from, what was done and what was sent", Args: noArgs,
		Long: `Finds sessions, and the operations in them, that are as all flags say. A * in a
flag's value stands for any characters (not in --text). What is asked about an
operation (--action, --table, --decision, --rule, --actor, --text) must be true
of the same one.

The index beside the recordings makes it quick. It is a hint: every recording
that is shown was read and verified, recordings that the index does not cover
are read, and the last line says how many. Who can write to the store could
have the index keep a recording from being found: --no-index reads them all.`,
		Example: `  sallyport recordings search --repository acme/shop --commit 4f2c1e9 --decision refuse
  sallyport recordings search --table public.users --action 'postgres:delete' --since 720h
  sallyport recordings search --text 'drop table' --from 2026-11-01 --to 2026-12-01`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if q.From, q.To, err = times.parse(); err != nil {
				return err
			}
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			o.Trust = trust
			if !noIndex {
				o.Index = []recording.Store{store}
				local, err := indexDir(cmd.Context(), dir)
				if err != nil {
					return err
				}
				if local != nil {
					o.Index = append(o.Index, local)
				}
			}
			b := newBar("searching")
			o.Progress = func(done, listed int) { b.set(int64(done), int64(listed)) }
			hits := []*index.Hit{}
			w := cmd.OutOrStdout()
			stats, err := index.Search(cmd.Context(), store, q, o, func(h *index.Hit) error {
				if s.json {
					hits = append(hits, h)
				} else {
					printHit(w, h)
				}
				return nil
			})
			b.finish()
			if err != nil {
				return err
			}
			if s.json {
				return printJSON(w, struct {
					Hits  []*index.Hit `json:"hits"`
					Stats *index.Stats `json:"stats"`
				}{hits, stats})
			}
			printStats(w, stats)
			return nil
		},
	}
	fl := c.Flags()
	for _, f := range []struct {
		to          *string
		name, usage string
	}{
		{&q.Subject, "subject", "whose session: provider/name"},
		{&q.Repository, "repository", "from which repository (claim repository, project_path or repo)"},
		{&q.Ref, "ref", "from which ref (claim ref, build_branch or branch)"},
		{&q.Commit, "commit", "from which commit, or its first digits (claim sha, build_commit, commit or commit_sha)"},
		{&q.PullRequest, "pull-request", "from which pull or merge request (its claim, or ref refs/pull/N/…)"},
		{&q.Run, "run", "from which run (claim run_id, pipeline_id, build_number or run)"},
		{&q.Target, "target", "to which target"},
		{&q.Profile, "profile", "with which profile"},
		{&q.Database, "database", "to which database"},
		{&q.Client, "client", "from which address"},
		{&q.Node, "node", "through which node"},
		{&q.Kind, "kind", "session, or node for nodes' own recordings (refused logins, API calls)"},
		{&q.Action, "action", "an operation with this action: postgres:drop_table, postgres:drop_*"},
		{&q.Table, "table", "on this table, or anything whose name has this part: users, public.users, shop.public.users.email"},
		{&q.Decision, "decision", "that was decided so: permit, refuse or hold"},
		{&q.Rule, "rule", "by this rule"},
		{&q.Actor, "actor", "that this one approved or denied; in nodes' recordings, who called or was refused"},
		{&q.Text, "text", "in whose text this is, whatever the case of letters and the white space"},
	} {
		fl.StringVar(f.to, f.name, "", f.usage)
	}
	fl.StringArrayVar(&q.Claims, "claim", nil, "whose token has this claim: NAME=VALUE; may be given again")
	times.register(c, "what went on")
	fl.IntVar(&o.Limit, "limit", 1000, "stop after so many recordings")
	fl.BoolVar(&noIndex, "no-index", false, "believe no index: read every recording")
	fl.StringVar(&dir, "index-dir", "", "use the index in this directory too")
	return c
}

func printHit(w io.Writer, h *index.Hit) {
	hd := &h.Header
	ended := "going on, or cut off"
	if h.Ending != nil {
		ended = h.Ending.Reason
	}
	to := hd.Target + "/" + hd.Database
	if hd.Kind == "node" {
		to = "(the node's own)"
	}
	say(w, "%s  %s  %s  %s  %s  %s  %s", h.Name, stamp(hd.Started), hd.Node, first(hd.Subject, "-"), to, ended, h.State)
	if h.Problem != "" && h.State == "broken" {
		say(w, "    BROKEN: %s", h.Problem)
	}
	if h.Contradicted {
		say(w, "    the index holds a row that does not follow from this recording")
	}
	for _, op := range h.Operations {
		say(w, "    %s  #%d %s", stamp(op.At), uint64(op.LSN), strings.Join(nonEmpty(op.Verb, op.Decision, op.Rule, op.Actor, brief(op.Text)), "  "))
	}
	if n := h.Matches - len(h.Operations); n > 0 {
		say(w, "    and %d more", n)
	}
}

func nonEmpty(parts ...string) []string {
	var out []string
	for _, p := range parts {
		if p != "" {
			out = append(out, p)
		}
	}
	return out
}

// brief is a statement on one line.
func brief(text string) string {
	const most = 160
	line := []rune(strings.Join(strings.Fields(text), " "))
	if len(line) > most {
		return string(line[:most]) + " …"
	}
	return string(line)
}

func printStats(w io.Writer, st *index.Stats) {
	for _, f := range st.BadFiles {
		say(w, "index: %s cannot be used: %s", f.Key, f.Why)
	}
	for _, n := range st.Contradicted {
		say(w, "index: it led to %s in a row that does not follow from that recording", n)
	}
	for _, n := range st.Broken {
		say(w, "BROKEN: %s is not as its node wrote it, so what it held is not known: `recordings verify %s`", n, n)
	}
	if st.MoreBroken > 0 {
		say(w, "and %d more that are broken", st.MoreBroken)
	}
	if st.More {
		say(w, "There are more: raise --limit, or ask more narrowly.")
	}
	say(w, "%d match of %d recordings: %d looked up in the index (%d files), %d scanned; %d read to their end.",
		st.Hits, st.Listed, st.LookedUp, st.IndexFiles, st.Scanned, st.Read)
}

func recordingsIndex(s *storeFlags) *cobra.Command {
	var o index.BuildOptions
	var times timeFlags
	var dir string
	c := &cobra.Command{
		Use: "index", Short: "Bring the index up to date, from the store alone", Args: noArgs,
		Long: `Nodes add the recordings they finish to the index in small files. This puts the
files of each day together, adds what they lack, and writes the day anew beside
them: nothing is overwritten. It reads recordings that the index does not cover,
and with --rebuild or --check all of them.

It needs to write to the store. Who may not keeps an index of his own with
--index-dir, and gives the same to search.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.From, o.To, err = times.parse(); err != nil {
				return err
			}
			if s.location() == "" && dir == "" && !o.Check {
				return usageError{errors.New("a node writes nothing for others: give --store, or keep the index in a directory with --index-dir")}
			}
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			o.Trust, o.Write, o.Index = trust, store, []recording.Store{store}
			local, err := indexDir(cmd.Context(), dir)
			if err != nil {
				return err
			}
			if local != nil {
				o.Write, o.Index = local, append(o.Index, local)
			}
			b := newBar("indexing")
			o.Progress = func(done, listed int) { b.set(int64(done), int64(listed)) }
			began := time.Now()
			rep, err := index.Build(cmd.Context(), store, o)
			b.finish()
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if s.json {
				if err := printJSON(w, rep); err != nil {
					return err
				}
			} else {
				printBuild(w, rep, time.Since(began))
			}
			if n := len(rep.Contradicted); o.Check && n > 0 {
				return fmt.Errorf("the index is wrong about %d recording(s): rebuild it with --rebuild", n+rep.MoreContradicted)
			}
			return nil
		},
	}
	times.register(c, "days of recordings that began")
	fl := c.Flags()
	fl.BoolVar(&o.Rebuild, "rebuild", false, "read every recording and believe no row that is there")
	fl.BoolVar(&o.Check, "check", false, "read every recording, name the rows that do not follow from theirs, write nothing")
	fl.StringVar(&dir, "index-dir", "", "write the index to this directory instead of the store")
	return c
}

func printBuild(w io.Writer, rep *index.BuildReport, took time.Duration) {
	for _, f := range rep.BadFiles {
		say(w, "%s cannot be used: %s", f.Key, f.Why)
	}
	for _, n := range rep.Contradicted {
		say(w, "CONTRADICTED: a row of %s does not follow from the recording", n)
	}
	for _, n := range rep.Broken {
		say(w, "BROKEN: %s is not as its node wrote it and stays out: `recordings verify %s`", n, n)
	}
	if n := rep.MoreBroken + rep.MoreContradicted; n > 0 {
		say(w, "and %d more", n)
	}
	say(w, "%d recordings of %d days: %d read, %d not finished; %d files written with %d rows, in %v",
		rep.Listed, rep.Days, rep.Read, rep.Unfinished, rep.Written, rep.Rows, took.Round(time.Millisecond))
}

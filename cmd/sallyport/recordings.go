package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/protocols/postgres"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/upload"
)

// storeFlags name a store of recordings. Reading needs it and the cluster's CA
// certificate, known from elsewhere; no cluster, no private key.
type storeFlags struct {
	*clientFlags
	store string
}

// location is where the store is; "" for the API of a node.
func (s *storeFlags) location() string { return first(s.store, os.Getenv("SALLYPORT_STORE")) }

func (s *storeFlags) open(ctx context.Context) (recording.Store, replay.Trust, error) {
	set, err := s.resolve()
	if err != nil {
		return nil, replay.Trust{}, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(set.CA)) {
		return nil, replay.Trust{}, errors.New("whose signatures count? Give the cluster's CA certificate with --ca or SALLYPORT_CA; get it from somewhere else than the store")
	}
	trust := replay.Trust{Roots: roots, CheckNode: pki.CheckNode}
	location := s.location()
	if location == "" {
		cl, err := set.client()
		if err != nil {
			return nil, trust, fmt.Errorf("where are the recordings? Give --store DIR or s3://bucket/prefix, set SALLYPORT_STORE, or read them through a node: %w", err)
		}
		return cl.Store(), trust, nil
	}
	if _, err := os.Stat(location); err != nil && !hasScheme(location) {
		return nil, trust, fmt.Errorf("the store: %w", err) // opening a directory store would make it
	}
	st, err := upload.Open(ctx, location)
	return st, trust, err
}

// authorities are the certificates whose signatures count.
func (s *storeFlags) authorities() ([]*x509.Certificate, error) {
	set, err := s.resolve()
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for rest := []byte(set.CA); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return out, nil
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("the cluster's CA certificate: %w", err)
		}
		out = append(out, c)
	}
}

func hasScheme(s string) bool {
	for _, p := range []string{"s3://", "file://"} {
		if len(s) > len(p) && s[:len(p)] == p {
			return true
		}
	}
	return false
}

func recordingsCommand(f *clientFlags) *cobra.Command {
	s := &storeFlags{clientFlags: f}
	c := &cobra.Command{
		Use: "recordings", Short: "List, find, show, replay, watch, export and verify recordings", Aliases: []string{"recording"},
		Long: `Reads recordings from their store (a directory or an S3 bucket) and verifies them
with the cluster's CA certificate. No node is asked. Credentials for S3 come
from the usual places (AWS_ACCESS_KEY_ID …); reading rights are enough.

Without --store they come through the API of a node, for those who may
recordings:read; they are verified all the same.`,
	}
	c.PersistentFlags().StringVar(&s.store, "store", "", "directory, or s3://bucket/prefix?endpoint=URL&region=R (SALLYPORT_STORE)")
	c.AddCommand(recordingsList(s), recordingsShow(s), recordingsReplay(s), recordingsVerify(s), recordingsSearch(s), recordingsIndex(s), recordingsExport(s), recordingsWatch(s))
	return c
}

func recordingsList(s *storeFlags) *cobra.Command {
	var flt replay.Filter
	var since time.Duration
	c := &cobra.Command{
		Use: "list", Short: "List recordings", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			store, _, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			if since > 0 {
				flt.From = time.Now().Add(-since)
			}
			var rows [][]string
			list := []listed{}
			err = replay.List(cmd.Context(), store, flt, func(r replay.Summary) error {
				if s.json {
					list = append(list, listing(r))
					return nil
				}
				state := "going on, or cut off"
				switch {
				case r.Err != nil:
					state = "unreadable: " + r.Err.Error()
				case r.Ending != nil:
					state = r.Ending.Reason
				}
				h := r.Header
				to := h.Target + "/" + h.Database
				if h.Profile != "" {
					to = h.Target + "." + h.Profile + "/" + h.Database
				}
				if h.Kind == "node" {
					to = "(the node's own)"
				}
				rows = append(rows, []string{h.Session, stamp(h.Started), h.Node, h.Subject, to, fmt.Sprint(r.Entries), state})
				return nil
			})
			if err != nil {
				return err
			}
			if s.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			table(cmd.OutOrStdout(), "RECORDING STARTED NODE SUBJECT TARGET ENTRIES ENDED", rows)
			return nil
		},
	}
	fl := c.Flags()
	fl.StringVar(&flt.Subject, "subject", "", "only of this subject")
	fl.StringVar(&flt.Target, "target", "", "only of this target")
	fl.StringVar(&flt.Node, "node", "", "only written by this node")
	fl.StringVar(&flt.Kind, "kind", "", "session, or node for nodes' own recordings")
	fl.DurationVar(&since, "since", 0, "only those begun within this time, such as 24h")
	return c
}

// listed is a recording as JSON.
type listed struct {
	recording.Header
	Name    string            `json:"name"`
	Entries uint64            `json:"entries"`
	Ending  *recording.Ending `json:"ending,omitempty"`
	Error   string            `json:"error,omitempty"`
}

func listing(r replay.Summary) listed {
	l := listed{Header: r.Header, Name: r.Name, Entries: r.Entries, Ending: r.Ending}
	if r.Err != nil {
		l.Error = r.Err.Error()
	}
	return l
}

func recordingsShow(s *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use: "show RECORDING", Short: "Show who, where and how it ended, and each command with its decision", Args: exactArgs("RECORDING"),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			r, err := replay.Open(cmd.Context(), store, args[0], trust)
			if err != nil {
				return err
			}
			if s.json {
				return showJSON(cmd, r)
			}
			return replay.Print(cmd.Context(), cmd.OutOrStdout(), r, replay.PrintOptions{Format: noResponses})
		},
	}
}

// noResponses leaves out what came back; `replay` shows it.
func noResponses(w io.Writer, protocol string, e *recording.Entry) error {
	if e.Type != recording.Response {
		return formatData()(w, protocol, e)
	}
	_, err := fmt.Fprintf(w, "(%d bytes answered)\n", len(e.Data))
	return err
}

func showJSON(cmd *cobra.Command, r *replay.Recording) error {
	if err := printJSON(cmd.OutOrStdout(), r.Header); err != nil {
		return err
	}
	for e, err := range r.Entries(cmd.Context()) {
		if err != nil {
			return err
		}
		if err := printJSON(cmd.OutOrStdout(), e); err != nil {
			return err
		}
	}
	return printJSON(cmd.OutOrStdout(), r.Ending)
}

func recordingsReplay(s *storeFlags) *cobra.Command {
	var speed float64
	var idle time.Duration
	var step bool
	c := &cobra.Command{
		Use: "replay RECORDING", Short: "Play a session: statements, decisions and results", Args: exactArgs("RECORDING"),
		Long: `Prints a session: each statement with its decision, what came back, and how it
ended. With --speed it takes the session's own time, with --step it stops after
each statement and its results:

  n, space, Enter   the next one            /   search for a text
  p, b              the one before          N   search on
  g                 the first               q   quit`,
		RunE: func(cmd *cobra.Command, args []string) error {
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			r, err := replay.Open(cmd.Context(), store, args[0], trust)
			if err != nil {
				return err
			}
			if step {
				if speed != 0 {
					return usageError{errors.New("--step waits for a key, --speed for the session's time: give one of them")}
				}
				return stepOnTerminal(cmd.Context(), r)
			}
			return replay.Print(cmd.Context(), cmd.OutOrStdout(), r, replay.PrintOptions{Format: formatData(), Speed: speed, MaxPause: idle})
		},
	}
	c.Flags().Float64Var(&speed, "speed", 0, "play with the session's own pauses, this many times as fast; 0 prints at once")
	c.Flags().DurationVar(&idle, "max-idle", 3*time.Second, "with --speed, the longest pause")
	c.Flags().BoolVar(&step, "step", false, "stop after each statement and its results, on a terminal")
	return c
}

// formatData shows the bytes of one recording's entries as its protocol means them.
func formatData() replay.Formatter {
	var f postgres.Formatter
	return func(w io.Writer, protocol string, e *recording.Entry) error {
		text := string(e.Data)
		switch {
		case protocol == "postgres" && e.Type == recording.Response:
			text = f.Format(e.Data)
		case protocol == "postgres" && e.Verb == "Bind":
			text = postgres.FormatBind(e.Data)
		}
		_, err := io.WriteString(w, text)
		return err
	}
}

func recordingsVerify(s *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use: "verify [RECORDING]", Short: "Verify one recording, or the whole store", Args: cobra.MaximumNArgs(1),
		Long: `Verifies signatures, hash chains and completeness of recordings against the
cluster's CA certificate, and for the whole store that no recording is missing
from any node's chain. It names what is wrong; the exit code is then 1.

Not seen yet: that the newest recordings of a node were deleted (see
docs/recording-format.md).`,
		RunE: func(cmd *cobra.Command, args []string) error {
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			o := replay.VerifyOptions{Trust: trust}
			if len(args) == 1 {
				o.Recording = args[0]
			}
			b := newBar("verifying", progressbar.OptionShowBytes(true))
			counted := func() {}
			if b.b != nil && o.Recording == "" {
				o.Each, counted = byteProgress(cmd.Context(), store, b)
			}
			began := time.Now()
			rep, err := replay.Verify(cmd.Context(), store, o)
			counted()
			b.finish()
			if err != nil {
				return err
			}
			if s.json {
				if err := printJSON(cmd.OutOrStdout(), rep); err != nil {
					return err
				}
			} else {
				printReport(cmd.OutOrStdout(), rep, time.Since(began))
			}
			if !rep.OK() {
				return fmt.Errorf("%d recording(s) are not what the nodes wrote, or are missing: see above", max(1, rep.Broken))
			}
			return nil
		},
	}
}

// byteProgress shows how much of the store is verified. How much there is a
// listing of its own finds out meanwhile; done ends it and waits for it.
func byteProgress(ctx context.Context, store recording.Store, b *bar) (each func(*replay.Result), done func()) {
	ctx, cancel := context.WithCancel(ctx)
	total := make(chan int64, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		var n int64
		err := replay.Items(ctx, store, time.Time{}, time.Time{}, func(i replay.Item) error {
			n += i.Bytes()
			return nil
		})
		if err == nil { // an error is Verify's to tell
			total <- n
		}
	})
	var sum, of int64
	each = func(r *replay.Result) {
		select {
		case of = <-total:
		default:
		}
		sum += r.Bytes
		b.set(sum, max(of, sum))
	}
	return each, func() {
		cancel()
		wg.Wait()
	}
}

func printReport(w io.Writer, rep *replay.Report, took time.Duration) {
	for _, p := range rep.Problems {
		say(w, "%-20s %s %s: %s", p.Kind, p.Recording, p.Object, p.Text)
	}
	if rep.More > 0 {
		say(w, "and %d more", rep.More)
	}
	for _, c := range rep.Chains {
		say(w, "node %s: recordings %d to %d, without a gap unless named above; newest begun %s", c.Node, c.First, c.Last, stamp(c.Newest))
	}
	say(w, "%d recordings: %d verified, %d unfinished (whole as far as they go), %d broken; %d entries, %d bytes in %v (%s)",
		rep.Recordings, rep.Verified, rep.Unfinished, rep.Broken, rep.Entries, rep.Bytes, took.Round(time.Millisecond),
		fmt.Sprintf("%.1f MB/s", float64(rep.Bytes)/1e6/max(took.Seconds(), 1e-6)))
}

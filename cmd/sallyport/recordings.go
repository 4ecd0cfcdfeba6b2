package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
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

func (s *storeFlags) open(ctx context.Context) (recording.Store, replay.Trust, error) {
	set, err := s.resolve()
	if err != nil {
		return nil, replay.Trust{}, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(set.CA)) {
		return nil, replay.Trust{}, errors.New("whose signatures count? Give the cluster's CA certificate with --ca or SALLYPORT_CA; get it from somewhere else than the store")
	}
	trust := replay.Trust{Roots: roots, CheckNode: checkNode}
	location := first(s.store, os.Getenv("SALLYPORT_STORE"))
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

func hasScheme(s string) bool {
	for _, p := range []string{"s3://", "file://"} {
		if len(s) > len(p) && s[:len(p)] == p {
			return true
		}
	}
	return false
}

// checkNode says whether a certificate is the named node's.
func checkNode(cert *x509.Certificate, name string) error {
	id, err := pki.ParseIdentity(cert)
	if err != nil {
		return err
	}
	if id.Name != name || id.Role == pki.Admin {
		return fmt.Errorf("the certificate is of %s, not of node %s", id, name)
	}
	return nil
}

func recordingsCommand(f *clientFlags) *cobra.Command {
	s := &storeFlags{clientFlags: f}
	c := &cobra.Command{
		Use: "recordings", Short: "List, show, replay and verify recordings from their store alone", Aliases: []string{"recording"},
		Long: `Reads recordings from their store (a directory or an S3 bucket) and verifies them
with the cluster's CA certificate. No node is asked. Credentials for S3 come
from the usual places (AWS_ACCESS_KEY_ID …); reading rights are enough.

Without --store they come through the API of a node, for those who may
recordings:read; they are verified all the same.`,
	}
	c.PersistentFlags().StringVar(&s.store, "store", "", "directory, or s3://bucket/prefix?endpoint=URL&region=R (SALLYPORT_STORE)")
	c.AddCommand(recordingsList(s), recordingsShow(s), recordingsReplay(s), recordingsVerify(s))
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
	c := &cobra.Command{
		Use: "replay RECORDING", Short: "Play a session: statements, decisions and results", Args: exactArgs("RECORDING"),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, trust, err := s.open(cmd.Context())
			if err != nil {
				return err
			}
			r, err := replay.Open(cmd.Context(), store, args[0], trust)
			if err != nil {
				return err
			}
			return replay.Print(cmd.Context(), cmd.OutOrStdout(), r, replay.PrintOptions{Format: formatData(), Speed: speed})
		},
	}
	c.Flags().Float64Var(&speed, "speed", 0, "play with the session's own pauses, this many times as fast; 0 prints at once")
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
			var bar *progressbar.ProgressBar
			if isTerminal(os.Stderr) {
				bar = progressbar.NewOptions(-1, progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetDescription("verifying"),
					progressbar.OptionShowCount(), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
				o.Each = func(*replay.Result) { _ = bar.Add(1) }
			}
			began := time.Now()
			rep, err := replay.Verify(cmd.Context(), store, o)
			if bar != nil {
				_ = bar.Finish()
			}
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
	say(w, "%d recordings: %d verified, %d unfinished (whole as far as they go), %d broken; %d entries, %d bytes in %v",
		rep.Recordings, rep.Verified, rep.Unfinished, rep.Broken, rep.Entries, rep.Bytes, took.Round(time.Millisecond))
}

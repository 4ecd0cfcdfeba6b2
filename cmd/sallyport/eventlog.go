package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/raftstore/tlog"
	"github.com/sallyport/sallyport/recording/upload"
)

// logFlags say which event log, and what is trusted.
type logFlags struct {
	*clientFlags
	caHash string
	state  string
}

func (l *logFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&l.caHash, "ca-hash", "", "SHA-256 of the cluster's CA certificate in hex, instead of --ca")
	c.Flags().StringVar(&l.state, "state", "", "file that remembers the newest checkpoint seen; none to remember nothing (default: one for each CA, in the user's configuration directory)")
}

// source opens the log: a store, or, without a location, a node's API.
func (l *logFlags) source(ctx context.Context, args []string) (eventlog.Source, error) {
	location := os.Getenv("SALLYPORT_STORE")
	if len(args) > 0 {
		location = args[0]
	}
	if location == "" {
		cl, err := l.client()
		if err != nil {
			return nil, fmt.Errorf("where is the event log? Give its store, DIR or s3://bucket/prefix, set SALLYPORT_STORE, or read it through a node: %w", err)
		}
		return cl.Log(), nil
	}
	if _, err := os.Stat(location); err != nil && !hasScheme(location) {
		return nil, fmt.Errorf("the store: %w", err) // opening a directory store would make it
	}
	return upload.Open(ctx, location)
}

// trust is the hash of the CA's certificate.
func (l *logFlags) trust() (sum [32]byte, err error) {
	if l.caHash != "" {
		b, err := hex.DecodeString(l.caHash)
		if err != nil || copy(sum[:], b) != len(b) || len(b) != len(sum) {
			return sum, usageError{errors.New("--ca-hash: want 64 hexadecimal digits, as `openssl x509 -in ca.crt -outform der | sha256sum` prints them")}
		}
		return sum, nil
	}
	set, err := l.resolve()
	if err != nil {
		return sum, err
	}
	if set.CA == "" {
		return sum, errors.New("which cluster's log? Give its CA certificate with --ca or SALLYPORT_CA, or its hash with --ca-hash; get it from somewhere else than the store")
	}
	cert, err := pki.ParseCertPEM([]byte(set.CA))
	if err != nil {
		return sum, fmt.Errorf("the CA's certificate: %w", err)
	}
	return sha256.Sum256(cert.Raw), nil
}

// statePath is where the newest checkpoint seen is remembered, "" for nowhere.
func (l *logFlags) statePath(ca [32]byte) (string, error) {
	switch l.state {
	case "none":
		return "", nil
	case "":
		dir, err := os.UserConfigDir()
		if err != nil {
			return "", fmt.Errorf("where is to be remembered what was seen? Give --state FILE, or --state none: %w", err)
		}
		return filepath.Join(dir, "sallyport", "event-log-"+hex.EncodeToString(ca[:8])+".json"), nil
	}
	return l.state, nil
}

func readState(path string) (*eventlog.State, error) {
	if path == "" {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	st := &eventlog.State{}
	if err == nil {
		err = json.Unmarshal(data, st)
	}
	if err == nil && (st.Size == 0 || st.CA == "") {
		err = errors.New("it holds no checkpoint")
	}
	if err != nil {
		return nil, fmt.Errorf("what was seen before, %s: %w; without it a log that was set back does not show", path, err)
	}
	return st, nil
}

func writeState(path string, st *eventlog.State) error {
	if path == "" {
		return nil
	}
	data, err := json.MarshalIndent(st, "", "  ")
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = pki.WriteFile(path, append(data, '\n'))
	}
	if err != nil {
		return fmt.Errorf("remembering what was seen: %w", err)
	}
	return nil
}

func eventsVerify(f *clientFlags) *cobra.Command {
	l := &logFlags{clientFlags: f}
	var from, proof string
	c := &cobra.Command{
		Use: "verify [STORE]", Short: "Verify the exported event log, or that of a running cluster", Args: cobra.MaximumNArgs(1),
		Long: `Reads the event log from its store (a directory or an S3 bucket; it is beside
the recordings) and verifies it with the hash of the cluster's CA certificate
alone: every event against the Merkle tree, every checkpoint against the
cosignatures of a majority of those who were voters then, and that it goes on
from the newest checkpoint seen the last time. No private key, no node.

Without STORE it verifies the log of a running cluster through the API of a
node, for those who may events:read; the node is not trusted for it.

What is wrong is named, and the exit code is then 1. What was seen is
remembered in a file (--state): a log that was set back to an older state, or
is another one, fails from then on. docs/event-log.md says what is proved.

With --proof it verifies what "events prove" printed, with that file alone.`,
		Example: `  sallyport events verify s3://audit/sallyport?region=eu-central-1 --ca ca.crt
  sallyport events verify --server node1:7432 --ca ca.crt --token-file token
  sallyport events verify --proof event-42.json --ca ca.crt`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ca, err := l.trust()
			if err != nil {
				return err
			}
			path, err := l.statePath(ca)
			if err != nil {
				return err
			}
			o := eventlog.VerifyOptions{CA: ca}
			if o.Seen, err = readState(path); err != nil {
				return err
			}
			if proof != "" {
				return checkProof(cmd, f.json, proof, ca, o.Seen)
			}
			if from != "" {
				if o.From, err = readCheckpoint(from); err != nil {
					return err
				}
			}
			src, err := l.source(cmd.Context(), args)
			if err != nil {
				return err
			}
			if isTerminal(os.Stderr) {
				bar := progressbar.NewOptions64(-1, progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetDescription("verifying events"),
					progressbar.OptionShowCount(), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
				o.Progress = func(events, of uint64) { bar.ChangeMax64(int64(of)); _ = bar.Set64(int64(events)) }
				defer func() { _ = bar.Finish() }()
			}
			began := time.Now()
			rep, err := eventlog.Verify(cmd.Context(), src, o)
			if err != nil {
				return fmt.Errorf("the event log could not be verified: %w", err)
			}
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), rep); err != nil {
					return err
				}
			} else {
				printLogReport(cmd.OutOrStdout(), rep, time.Since(began))
			}
			if !rep.OK() {
				return fmt.Errorf("the event log is not what the cluster agreed on: %d problem(s), see above", len(rep.Problems)+rep.More)
			}
			return writeState(path, rep.Seen)
		},
	}
	l.register(c)
	c.Flags().StringVar(&from, "from", "", "file with a checkpoint known from elsewhere, as it is exported: what is before it needs no cosignatures")
	c.Flags().StringVar(&proof, "proof", "", "verify this proof of one event instead, of `FILE` written by events prove")
	return c
}

// readCheckpoint reads a checkpoint that the auditor vouches for.
func readCheckpoint(path string) (*tlog.Checkpoint, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, _, err := tlog.ParseNote(data)
	if err == nil && c.Size == 0 {
		err = errors.New("it is of no events")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &c, nil
}

func printLogReport(w io.Writer, rep *eventlog.Report, took time.Duration) {
	for _, p := range rep.Problems {
		say(w, "%-20s %s: %s", string(p.Kind), p.Object, p.Text)
	}
	if rep.More > 0 {
		say(w, "and %d more", rep.More)
	}
	if rep.Events > 0 {
		say(w, "Cluster %s, CA %s", rep.Cluster, rep.CA)
		say(w, "%d events up to %s, %d checkpoints, root %s", rep.Events, stamp(rep.Newest), rep.Checkpoints, rep.Root)
		say(w, "chain at event %d: %s", rep.Events, rep.Chain)
		say(w, "voters %v, the newest checkpoint is cosigned by %v", rep.Voters, rep.Cosigned)
	}
	switch {
	case !rep.OK():
	case rep.Anchored:
		say(w, "All of it is verified, and goes on from what was seen before; in %v.", took.Round(time.Millisecond))
	default:
		say(w, "All of it is verified, for the first time: nothing was known to hold it against; in %v.", took.Round(time.Millisecond))
	}
}

func eventsProve(f *clientFlags) *cobra.Command {
	l := &logFlags{clientFlags: f}
	var out string
	c := &cobra.Command{
		Use: "prove SEQ [STORE]", Short: "Print a proof that one event is in the log", Args: cobra.RangeArgs(1, 2),
		Long: `Prints the event, the newest checkpoint with its cosignatures, and the hashes
that lead from one to the other. Whoever has verified the log once can verify
this with "events verify --proof", without access to the store or the cluster.`,
		Example: `  sallyport events prove 42 s3://audit/sallyport --out event-42.json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			seq, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil || seq == 0 {
				return usageError{fmt.Errorf("%q is not the number of an event", args[0])}
			}
			src, err := l.source(cmd.Context(), args[1:])
			if err != nil {
				return err
			}
			p, err := eventlog.Prove(cmd.Context(), src, seq)
			if err != nil {
				return err
			}
			if out == "" {
				return printJSON(cmd.OutOrStdout(), p)
			}
			data, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				return err
			}
			return os.WriteFile(out, append(data, '\n'), 0o644)
		},
	}
	c.Flags().StringVar(&out, "out", "", "file to write the proof to instead of printing it")
	return c
}

// maxProofBytes is above any proof: an event of 1 MiB in base64.
const maxProofBytes = 4 << 20

func checkProof(cmd *cobra.Command, asJSON bool, path string, ca [32]byte, seen *eventlog.State) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxProofBytes))
	if err != nil {
		return err
	}
	var p eventlog.Proof
	if err := json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("%s is no proof: %w", path, err)
	}
	e, c, err := p.Check(ca, seen)
	if err != nil {
		return fmt.Errorf("event %d is not proved: %w", p.Seq, err)
	}
	if asJSON {
		return printJSON(cmd.OutOrStdout(), map[string]any{"cluster": c.Origin, "events": c.Size, "root": c.Root.String(), "seq": e.Seq, "time": e.Time,
			"type": e.Type, "version": e.Version, "aggregate": e.Aggregate, "actor": e.Actor, "payload": json.RawMessage(e.Payload)})
	}
	say(cmd.OutOrStdout(), "Event %d is in the log of %s: %s  %s  %s  by %s (%s)", e.Seq, c.Origin, stamp(e.Time), e.Type, e.Aggregate, e.Actor.Principal, e.Actor.Authn)
	say(cmd.OutOrStdout(), "%s", string(e.Payload))
	return nil
}

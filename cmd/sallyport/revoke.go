package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/raftstore/event"
)

// exitUnfenced is the exit code of a revocation that stands, while not every
// node is known to have stopped.
const exitUnfenced = 3

// waitEach is how long one call waits; a revocation is waited for by as many
// as it takes.
const waitEach = 20 * time.Second

func revokeCommand(f *clientFlags) *cobra.Command {
	var scope scopeFlags
	var reason, undo string
	var timeout time.Duration
	c := &cobra.Command{
		Use: "revoke SCOPE --reason TEXT", Short: "End access on every node, now", Args: noArgs,
		Long: `Commits the revocation, ends the live sessions that it names on every node and
refuses new ones. Then it waits until every node has stopped, and prints how that
is known of each: confirmed, or fenced by expiry (it did not answer, and its
lease has certainly ended). A node that is neither is unconfirmed, with the time
at which its lease certainly ends, or no bound where a rule says best_effort.

SCOPE is one of --subject, --group, --claim, --repository, --run, --session,
--target, --token and --node. The target's own credentials are not touched.

Exit code 0: no node passes a byte of it any more. 3: the revocation stands, and
some node is unconfirmed when --timeout was over or nothing bounds it; the
cluster goes on by itself, and sallyport revocations show ID --wait tells the
end of it. 1: it failed, and nothing was revoked as far as is known.`,
		Example: `  sallyport revoke --subject 'ci/repo:acme/shop:ref:refs/heads/main' --reason 'leaked token'
  sallyport revoke --repository acme/shop --reason 'compromised dependency' --timeout 5s
  sallyport revoke --claim environment=staging --reason 'drill'
  sallyport revoke --token - --reason 'seen in a log' < leaked.jwt
  sallyport revoke --undo 3f2a9c01d4 --reason 'false alarm'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if undo != "" {
				return undoRevocation(cmd, f, undo, reason)
			}
			sc, err := scope.scope(cmd.InOrStdin())
			if err != nil {
				return err
			}
			cl, err := f.client()
			if err != nil {
				return err
			}
			w := newWaiting(cmd, cl, timeout)
			r, err := cl.Revoke(cmd.Context(), sc, reason, w.next(2*time.Second))
			if err != nil {
				return err
			}
			if !f.json {
				say(cmd.OutOrStdout(), "Revoked %s (revocation %s, index %d).", r.Scope, r.ID, r.Index)
			}
			return w.finish(f, r)
		},
	}
	scope.register(c)
	c.Flags().StringVar(&undo, "undo", "", "undo the revocation of this id instead; the same as revocations undo")
	c.MarkFlagsOneRequired(append(scopeNames, "undo")...)
	c.MarkFlagsMutuallyExclusive(append(scopeNames, "undo")...)
	c.Flags().DurationVar(&timeout, "timeout", 0, "return after this time whether every node has stopped or not; 0 waits for all")
	reasonFlag(c, &reason)
	return c
}

// waiting waits for a revocation to be in force.
type waiting struct {
	cmd     *cobra.Command
	cl      *api.Client
	began   time.Time
	timeout time.Duration // 0: none
	shown   string
}

func newWaiting(cmd *cobra.Command, cl *api.Client, timeout time.Duration) *waiting {
	return &waiting{cmd: cmd, cl: cl, began: time.Now(), timeout: timeout}
}

// next is how long the next call may wait.
func (w *waiting) next(most time.Duration) time.Duration {
	if w.timeout > 0 {
		most = min(most, w.timeout-time.Since(w.began))
	}
	return max(most, time.Millisecond)
}

// settled says that waiting longer would not tell more: every node has stopped,
// or only nodes are left that nothing bounds.
func settled(r *api.RevocationInfo) bool {
	return r.Complete || (len(r.Nodes) > 0 && !slices.ContainsFunc(r.Nodes, func(n event.NodeFenced) bool {
		return n.State == event.FenceUnconfirmed && !n.NoBound
	}))
}

// finish waits, says on a terminal what for, and prints how it ended.
func (w *waiting) finish(f *clientFlags, r *api.RevocationInfo) error {
	for !settled(r) && (w.timeout == 0 || time.Since(w.began) < w.timeout) {
		w.progress(r)
		again, err := w.cl.Revocation(w.cmd.Context(), r.ID, w.next(waitEach))
		if err != nil {
			var no *api.Failure
			if w.cmd.Context().Err() != nil || (errors.As(err, &no) && no.Status/100 == 4) {
				return fmt.Errorf("revocation %s stands; how far it is cannot be learned: %w", r.ID, err)
			}
			// Most often no leader for a moment. The revocation stands whatever
			// becomes of us, so this is not the moment to give up.
			select {
			case <-time.After(w.next(time.Second)):
			case <-w.cmd.Context().Done():
			}
			continue
		}
		if len(again.Nodes) > 0 && !again.Complete && !settled(again) {
			select { // a node without a leader answers at once
			case <-time.After(w.next(200 * time.Millisecond)):
			case <-w.cmd.Context().Done():
			}
		}
		r = again
	}
	out := w.cmd.OutOrStdout()
	if f.json {
		if err := printJSON(out, r); err != nil {
			return err
		}
	} else {
		printFenced(w.cmd, r)
		if r.Complete {
			say(out, "No node passes a byte of it any more (%v).", time.Since(w.began).Round(time.Millisecond))
		}
	}
	return unfenced(r)
}

// unfenced is the error of a revocation that is not in force everywhere.
func unfenced(r *api.RevocationInfo) error {
	if r.Complete {
		return nil
	}
	names := []string{}
	for _, n := range r.Nodes {
		if n.State == event.FenceUnconfirmed {
			names = append(names, n.Node)
		}
	}
	return exitError{exitUnfenced, fmt.Errorf("the revocation stands, and %d node(s) are not confirmed (%s); the cluster goes on by itself: `sallyport revocations show %s --wait`",
		len(names), strings.Join(names, ", "), r.ID)}
}

// progress tells somebody who sits before it what is waited for.
func (w *waiting) progress(r *api.RevocationInfo) {
	file, ok := w.cmd.ErrOrStderr().(*os.File)
	if !ok || !isTerminal(file) {
		return
	}
	for _, n := range r.Nodes {
		if n.State != event.FenceUnconfirmed {
			continue
		}
		line := fmt.Sprintf("Waiting for node %s (%s)", n.Node, n.Detail)
		if !n.LeaseEnds.IsZero() {
			line += fmt.Sprintf(": its lease certainly ends at %s", stamp(n.LeaseEnds))
		}
		if line != w.shown {
			w.shown = line
			say(file, "%s", line)
		}
		return
	}
}

// scopeFlags name what is to be revoked; one of them.
type scopeFlags struct {
	subject, group, claim, repository, run, session, target, token, node string
}

func (f *scopeFlags) register(c *cobra.Command) {
	p := c.Flags()
	p.StringVar(&f.subject, "subject", "", "a subject: provider/name, as sallyport sessions list shows it")
	p.StringVar(&f.group, "group", "", "everybody in a group")
	p.StringVar(&f.claim, "claim", "", "everybody whose token has a claim with this value: NAME=VALUE")
	p.StringVar(&f.repository, "repository", "", "short for --claim repository=VALUE")
	p.StringVar(&f.run, "run", "", "short for --claim run_id=VALUE")
	p.StringVar(&f.session, "session", "", "one live session, by its id")
	p.StringVar(&f.target, "target", "", "everybody's access to a target")
	p.StringVar(&f.token, "token", "", "one token: its id (jti, or sha256:…), the token itself, or - to read the token")
	p.StringVar(&f.node, "node", "", "a node: its sessions, its certificate, and what its key has signed")
}

var scopeNames = []string{"subject", "group", "claim", "repository", "run", "session", "target", "token", "node"}

// scope is what the flags name. A token is read from in when it is "-".
func (f *scopeFlags) scope(in io.Reader) (event.Scope, error) {
	for _, k := range []struct {
		kind        event.ScopeKind
		name, value string
	}{
		{event.ScopeSubject, "", f.subject}, {event.ScopeGroup, "", f.group}, {event.ScopeClaim, "repository", f.repository}, {event.ScopeClaim, "run_id", f.run},
		{event.ScopeSession, "", f.session}, {event.ScopeTarget, "", f.target}, {event.ScopeNode, "", f.node},
	} {
		if k.value != "" {
			return event.Scope{Kind: k.kind, Name: k.name, Value: k.value}, nil
		}
	}
	switch {
	case f.claim != "":
		name, value, ok := strings.Cut(f.claim, "=")
		if !ok || name == "" || value == "" {
			return event.Scope{}, usageError{fmt.Errorf("--claim %q: want NAME=VALUE, such as environment=production", f.claim)}
		}
		return event.Scope{Kind: event.ScopeClaim, Name: name, Value: value}, nil
	case f.token == "-":
		data, err := io.ReadAll(io.LimitReader(in, identity.MaxTokenBytes+1))
		if err != nil {
			return event.Scope{}, fmt.Errorf("the token: %w", err)
		}
		f.token = strings.TrimSpace(string(data))
	}
	if f.token == "" {
		return event.Scope{}, usageError{errors.New("what is to be revoked is empty")}
	}
	return event.Scope{Kind: event.ScopeToken, Value: identity.TokenID(f.token)}, nil
}

func printFenced(cmd *cobra.Command, r *api.RevocationInfo) {
	var rows [][]string
	for _, n := range r.Nodes {
		took, ends, level := "", stamp(n.LeaseEnds), ""
		if !n.At.IsZero() {
			took = max(0, n.At.Sub(r.At)).Round(100 * time.Microsecond).String()
		}
		if n.NoBound {
			ends = "no bound"
		}
		if n.Level > 0 {
			level = fmt.Sprint(n.Level)
		}
		late := ""
		if n.Violations > 0 {
			late = fmt.Sprintf("%d (%d bytes)", n.Violations, n.Bytes)
		}
		rows = append(rows, []string{n.Node, n.State, took, level, fmt.Sprint(n.Sessions), late, ends, n.Detail})
	}
	table(cmd.OutOrStdout(), "NODE STATE AFTER LEVEL SESSIONS-CUT LATE-WRITES LEASE-ENDS DETAIL", rows)
}

func revocationsCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "revocations", Short: "List, show and undo revocations"}
	list := &cobra.Command{
		Use: "list", Short: "List revocations", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			rs, err := cl.Revocations(cmd.Context())
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), rs)
			}
			var rows [][]string
			for _, r := range rs {
				state, fenced := "in force", "not everywhere yet"
				switch {
				case !r.Undone.IsZero():
					state = "undone " + stamp(r.Undone)
				case !r.Until.IsZero():
					state = "for tokens until " + stamp(r.Until)
				}
				if r.Complete {
					fenced = stamp(r.Fenced)
				}
				rows = append(rows, []string{r.ID, r.Scope.String(), state, stamp(r.At), fenced, r.Reason})
			}
			table(cmd.OutOrStdout(), "ID SCOPE STATE AT FENCED REASON", rows)
			return nil
		},
	}
	var wait bool
	var timeout time.Duration
	show := &cobra.Command{
		Use: "show ID", Short: "Show how far a revocation is in force on each node", Args: exactArgs("ID"),
		Long: `Shows how each node stands to a revocation. With --wait it waits until every
node has stopped, as revoke does, with the same exit codes.`,
		Example: `  sallyport revocations show 3f2a9c01d4 --wait`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			w := newWaiting(cmd, cl, timeout)
			r, err := cl.Revocation(cmd.Context(), args[0], 0)
			if err != nil {
				return err
			}
			if !f.json {
				say(cmd.OutOrStdout(), "%s, revoked %s: %s", r.Scope, stamp(r.At), r.Reason)
				if !r.Undone.IsZero() {
					say(cmd.OutOrStdout(), "Undone %s: %s", stamp(r.Undone), r.UndoReason)
				}
				if r.Limit != "" {
					say(cmd.OutOrStdout(), "A node that cannot be reached may go on for: %s", r.Limit)
				}
			}
			if wait {
				return w.finish(f, r)
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), r)
			}
			printFenced(cmd, r)
			return nil
		},
	}
	show.Flags().BoolVar(&wait, "wait", false, "wait until every node has stopped")
	show.Flags().DurationVar(&timeout, "timeout", 0, "with --wait: return after this time all the same; 0 waits for all")
	var reason string
	undo := &cobra.Command{
		Use: "undo ID --reason TEXT", Short: "Undo a revocation; credentials issued before stay dead", Args: exactArgs("ID"),
		Long: `Undoes a revocation of a subject, group, claim or target. Tokens issued up to a
minute after it stay dead where the revocation stood, since clocks may differ by
that much: get a new one. Revocations of sessions, tokens and nodes are not
undone: a session does not come back, a token was issued before, and a node's
keys are not trusted again.`,
		Example: `  sallyport revocations undo 3f2a9c01d4 --reason 'false alarm'`,
		RunE:    func(cmd *cobra.Command, args []string) error { return undoRevocation(cmd, f, args[0], reason) },
	}
	reasonFlag(undo, &reason)
	c.AddCommand(list, show, undo)
	return c
}

func undoRevocation(cmd *cobra.Command, f *clientFlags, id, reason string) error {
	cl, err := f.client()
	if err != nil {
		return err
	}
	r, err := cl.Undo(cmd.Context(), id, reason)
	if err != nil {
		return err
	}
	if f.json {
		return printJSON(cmd.OutOrStdout(), r)
	}
	say(cmd.OutOrStdout(), "Undone. It no longer stands against %s for tokens issued a minute from now or later: clocks may differ by that much, and no earlier token is revived.", r.Scope)
	return nil
}

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/raftstore/event"
)

func revokeCommand(f *clientFlags) *cobra.Command {
	var scope scopeFlags
	var reason, undo string
	c := &cobra.Command{
		Use: "revoke SCOPE --reason TEXT", Short: "End access on every node, now", Args: noArgs,
		Long: `Commits the revocation, ends the live sessions that it names on every node,
refuses new ones, and prints for each node when it took effect. The target's own
credentials are not touched. Exit code 1 means that a node did not confirm.

SCOPE is one of --subject, --group, --claim, --repository, --run, --session,
--target, --token and --node.`,
		Example: `  sallyport revoke --subject 'ci/repo:acme/shop:ref:refs/heads/main' --reason 'leaked token'
  sallyport revoke --repository acme/shop --reason 'compromised dependency'
  sallyport revoke --claim environment=staging --reason 'drill'
  sallyport revoke --token - --reason 'seen in a log' < leaked.jwt`,
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
			start := time.Now()
			r, err := cl.Revoke(cmd.Context(), sc, reason)
			if err != nil {
				return err
			}
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), r); err != nil {
					return err
				}
			} else {
				say(cmd.OutOrStdout(), "Revoked %s (revocation %s, index %d) in %v.", r.Scope, r.ID, r.Index, time.Since(start).Round(time.Millisecond))
				printFenced(cmd, r)
			}
			for _, n := range r.Nodes {
				if n.State != "confirmed" {
					return fmt.Errorf("node %s has not confirmed (%s): it refuses and cuts as soon as it learns of the revocation; until then stop it or cut it off from its targets", n.Node, n.Detail)
				}
			}
			return nil
		},
	}
	scope.register(c)
	c.Flags().StringVar(&undo, "undo", "", "undo the revocation of this id instead; the same as revocations undo")
	c.MarkFlagsOneRequired(append(scopeNames, "undo")...)
	c.MarkFlagsMutuallyExclusive(append(scopeNames, "undo")...)
	reasonFlag(c, &reason)
	return c
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
		took := ""
		if !n.At.IsZero() {
			took = n.At.Sub(r.At).Round(100 * time.Microsecond).String()
		}
		rows = append(rows, []string{n.Node, n.State, stamp(n.At), took, fmt.Sprint(n.Sessions), n.Detail})
	}
	table(cmd.OutOrStdout(), "NODE STATE EFFECTIVE AFTER-COMMIT SESSIONS-CUT DETAIL", rows)
}

func revocationsCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "revocations", Short: "List and undo revocations"}
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
				state := "in force"
				switch {
				case !r.Undone.IsZero():
					state = "undone " + stamp(r.Undone)
				case !r.Until.IsZero():
					state = "for tokens until " + stamp(r.Until)
				}
				rows = append(rows, []string{r.ID, r.Scope.String(), state, stamp(r.At), r.Reason})
			}
			table(cmd.OutOrStdout(), "ID SCOPE STATE AT REASON", rows)
			return nil
		},
	}
	var reason string
	undo := &cobra.Command{
		Use: "undo ID --reason TEXT", Short: "Undo a revocation; credentials issued before stay dead", Args: exactArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error { return undoRevocation(cmd, f, args[0], reason) },
	}
	reasonFlag(undo, &reason)
	c.AddCommand(list, undo)
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

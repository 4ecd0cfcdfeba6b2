package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/recording/terminal"
)

func showEventCommand(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "show SEQ", Short: "Show one event with all of its content", Args: exactArgs("SEQ"),
		Example: "  sallyport events show 42",
		RunE: func(cmd *cobra.Command, args []string) error {
			seq, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil || seq == 0 {
				return usageError{fmt.Errorf("%q is no number of an event", args[0])}
			}
			cl, err := f.client()
			if err != nil {
				return err
			}
			e, err := cl.Event(cmd.Context(), seq)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), e)
			}
			w := cmd.OutOrStdout()
			say(w, "Event %d: %s version %d", e.Seq, e.Type, e.Version)
			say(w, "  at         %s, Raft index %d of term %d", stamp(e.Time), e.Index, e.Term)
			say(w, "  aggregate  %s", e.Aggregate)
			say(w, "  by         %s (%s, %s) from %s through %s", e.Actor.Principal, e.Actor.Kind, e.Actor.Authn, e.Actor.Source, e.Actor.Via)
			say(w, "  chain      %s", e.Chain)
			payload, err := json.MarshalIndent(e.Payload, "", "  ")
			if err != nil {
				return err
			}
			indent(w, string(payload))
			return nil
		},
	}
}

func stateCommand(f *clientFlags) *cobra.Command {
	var at string
	c := &cobra.Command{
		Use: "state [--at INDEX|TIME]", Short: "Show what the cluster had agreed on, now or at a past moment", Args: noArgs,
		Long: `Shows the members, the configuration's digest, the revocations in force and the
approval requests that were open, as of a Raft index (events list shows them) or a
time. Any node answers, from its own copy of the event log.`,
		Example: `  sallyport state
  sallyport state --at 1042
  sallyport state --at 2026-01-31T10:03:00Z --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			s, err := cl.StateAt(cmd.Context(), at)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), s)
			}
			printState(cmd.OutOrStdout(), s)
			return nil
		},
	}
	c.Flags().StringVar(&at, "at", "", "Raft index, or time such as 2026-01-31T10:03:00Z; now if not given")
	return c
}

func printState(w io.Writer, s *api.StateAt) {
	say(w, "Cluster %s as of event %d (index %d), %s; feature level %d", s.Cluster, s.Seq, s.Index, stamp(s.Time), s.FeatureLevel)
	switch {
	case s.ConfigError != "":
		say(w, "Configuration of index %d, unusable: %s", s.ConfigIndex, s.ConfigError)
	case s.ConfigIndex == 0:
		say(w, "No configuration.")
	default:
		say(w, "Configuration of index %d, digest %s: targets %s; identity providers %s", s.ConfigIndex, s.ConfigDigest, listOrNone(s.Targets), listOrNone(s.Providers))
	}
	var rows [][]string
	for _, n := range s.Nodes {
		rows = append(rows, []string{n.Name, n.Addr, n.Role})
	}
	table(w, "NODE ADDRESS ROLE", rows)
	if len(s.Removed) > 0 {
		say(w, "Removed: %s", strings.Join(s.Removed, ", "))
	}
	printInForce(w, s.Revocations)
	if len(s.Approvals) == 0 {
		say(w, "No open approval requests.")
		return
	}
	rows = nil
	for _, a := range s.Approvals {
		rows = append(rows, []string{a.ID, a.State, a.Subject, a.Target + "/" + a.Database, stamp(a.Asked), stamp(a.Expires)})
	}
	table(w, "APPROVAL STATE SUBJECT TARGET ASKED EXPIRES", rows)
}

func printInForce(w io.Writer, rs []api.RevocationInfo) {
	if len(rs) == 0 {
		say(w, "No revocations in force.")
		return
	}
	var rows [][]string
	for _, r := range rs {
		rows = append(rows, []string{r.ID, r.Scope.String(), stamp(r.At), fmt.Sprint(r.Index), r.Reason})
	}
	table(w, "REVOCATION OF SINCE INDEX REASON", rows)
}

func listOrNone(s []string) string {
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

func policyCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Ask what the policies decide, now or at a past moment"}
	c.AddCommand(explainCommand(f))
	return c
}

func explainCommand(f *clientFlags) *cobra.Command {
	var in api.ExplainRequest
	var tokenFile, claimsFile, resource string
	c := &cobra.Command{
		Use: "explain (--subject SUBJECT | --token-claims FILE) (--statement SQL | --action ACTION)", Short: "Say what is or was decided for somebody, and by which rule", Args: noArgs,
		Long: `Decides as a node did at a Raft index or time, by the configuration and the
revocations of that moment, and names the rules. A session's recording tells the
index each command was decided at, its subject, groups and claims.

Who: --subject with --group and --claims as the recording shows them, or
--token-claims, a file with the claims of a token (a JSON object), which are mapped
as the identity provider of that moment did. No signature is looked at: this lets
nobody in.

What: --statement on a target and database, or --action with the --resource in the
database. The names in a statement are resolved by the target's catalogue as it is
now.

Exit code 1 means that it is refused or held.`,
		Example: `  sallyport policy explain --at 1042 --subject ci/repo:acme/shop:ref:refs/heads/main --group ci --target prod-db --database shop --statement 'DELETE FROM orders'
  sallyport policy explain --token-claims claims.json --target prod-db --database shop --action postgres:select --resource public.orders
  sallyport policy explain --at 2026-01-31T10:03:00Z --subject sso/sam --action admin:apply --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if in.Token, err = jsonFile(tokenFile); err != nil {
				return err
			}
			if in.Claims, err = jsonFile(claimsFile); err != nil {
				return err
			}
			if resource != "" {
				in.Resource = strings.Split(resource, ".")
			}
			cl, err := f.client()
			if err != nil {
				return err
			}
			e, err := cl.Explain(cmd.Context(), &in)
			if err != nil {
				return err
			}
			if f.json {
				err = printJSON(cmd.OutOrStdout(), e)
			} else {
				printExplanation(cmd.OutOrStdout(), e)
			}
			if err == nil && e.Effect != "permit" {
				err = fmt.Errorf("the answer is %s", e.Effect)
			}
			return err
		},
	}
	fl := c.Flags()
	fl.StringVar(&in.At, "at", "", "Raft index, or time such as 2026-01-31T10:03:00Z; now if not given")
	fl.StringVar(&in.Subject, "subject", "", "provider/name")
	fl.StringArrayVar(&in.Groups, "group", nil, "a group of the subject; repeat for several")
	fl.StringVar(&in.Kind, "kind", "", "User or Workload; the identity provider's if not given")
	fl.StringVar(&claimsFile, "claims", "", "file with the subject's claims as a recording shows them, a JSON object")
	fl.StringVar(&tokenFile, "token-claims", "", "file with the claims of a token, a JSON object; instead of --subject")
	fl.StringVar(&in.Target, "target", "", "the target")
	fl.StringVar(&in.Database, "database", "", "the database on it")
	fl.StringVar(&in.Profile, "profile", "", "profile of the login, as in prod-db.PROFILE")
	fl.StringVar(&in.Statement, "statement", "", "the SQL text")
	fl.StringVar(&in.Action, "action", "", "an action such as postgres:delete, connect or admin:apply")
	fl.StringVar(&resource, "resource", "", "what the action is on, in the database: schema, schema.table or schema.table.column")
	fl.StringVar(&in.Client, "client", "", "IP address of the caller")
	fl.StringVar(&in.Node, "node", "", "the node that is asked, for revocations of a node")
	fl.StringVar(&in.TokenID, "token-id", "", "id of the token, for revocations of a token")
	fl.StringArrayVar(&in.Approved, "approved", nil, "an approval rule taken to be lifted; repeat for several")
	fl.BoolVar(&in.InTransaction, "in-transaction", false, "inside an open transaction")
	return c
}

// jsonFile reads a JSON file, nothing for no name; - is standard input.
func jsonFile(name string) (json.RawMessage, error) {
	if name == "" {
		return nil, nil
	}
	in := io.Reader(os.Stdin)
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		in = file
	}
	data, err := io.ReadAll(io.LimitReader(in, 32<<10))
	if err != nil {
		return nil, err
	}
	if !json.Valid(data) {
		return nil, fmt.Errorf("%s: not JSON, or larger than 32 KiB", name)
	}
	return data, nil
}

func printExplanation(w io.Writer, e *api.Explanation) {
	say(w, "As of event %d (index %d), %s, configuration of index %d:", e.Seq, e.Index, stamp(e.Time), e.ConfigIndex)
	say(w, "%s %s, groups %s", e.Kind, e.Subject, listOrNone(e.Groups))
	say(w, "%s", strings.ToUpper(e.Effect)+verdictNote(&e.Verdict))
	if e.Text != "" {
		indent(w, e.Text)
	}
	if a := e.Approval; a != nil {
		say(w, "  needs %d approver(s) of %s for %s within %s", a.Count, listOrNone(a.Groups), strings.Join(a.Rules, ", "), a.Expires)
	}
	if e.Connect != nil {
		say(w, "Opening a session: %s%s", e.Connect.Effect, verdictNote(e.Connect))
	}
	var rows [][]string
	for _, p := range e.Pairs {
		rows = append(rows, []string{p.Action, p.Resource, p.Effect, p.Rule, p.Where})
	}
	if len(rows) > 0 {
		table(w, "ACTION RESOURCE DECISION RULE WHERE", rows)
	}
	printInForce(w, e.Revocations)
	if !e.Catalogue.IsZero() {
		say(w, "Names in the statement were resolved by the target's catalogue of %s.", stamp(e.Catalogue))
	}
}

func verdictNote(v *api.Verdict) string {
	s := " by rule " + v.Rule
	if v.Where != "" {
		s += " (" + v.Where + ")"
	}
	if v.Reason != "" {
		s += ": " + v.Reason
	}
	return s
}

// indent prints lines that others wrote.
func indent(w io.Writer, text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintln(w, "  "+terminal.EscapeLine(strings.TrimRight(line, "\n")))
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/gossip"
	"github.com/sallyport/sallyport/recording/terminal"
)

func statusCommand(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show every node of the cluster", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			st, err := cl.Status(cmd.Context())
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), st)
			}
			say(cmd.OutOrStdout(), "Cluster %s, feature level %d%s", st.Cluster, st.FeatureLevel, heldBack(st))
			var rows [][]string
			for _, n := range st.Nodes {
				if !n.Reachable {
					n.Error += heard(st, n.Node)
					rows = append(rows, []string{n.Node, n.Addr, "unreachable", "", "", "", "", n.Error})
					continue
				}
				rows = append(rows, []string{n.Node, n.Addr, n.RaftState, fmt.Sprint(n.Term), fmt.Sprintf("%d/%d", n.AppliedIndex, n.CommitIndex),
					fmt.Sprint(n.ConfigIndex), fmt.Sprint(n.Sessions), spoolNote(n)})
			}
			table(cmd.OutOrStdout(), "NODE ADDRESS RAFT TERM APPLIED/COMMIT CONFIG SESSIONS NOTES", rows)
			return nil
		},
	}
}

// heldBack says why the feature level does not rise, "" when it need not.
func heldBack(st *api.Status) string {
	if len(st.HeldBack) == 0 {
		return ""
	}
	return ", held back: " + strings.Join(st.HeldBack, ", ")
}

// heard is what the gossip has on a node that did not answer.
func heard(st *api.Status, node string) string {
	for _, n := range st.Nodes {
		for _, m := range n.Gossip {
			if n.Reachable && m.Name == node && m.State != gossip.Unknown {
				return fmt.Sprintf("; %s hears that it is %s, since %s", n.Node, m.State, stamp(m.Since))
			}
		}
	}
	return ""
}

func spoolNote(n api.NodeStatus) string {
	note := ""
	if n.ConfigError != "" {
		note = "configuration unusable: " + n.ConfigError + "; "
	}
	if n.Spool.LastError != "" {
		note += "recordings: " + n.Spool.LastError + "; "
	}
	for _, a := range n.EventLog.Alarms {
		note += "event log: " + a + "; "
	}
	switch e := n.EventLog.Export; {
	case e.Alarm != "":
		note += "event log: " + e.Alarm + "; "
	case e.LastError != "":
		note += fmt.Sprintf("event log: %d checkpoints wait for the store: %s; ", e.Waiting, e.LastError)
	}
	if n.RaftState == "leader" && n.EventLog.Problem != "" {
		note += "event log: " + n.EventLog.Problem + "; "
	}
	if n.Spool.BytesWaiting > 0 {
		note += fmt.Sprintf("%d bytes of recordings waiting for the store", n.Spool.BytesWaiting)
	}
	return note
}

func sessionsCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "sessions", Short: "List live sessions"}
	c.AddCommand(&cobra.Command{
		Use: "list", Short: "List live sessions of all nodes", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			s, err := cl.Sessions(cmd.Context())
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), s)
			}
			var rows [][]string
			for _, i := range s.Sessions {
				target := i.Target
				if i.Profile != "" {
					target += "." + i.Profile
				}
				rows = append(rows, []string{i.ID, i.Node, i.Subject, target + "/" + i.Database, i.State, i.Client,
					time.Since(i.Started).Round(time.Second).String(), fmt.Sprintf("%d/%d/%d", i.Admitted, i.Refused, i.Held)})
			}
			if len(rows) == 0 {
				say(cmd.OutOrStdout(), "No live sessions.")
			} else {
				table(cmd.OutOrStdout(), "SESSION NODE SUBJECT TARGET STATE CLIENT AGE ADMITTED/REFUSED/HELD", rows)
			}
			for n, why := range s.Unreachable {
				say(cmd.ErrOrStderr(), "Node %s did not answer (%s): its sessions are not listed.", n, why)
			}
			return nil
		},
	})
	return c
}

func eventsCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "events", Short: "Read, follow and verify the cluster's event log"}
	var from uint64
	var follow bool
	var typ, aggregate string
	tail := &cobra.Command{
		Use: "list", Aliases: []string{"tail"}, Short: "Print events, oldest first; with --follow wait for more", Args: noArgs,
		Example: "  sallyport events list --from 100 --type revocation.made\n  sallyport events list --follow --json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			for {
				wait := time.Duration(0)
				if follow {
					wait = 30 * time.Second
				}
				events, err := cl.Events(cmd.Context(), from, wait)
				if cmd.Context().Err() != nil {
					return nil // told to stop
				}
				if err != nil {
					return err
				}
				for _, e := range events {
					if (typ == "" || typ == e.Type) && (aggregate == "" || aggregate == e.Aggregate) {
						printEvent(cmd, f.json, e)
					}
					from = e.Seq + 1
				}
				if len(events) == 0 && !follow {
					return nil
				}
			}
		},
	}
	tail.Flags().Uint64Var(&from, "from", 1, "number of the first event to print")
	tail.Flags().BoolVarP(&follow, "follow", "f", false, "go on as events come")
	tail.Flags().StringVar(&typ, "type", "", "only events of this type, such as config.applied")
	tail.Flags().StringVar(&aggregate, "aggregate", "", "only events of this aggregate, such as node/n1")
	c.AddCommand(tail, showEventCommand(f), eventsVerify(f), eventsProve(f))
	return c
}

func printEvent(cmd *cobra.Command, asJSON bool, e api.EventInfo) {
	line, _ := json.Marshal(e)
	if !asJSON {
		summary := map[string]any{}
		for k, v := range e.Payload {
			switch k {
			case "files", "secrets", "ca", "ca_key", "text", "proof", "cert", "vault_wrap", "node", "hash", "digest", "claims", "detail", "nodes":
				// Long or sealed: --json shows them.
			default:
				summary[k] = v
			}
		}
		s, _ := json.Marshal(summary)
		line = fmt.Appendf(nil, "%6d  %s  %-20s %-28s %s (%s)  %s", e.Seq, stamp(e.Time), e.Type, e.Aggregate, e.Actor.Principal, e.Actor.Authn, s)
	}
	fmt.Fprintln(cmd.OutOrStdout(), terminal.EscapeLine(string(line)))
}

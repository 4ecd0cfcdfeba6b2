package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/recording/terminal"
)

// finding is one thing the doctor looked at.
type finding struct {
	Check string `json:"check"`
	State string `json:"state"` // ok, warn, bad
	What  string `json:"what,omitempty"`
	Do    string `json:"do,omitempty"`
}

func doctorCommand(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check a set-up and say what to do", Args: noArgs,
		Long: `Looks at what this machine knows of the cluster, at every node, at time, targets
and recordings, and says for each thing that is not right what to do. The exit
code is 1 when something is bad.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := examine(cmd.Context(), f)
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), findings); err != nil {
					return err
				}
			}
			bad := 0
			for _, x := range findings {
				if x.State == "bad" {
					bad++
				}
				if !f.json {
					fmt.Fprintf(cmd.OutOrStdout(), "%-5s %-28s %s\n", x.State, terminal.EscapeLine(x.Check), terminal.EscapeLine(x.What))
					if x.Do != "" {
						fmt.Fprintf(cmd.OutOrStdout(), "      %-28s -> %s\n", "", terminal.EscapeLine(x.Do))
					}
				}
			}
			if bad > 0 {
				return fmt.Errorf("%d thing(s) need attention", bad)
			}
			return nil
		},
	}
}

func examine(ctx context.Context, f *clientFlags) (out []finding) {
	add := func(check, state, what, do string) { out = append(out, finding{check, state, what, do}) }
	set, err := f.resolve()
	if err != nil {
		add("settings", "bad", err.Error(), "")
		return out
	}
	for _, s := range strings.Split(set.Server, ",") {
		if s == "" {
			continue
		}
		d := net.Dialer{Timeout: 3 * time.Second}
		if c, err := d.DialContext(ctx, "tcp", s); err != nil {
			add("server "+s, "bad", err.Error(), "is the node running there, and the port open? `sallyport serve --data-dir …` starts it")
		} else {
			c.Close()
			add("server "+s, "ok", "accepts connections", "")
		}
	}
	cl, err := set.client()
	if err != nil {
		add("credential", "bad", err.Error(), "")
		return out
	}
	who, err := cl.Whoami(ctx)
	if err != nil {
		add("credential", "bad", err.Error(), credentialRemedy(err))
		return out
	}
	add("credential", "ok", "you are "+who.Subject, "")
	if left := time.Until(who.Expires); left < 30*24*time.Hour && strings.HasPrefix(who.Subject, "bootstrap/") {
		add("administrator certificate", "warn", fmt.Sprintf("expires in %v", left.Round(time.Hour)), "give administrators tokens of your identity provider before that")
	}
	st, err := cl.Status(ctx)
	if err != nil {
		add("status", "bad", err.Error(), "your policies must permit you status:read")
		return out
	}
	return append(out, examineNodes(st)...)
}

func credentialRemedy(err error) string {
	var fail *api.Failure
	if errors.As(err, &fail) {
		return "the node answered and refused: get a new token, or use the administrator's certificate"
	}
	if strings.Contains(err.Error(), "certificate") {
		return "the CA file must be the one of this cluster: ca.crt beside the administrator's certificate"
	}
	return ""
}

func examineNodes(st *api.Status) (out []finding) {
	add := func(check, state, what, do string) { out = append(out, finding{check, state, what, do}) }
	voters, leaders := 0, map[string]bool{}
	for _, n := range st.Nodes {
		name := "node " + n.Node
		if !n.Reachable {
			add(name, "bad", "does not answer: "+n.Error, "start it, or take it out with `sallyport cluster remove "+n.Node+"`; UDP "+n.Addr+" must be open between nodes")
			continue
		}
		if n.Voter {
			voters++
		}
		if n.Leader != "" {
			leaders[n.Leader] = true
		}
		switch {
		case n.Leader == "":
			add(name, "bad", "knows no leader", "a majority of the voters must be running: see `sallyport cluster members`")
		case n.ConfigError != "":
			add(name, "bad", "cannot read the configuration: "+n.ConfigError, "its version differs from the others': upgrade it")
		default:
			add(name, "ok", fmt.Sprintf("%s, version %s, %d events, %d sessions", n.RaftState, n.Version, n.Events, n.Sessions), "")
		}
		if d := time.Since(n.Now); d > 5*time.Second || d < -5*time.Second {
			add(name+" clock", "warn", fmt.Sprintf("differs from this machine's by %v", d.Round(time.Second)), "tokens are judged by the node's clock: run NTP on both")
		}
		if n.Spool.LastError != "" {
			add(name+" recordings", "bad", n.Spool.LastError, "the store "+n.Spool.Store+" must be writable; sessions are refused when the spool is full")
		} else if n.Spool.OldestUnsent > time.Minute {
			add(name+" recordings", "warn", fmt.Sprintf("%d bytes wait, the oldest for %v", n.Spool.BytesWaiting, n.Spool.OldestUnsent.Round(time.Second)), "is the store slow?")
		}
		if n.Dev {
			add(name+" mode", "warn", "runs with --dev: tokens of a trial issuer are accepted", "never in production")
		}
		for _, t := range slices.Sorted(maps.Keys(n.Targets)) {
			if s := n.Targets[t]; s == "ok" {
				add("target "+t+" from "+n.Node, "ok", "the administrative account works", "")
			} else {
				add("target "+t+" from "+n.Node, "bad", s, "`sallyport targets setup-sql` prints what the database needs")
			}
		}
		if n.ConfigIndex == 0 {
			add(name+" configuration", "warn", "none applied: nobody may connect", "`sallyport apply -f DIR`; start from deploy/example")
		}
	}
	switch {
	case len(leaders) == 0:
		add("leader", "bad", "there is none: nothing can be changed or approved", "a majority of the voters must be running")
	case len(leaders) > 1:
		add("leader", "warn", "nodes differ about who leads", "an election is going on; look again")
	default:
		add("leader", "ok", slices.Collect(maps.Keys(leaders))[0], "")
	}
	if voters < 3 {
		add("fault tolerance", "warn", fmt.Sprintf("%d voter(s) running: no node may fail", voters), "three nodes go on when one fails")
	}
	return out
}

package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
)

func revokeCommand(f *clientFlags) *cobra.Command {
	var subject, reason string
	c := &cobra.Command{
		Use: "revoke --subject SUBJECT --reason TEXT", Short: "End a subject's access on every node, now", Args: noArgs,
		Long: `Commits the revocation, ends the subject's live sessions on every node, refuses
new ones, and prints for each node when it took effect. The target's own
credentials are not touched. Exit code 1 means that a node did not confirm.`,
		Example: `  sallyport revoke --subject 'ci/repo:acme/shop:ref:refs/heads/main' --reason 'leaked token'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			start := time.Now()
			r, err := cl.Revoke(cmd.Context(), subject, reason)
			if err != nil {
				return err
			}
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), r); err != nil {
					return err
				}
			} else {
				say(cmd.OutOrStdout(), "Revoked %s (revocation %s, index %d) in %v.", r.Subject, r.ID, r.Index, time.Since(start).Round(time.Millisecond))
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
	c.Flags().StringVar(&subject, "subject", "", "provider/name, as sallyport sessions list shows it (required)")
	_ = c.MarkFlagRequired("subject")
	reasonFlag(c, &reason)
	return c
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
				if !r.Undone.IsZero() {
					state = "undone " + stamp(r.Undone)
				}
				rows = append(rows, []string{r.ID, r.Subject, state, stamp(r.At), r.Reason})
			}
			table(cmd.OutOrStdout(), "ID SUBJECT STATE AT REASON", rows)
			return nil
		},
	}
	var reason string
	undo := &cobra.Command{
		Use: "undo ID --reason TEXT", Short: "Undo a revocation; credentials issued before stay dead", Args: exactArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			r, err := cl.Undo(cmd.Context(), args[0], reason)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), r)
			}
			say(cmd.OutOrStdout(), "Undone. %s may log in again with a token issued a minute from now or later: clocks may differ by that much, and no earlier token is revived.", r.Subject)
			return nil
		},
	}
	reasonFlag(undo, &reason)
	c.AddCommand(list, undo)
	return c
}

package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/recording/terminal"
)

func approvalsCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "approvals", Short: "List, show, approve and deny held commands", Aliases: []string{"approval"}}
	c.AddCommand(approvalsList(f), approvalsShow(f), approvalsVote(f, true), approvalsVote(f, false))
	return c
}

func approvalsList(f *clientFlags) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "list", Short: "List what waits for approval", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			state := "pending"
			if all {
				state = ""
			}
			list, err := cl.Approvals(cmd.Context(), state)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			var rows [][]string
			for _, a := range list {
				rows = append(rows, []string{a.ID, a.State, a.Subject, a.Target + "/" + a.Database, strings.Join(a.Rules, ","),
					fmt.Sprintf("%d/%d", len(a.Votes), a.Count), ago(a.Asked), time.Until(a.Expires).Round(time.Second).String()})
			}
			if len(rows) == 0 {
				say(cmd.OutOrStdout(), "Nothing waits for approval.")
				return nil
			}
			table(cmd.OutOrStdout(), "ID STATE SUBJECT TARGET RULES VOTES ASKED EXPIRES-IN", rows)
			return nil
		},
	}
	c.Flags().BoolVar(&all, "all", false, "those decided and expired too")
	return c
}

func approvalsShow(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show exactly what would run, for whom and where", Args: exactArgs("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			a, err := cl.Approval(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), a)
			}
			showApproval(cmd, a)
			return nil
		},
	}
}

func showApproval(cmd *cobra.Command, a *api.ApprovalInfo) {
	w := cmd.OutOrStdout()
	say(w, "Approval %s: %s", a.ID, a.State)
	say(w, "  asked by   %s, %s, on node %s", a.Subject, ago(a.Asked), a.Node)
	for _, k := range slices.Sorted(maps.Keys(a.Claims)) {
		say(w, "             %s = %v", k, a.Claims[k])
	}
	say(w, "  target     %s, database %s, session %s", a.Target, a.Database, a.Session)
	for _, k := range slices.Sorted(maps.Keys(a.Detail)) {
		say(w, "  %-10s %s", k, a.Detail[k])
	}
	say(w, "  rules      %s; %d approver(s) from %s", strings.Join(a.Rules, ", "), a.Count, strings.Join(a.Groups, ", "))
	say(w, "  expires    %s", stamp(a.Expires))
	say(w, "  digest     %s", a.Digest)
	for _, v := range a.Votes {
		verb := "denied"
		if v.Approve {
			verb = "approved"
		}
		say(w, "  %s by %s at %s %s", verb, v.Approver, stamp(v.At), v.Comment)
	}
	if a.Ended != "" {
		say(w, "  ended      %s", a.Ended)
	}
	fmt.Fprintln(w, "  what will run, every byte; control and invisible characters are escaped:")
	for line := range strings.Lines(a.Text) {
		fmt.Fprintln(w, "    | "+terminal.EscapeLine(strings.TrimSuffix(line, "\n")))
	}
}

func approvalsVote(f *clientFlags, approve bool) *cobra.Command {
	verb, done := "deny", "Denied"
	if approve {
		verb, done = "approve", "Approved"
	}
	var comment, digest string
	var yes bool
	c := &cobra.Command{
		Use: verb + " ID", Short: strings.ToUpper(verb[:1]) + verb[1:] + " a held command", Args: exactArgs("ID"),
		Long: strings.ToUpper(verb[:1]) + verb[1:] + `s a held command. It is shown once more; the decision is bound
to the digest of exactly that. --digest makes sure that it is still what you
looked at earlier.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			a, err := cl.Approval(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if digest != "" && !strings.EqualFold(digest, a.Digest) {
				return fmt.Errorf("request %s is for something else: its digest is %s", a.ID, a.Digest)
			}
			if !f.json {
				showApproval(cmd, a)
			}
			if digest == "" && !yes && isTerminal(os.Stdin) {
				if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr(), strings.ToUpper(verb[:1])+verb[1:]+" exactly this? [yes/no] "); err != nil {
					return err
				}
			}
			res, err := cl.Vote(cmd.Context(), a.ID, a.Digest, approve, comment)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), res)
			}
			say(cmd.OutOrStdout(), "%s %s (event %d).", done, a.ID, res.Seq)
			return nil
		},
	}
	c.Flags().StringVar(&comment, "comment", "", "a word to the requester, kept with the decision")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask (without a terminal nobody is asked)")
	c.Flags().StringVar(&digest, "digest", "", "refuse unless the request has this digest")
	return c
}

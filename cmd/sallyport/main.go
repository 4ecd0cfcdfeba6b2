// Command sallyport is the whole product: the node, and what people and
// automation do with a cluster. One file per subcommand.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/recording/terminal"
)

// version is set when a release is built.
var version = "0.1.0-dev"

func main() { os.Exit(run(os.Args[1:])) }

// run is main for tests too. Exit codes: 0 done, 1 failed, 2 not understood,
// 3 a revocation that stands and is not in force everywhere.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	root := newRoot()
	root.SetArgs(args)
	// What fails before a command runs was not understood: an unknown name, a
	// flag that is missing.
	begun := false
	onRun(root, func() { begun = true })
	c, err := root.ExecuteContextC(ctx)
	switch {
	case err == nil && !c.Runnable() && c.Flags().NArg() > 0:
		err = usageError{fmt.Errorf("%q is no command of `%s`", c.Flags().Arg(0), c.CommandPath())}
	case err == nil:
		return 0
	case !begun:
		err = usageError{err}
	}
	var usage usageError
	fmt.Fprintln(os.Stderr, "sallyport: "+terminal.EscapeString(err.Error()))
	if errors.As(err, &usage) {
		fmt.Fprintln(os.Stderr, "Try `sallyport --help`.")
		return 2
	}
	var code exitError
	if errors.As(err, &code) {
		return code.code
	}
	return 1
}

// exitError is an error with an exit code of its own.
type exitError struct {
	code int
	error
}

// onRun has f called before any command of the tree runs.
func onRun(c *cobra.Command, f func()) {
	if run := c.RunE; run != nil {
		c.RunE = func(cmd *cobra.Command, args []string) error {
			f()
			return run(cmd, args)
		}
	}
	for _, sub := range c.Commands() {
		onRun(sub, f)
	}
}

// usageError is a command line that was not understood.
type usageError struct{ error }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "sallyport",
		Short: "Identity-aware access gateway for CI jobs, services and agents",
		Long: `Sallyport stands between callers and what they reach. It judges every command
by policy, holds risky ones for a person's approval, masks what the caller must
not see, records everything, and cuts access at once when told to.

A first look:  sallyport demo
A cluster:     sallyport cluster init, sallyport serve, sallyport cluster join
Its rules:     sallyport apply -f DIR
What goes on:  sallyport status, sessions list, events list, recordings list`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := &clientFlags{}
	f.register(root)
	root.AddGroup(
		&cobra.Group{ID: "run", Title: "Run a cluster:"},
		&cobra.Group{ID: "use", Title: "Work with a cluster:"},
		&cobra.Group{ID: "see", Title: "See what goes on:"},
		&cobra.Group{ID: "try", Title: "Try it:"},
	)
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("run", serveCommand(), clusterCommand(f), applyCommand(f), targetsCommand(f), doctorCommand(f))
	add("use", loginCommand(f), whoamiCommand(f), approvalsCommand(f), revokeCommand(f), revocationsCommand(f))
	add("see", statusCommand(f), sessionsCommand(f), eventsCommand(f), stateCommand(f), policyCommand(f), recordingsCommand(f))
	add("try", demoCommand(), devIssuerCommand())
	return root
}

// exactArgs is cobra.ExactArgs with an error that names what is wanted.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usageError{fmt.Errorf("want %d argument(s) %v, got %d", len(names), names, len(args))}
		}
		return nil
	}
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%q is not understood here", args[0])}
	}
	return nil
}

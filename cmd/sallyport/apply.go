package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/policy"
)

// problemsError is a configuration that is refused, a line for each reason.
type problemsError []string

func (p problemsError) Error() string {
	return fmt.Sprintf("nothing was changed: %d problem(s)\n  %s", len(p), strings.Join(p, "\n  "))
}

func applyCommand(f *clientFlags) *cobra.Command {
	var dir string
	var yes, dryRun, dev bool
	c := &cobra.Command{
		Use: "apply -f DIR", Short: "Make a directory of files the cluster's configuration", Args: noArgs,
		Long: `Reads targets, identity providers, sensitive columns (*.yaml) and policies
(*.cedar) from DIR, shows what would change, and after a "yes" makes that the
configuration of every node by one event. With any problem in it nothing is
changed. docs/configuration-bundle.md describes the files.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			up, problems, err := readBundle(dir, dev)
			if err != nil {
				return err
			}
			if len(problems) > 0 {
				return problemLines(dir, problems)
			}
			up.DryRun = true
			plan, err := cl.Apply(cmd.Context(), up)
			if err != nil {
				return applyError(dir, err)
			}
			out := cmd.OutOrStdout()
			if len(plan.Changes) == 0 {
				if f.json {
					return printJSON(out, plan)
				}
				say(out, "No changes: this is the configuration already (index %d).", plan.Index)
				return nil
			}
			if !f.json {
				say(out, "Changes to the configuration at index %d:", plan.Index)
				for _, l := range plan.Changes {
					say(out, "  %s", l)
				}
			}
			if dryRun {
				if f.json {
					return printJSON(out, plan)
				}
				return nil
			}
			if !yes {
				if err := confirm(cmd.InOrStdin(), cmd.ErrOrStderr(), "Apply these changes? [yes/no] "); err != nil {
					return err
				}
			}
			up.DryRun, up.Expect = false, plan.Index
			res, err := cl.Apply(cmd.Context(), up)
			if err != nil {
				return applyError(dir, err)
			}
			if f.json {
				return printJSON(out, res)
			}
			say(out, "Applied: index %d. All nodes act on it.", res.Index)
			return nil
		},
	}
	c.Flags().StringVarP(&dir, "file", "f", "", "directory with the configuration (required)")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "only show what would change")
	c.Flags().BoolVar(&dev, "dev", false, "let through what is marked dev: true; nodes without --dev refuse it all the same")
	_ = c.MarkFlagRequired("file")
	return c
}

// readBundle reads the directory and the secrets that its targets name.
func readBundle(dir string, dev bool) (*api.ConfigUpload, []policy.Problem, error) {
	if st, err := os.Stat(dir); err != nil {
		return nil, nil, err
	} else if !st.IsDir() {
		return nil, nil, fmt.Errorf("%s is not a directory", dir)
	}
	b, secrets, problems := bundle.Load(os.DirFS(dir), bundle.LoadOptions{
		Dev: dev, Getenv: os.Getenv,
		ReadFile: func(name string) ([]byte, error) {
			if !filepath.IsAbs(name) {
				name = filepath.Join(dir, name)
			}
			return os.ReadFile(name)
		},
	})
	if len(problems) > 0 {
		return nil, problems, nil
	}
	up := &api.ConfigUpload{Files: b.Files, Secrets: map[string][]byte{}}
	for n, s := range secrets {
		up.Secrets[n] = s
	}
	return up, nil, nil
}

func problemLines(dir string, problems []policy.Problem) error {
	var lines problemsError
	for _, p := range problems {
		if p.Path != "" {
			p.Path = filepath.Join(dir, p.Path)
		}
		lines = append(lines, p.String())
	}
	return lines
}

// applyError prints the node's own findings like ours.
func applyError(dir string, err error) error {
	var fail *api.Failure
	if errors.As(err, &fail) && len(fail.Lines) > 0 {
		lines := make(problemsError, len(fail.Lines))
		for i, l := range fail.Lines {
			lines[i] = filepath.Join(dir, l)
		}
		return lines
	}
	return err
}

func confirm(in io.Reader, out io.Writer, question string) error {
	fmt.Fprint(out, question)
	line, err := bufio.NewReader(in).ReadString('\n')
	if strings.TrimSpace(line) == "yes" {
		return nil
	}
	if err != nil && line == "" {
		return errors.New("nobody answered, so nothing was done; --yes does not ask")
	}
	return errors.New("nothing was done")
}

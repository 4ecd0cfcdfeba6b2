package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/credential"
)

func targetsCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "targets", Short: "Prepare and check targets"}
	c.AddCommand(targetsSetup(), targetsCheck(f))
	return c
}

func targetsSetup() *cobra.Command {
	var o credential.SetupOptions
	var passwordEnv string
	c := &cobra.Command{
		Use: "setup-sql --roles ROLE,… --databases DB,…", Short: "Print the SQL that an owner runs once on their own database", Args: noArgs,
		Long: `Prints, for PostgreSQL 15 and later, what makes the account with which Sallyport
makes and drops an account for each session. Read it before you run it. With
--password-env the account's password is in it as a SCRAM verifier, which does
not tell the password; without, set one with psql's \password.`,
		Example: `  sallyport targets setup-sql --roles shop_app,shop_read --databases shop | psql -h db.internal postgres`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(o.Roles) == 0 || len(o.Databases) == 0 {
				return usageError{errors.New("--roles and --databases are needed")}
			}
			if passwordEnv != "" {
				pw := os.Getenv(passwordEnv)
				if pw == "" {
					return fmt.Errorf("the environment variable %s is empty", passwordEnv)
				}
				v, err := credential.SCRAMVerifier(pw)
				if err != nil {
					return err
				}
				o.Verifier = v
			}
			_, err := fmt.Fprint(cmd.OutOrStdout(), credential.SetupSQL(o))
			return err
		},
	}
	fl := c.Flags()
	fl.StringVar(&o.Target, "target", "", "the target's name, for the comments")
	fl.StringVar(&o.Admin, "admin", "sallyport", "the account to make")
	fl.StringSliceVar(&o.Roles, "roles", nil, "roles of yours that sessions become members of")
	fl.StringSliceVar(&o.Databases, "databases", nil, "databases that sessions connect to")
	fl.StringVar(&passwordEnv, "password-env", "", "environment variable with the account's password")
	return c
}

func targetsCheck(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "check", Short: "Say, for each node, whether each target can be used", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			st, err := cl.Status(cmd.Context())
			if err != nil {
				return err
			}
			var rows [][]string
			bad := 0
			for _, n := range st.Nodes {
				for name, state := range n.Targets {
					rows = append(rows, []string{name, n.Node, strings.ReplaceAll(state, "\n", "; ")})
					if state != "ok" {
						bad++
					}
				}
			}
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), rows); err != nil {
					return err
				}
			} else {
				table(cmd.OutOrStdout(), "TARGET NODE STATE", rows)
			}
			if bad > 0 {
				return fmt.Errorf("%d target(s) cannot be used as configured", bad)
			}
			return nil
		},
	}
}

package main

import (
	"errors"
	"os"
	"path/filepath"

	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/pki"
)

func loginCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{
		Use:   "login --server HOST:PORT --ca FILE (--token-file FILE | --admin-cert FILE --admin-key FILE)",
		Short: "Remember a cluster and a credential for later commands",
		Long: `Checks the credential against the cluster and remembers where it is, so that
later commands need no flags. The token itself is not copied: its file is read
anew for every call, so that whatever renews it keeps working.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.resolve()
			if err != nil {
				return err
			}
			if s.token != "" {
				return errors.New("SALLYPORT_TOKEN needs no login: it is used as it is; to remember a token give --token-file")
			}
			for _, p := range []*string{&s.TokenFile, &s.AdminCert, &s.AdminKey} {
				if *p != "" {
					if *p, err = filepath.Abs(*p); err != nil {
						return err
					}
				}
			}
			cl, err := s.client()
			if err != nil {
				return err
			}
			who, err := cl.Whoami(cmd.Context())
			if err != nil {
				return err
			}
			path, err := storedPath()
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return err
			}
			data, err := json.MarshalIndent(s.stored, "", "  ")
			if err != nil {
				return err
			}
			if err := pki.WriteFile(path, append(data, '\n')); err != nil {
				return err
			}
			say(cmd.OutOrStdout(), "You are %s. Remembered in %s.", who.Subject, path)
			return nil
		},
	}
	return c
}

func whoamiCommand(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "whoami", Short: "Say who you are to the cluster", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			who, err := cl.Whoami(cmd.Context())
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), who)
			}
			say(cmd.OutOrStdout(), "%s (%s)\ngroups: %v\nexpires: %s", who.Subject, who.Kind, who.Groups, stamp(who.Expires))
			return nil
		},
	}
}

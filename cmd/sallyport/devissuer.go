package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node/devissuer"
)

func devIssuerCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "dev-issuer", Short: "A small OIDC issuer for local trials",
		Long: `Stands in for a CI platform's OIDC issuer on one machine. It listens on loopback
only, and nodes take its tokens only when started with --dev.`,
	}
	var dir, addr string
	serve := &cobra.Command{
		Use: "serve --dir DIR --addr 127.0.0.1:PORT", Short: "Serve discovery and keys", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := devissuer.Create(dir, addr)
			if err != nil {
				return err
			}
			l, err := i.Listen()
			if err != nil {
				return err
			}
			say(cmd.OutOrStdout(), "Issuer %s\nCA     %s", i.URL(), i.CAPath())
			return i.Serve(cmd.Context(), l)
		},
	}
	serve.Flags().StringVar(&dir, "dir", "", "directory for the issuer's keys (required)")
	serve.Flags().StringVar(&addr, "addr", "127.0.0.1:8444", "loopback address to listen at")
	_ = serve.MarkFlagRequired("dir")

	var claims, alg string
	var ttl time.Duration
	token := &cobra.Command{
		Use: "token --dir DIR --claims JSON", Short: "Mint a token with any claims", Args: noArgs,
		Example: `  sallyport dev-issuer token --dir ./issuer --claims '{"sub":"repo:acme/shop:ref:refs/heads/main","aud":"sallyport","repository":"acme/shop"}'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := devissuer.Open(dir)
			if err != nil {
				return err
			}
			m := map[string]any{}
			if err := json.Unmarshal([]byte(claims), &m); err != nil {
				return usageError{fmt.Errorf("--claims: %w", err)}
			}
			if _, given := m["exp"]; !given && ttl != 0 {
				m["exp"] = time.Now().Add(ttl).Unix()
			}
			tok, err := i.Mint(alg, m)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), tok)
			return nil
		},
	}
	token.Flags().StringVar(&dir, "dir", "", "the issuer's directory (required)")
	token.Flags().StringVar(&claims, "claims", "{}", "claims as a JSON object; null leaves one out")
	token.Flags().StringVar(&alg, "alg", devissuer.RS256, "RS256, ES256, or none to see an unsigned token refused")
	token.Flags().DurationVar(&ttl, "ttl", devissuer.DefaultLifetime, "lifetime; negative makes an expired token")
	_ = token.MarkFlagRequired("dir")
	c.AddCommand(serve, token)
	return c
}

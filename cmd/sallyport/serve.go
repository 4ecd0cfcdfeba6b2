package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node"
	"github.com/sallyport/sallyport/node/config"
)

func serveCommand() *cobra.Command {
	var dir, level, gate string
	var dev bool
	c := &cobra.Command{
		Use: "serve --data-dir DIR", Short: "Run a node", Args: noArgs,
		Long: `Runs the node in DIR, made by "cluster init" or "cluster join", until it gets
SIGINT or SIGTERM: then it hands over leadership, lets sessions end for up to
20 seconds, cuts the rest, and brings its recordings to the store.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(dir)
			if err != nil {
				return err
			}
			cfg.Dev = cfg.Dev || dev
			if gate != "" {
				cfg.KernelGate = gate
				if err := cfg.Validate(); err != nil {
					return usageError{err}
				}
			}
			var l slog.Level
			if err := l.UnmarshalText([]byte(level)); err != nil {
				return usageError{fmt.Errorf("--log-level: %w", err)}
			}
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})).With("node", cfg.Name)
			n, err := node.New(cfg, version, log)
			if err != nil {
				return err
			}
			return n.Run(cmd.Context())
		},
	}
	c.Flags().StringVar(&dir, "data-dir", "", "the node's directory (required)")
	c.Flags().BoolVar(&dev, "dev", false, "for local trials: accept tokens of sallyport dev-issuer and targets without TLS")
	c.Flags().StringVar(&gate, "kernel-gate", "", "auto, require or off, in place of kernelGate in node.yaml")
	c.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	_ = c.MarkFlagRequired("data-dir")
	return c
}

//go:build bench

package raftstore

import "github.com/cockroachdb/pebble/v2/vfs"

// SetFS puts the store's databases on fs.
func (c *Config) SetFS(fs vfs.FS) { c.seams.fs = fs }

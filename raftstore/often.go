//go:build !chaos

package raftstore

// often is where builds for chaos runs (tag chaos) take snapshots more often.
func often(*Config) {}

//go:build !chaos

package disk

import "github.com/cockroachdb/pebble/v2/vfs"

// FS is where databases are: the operating system's file system. Builds for
// chaos runs (tag chaos) put one in between that can fail and hang.
func FS() vfs.FS { return vfs.Default }

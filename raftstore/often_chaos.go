//go:build chaos

package raftstore

import (
	"fmt"
	"os"
	"time"
)

// often takes what SALLYPORT_CHAOS_SNAPSHOTS says, such as "200ms 40 20", for
// SnapshotInterval, SnapshotThreshold and TrailingLogs: a run of minutes must
// come to snapshots that a cluster has once in hours.
//
// Only builds with the tag chaos have it. A test holds that others do not.
func often(cfg *Config) {
	v := os.Getenv("SALLYPORT_CHAOS_SNAPSHOTS")
	if v == "" {
		return
	}
	var interval string
	_, err := fmt.Sscan(v, &interval, &cfg.SnapshotThreshold, &cfg.TrailingLogs)
	if err == nil {
		cfg.SnapshotInterval, err = time.ParseDuration(interval)
	}
	if err != nil { // a run that tests nothing must not pass
		panic(fmt.Sprintf("SALLYPORT_CHAOS_SNAPSHOTS=%q: %v", v, err))
	}
}

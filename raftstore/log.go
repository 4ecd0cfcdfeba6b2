package raftstore

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// newRaftLogger is a logger for raft that writes to log.
func newRaftLogger(log *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Output: io.Discard, Level: hclog.Debug})
	l.RegisterSink(sink{log})
	return l
}

// sink is an hclog.SinkAdapter.
type sink struct{ log *slog.Logger }

func (s sink) Accept(name string, level hclog.Level, msg string, args ...any) {
	l := slog.LevelDebug
	switch level {
	case hclog.Info:
		l = slog.LevelInfo
	case hclog.Warn:
		l = slog.LevelWarn
	case hclog.Error:
		l = slog.LevelError
	}
	if !s.log.Enabled(context.Background(), l) {
		return
	}
	for i, a := range args {
		switch a := a.(type) {
		case hclog.Format:
			if f, ok := a[0].(string); ok {
				args[i] = fmt.Sprintf(f, a[1:]...)
			}
		case error:
			args[i] = a.Error()
		}
	}
	s.log.Log(context.Background(), l, name+": "+msg, args...)
}

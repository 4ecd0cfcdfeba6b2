//go:build !chaos

package transport

import (
	"context"
	"time"
)

// line is where builds for chaos runs (tag chaos) hold up a class of traffic;
// others have nothing there.
type line struct{}

// direction of what is held up.
type direction int

const (
	reading direction = iota
	writing
)

func newLine(string) line                     { return line{} }
func (*line) wait(direction) error            { return nil }
func (*line) until(direction, time.Time)      {}
func (*line) close()                          {}
func reachable(context.Context, string) error { return nil }

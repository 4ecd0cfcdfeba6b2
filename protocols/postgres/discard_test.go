package postgres

import (
	"context"

	"github.com/sallyport/sallyport/recording"
)

// discard is a recorder of nothing.
type discard struct{}

func (discard) Append(*recording.Entry) (recording.LSN, error) { return 0, nil }
func (discard) Buffer(*recording.Entry) error                  { return nil }
func (discard) Flush() error                                   { return nil }
func (discard) Sync(context.Context, recording.LSN) error      { return nil }

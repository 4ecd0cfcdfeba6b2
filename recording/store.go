package recording

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A Store holds recordings as objects that are written once. It has no way to
// change or delete one. Implementations are in recording/upload; all methods
// are safe for concurrent use.
type Store interface {
	// Put writes data under key, whole or not at all. It fails with ErrExists
	// when the key is taken, whatever is stored there. After another error the
	// object may or may not have been written. It does not keep data.
	Put(ctx context.Context, key string, data []byte) error
	// Get returns the object, ErrNotFound, or ErrTooLarge when it is longer
	// than MaxObjectBytes.
	Get(ctx context.Context, key string) ([]byte, error)
	// List calls fn for every object whose key begins with prefix and is
	// greater than after, in the byte order of keys. It ends with fn's error,
	// or with nil when fn returned ErrStop.
	List(ctx context.Context, prefix, after string, fn func(Object) error) error
	// String says where the store is, without secrets.
	String() string
}

// Object is what a listing tells of one stored object.
type Object struct {
	Key      string
	Size     int64
	Modified time.Time
}

// MaxObjectBytes bounds any object of a recording: the largest segment's
// frames when they do not compress at all, with room for its meta data.
const MaxObjectBytes = 48 << 20

var (
	// ErrExists: the key is taken; nothing was written.
	ErrExists = errors.New("recording: the object exists already")
	// ErrNotFound: no object has that key.
	ErrNotFound = errors.New("recording: no such object")
	// ErrTooLarge: the object cannot be part of a recording.
	ErrTooLarge = errors.New("recording: the object is larger than any that belongs to a recording")
	// ErrStop, returned by a callback of List, ends the listing without error.
	ErrStop = errors.New("recording: stop listing")
)

// Root is what the keys of all recordings begin with.
const Root = "sessions/"

// Names of the objects of one recording, under its prefix.
const (
	HeaderName  = "header"
	TrailerName = "trailer"
)

// Prefix returns what the keys of one recording begin with:
// "sessions/YYYY/MM/DD/<session>/", the day being that of started in UTC.
func Prefix(started time.Time, session string) string {
	return started.UTC().Format(Root+"2006/01/02/") + session + "/"
}

// SegmentName returns the name of the n-th segment (from 1): "000001.seg".
func SegmentName(n uint64) string { return fmt.Sprintf("%06d.seg", n) }

// CheckSession says whether session can name a recording: 1 to 128 of
// A-Z a-z 0-9 . _ -, not beginning with a dot. It becomes part of object keys
// and of paths.
func CheckSession(session string) error {
	if len(session) == 0 || len(session) > 128 || session[0] == '.' {
		return fmt.Errorf("recording: %q cannot name a recording", session)
	}
	for i := range len(session) {
		c := session[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return fmt.Errorf("recording: %q cannot name a recording", session)
		}
	}
	return nil
}

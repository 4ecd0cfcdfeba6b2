// Package upload holds the stores recordings are kept in: a directory and an
// S3 bucket. Both write objects once and never delete; see recording.Store.
package upload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/sallyport/sallyport/recording"
)

// Open returns the store at location:
//
//	/var/lib/sallyport/recordings     a directory, made when missing
//	file:///var/lib/sallyport/recordings
//	s3://bucket/prefix?region=eu-central-1
//	s3://bucket?endpoint=http://127.0.0.1:9000&region=us-east-1&path-style=true
//
// S3 credentials come from the usual chain: the AWS_ variables of the
// environment, the shared credentials file, the instance's or pod's role. An
// endpoint that is plain http must be on loopback, or plaintext=true be given.
// Open does not speak to the bucket; see CheckWriteOnce.
func Open(ctx context.Context, location string) (recording.Store, error) {
	switch {
	case location == "":
		return nil, errors.New("recording: no store is given")
	case strings.HasPrefix(location, "/"):
		return openDir(location)
	}
	u, err := url.Parse(location)
	if err != nil {
		return nil, fmt.Errorf("recording: store: %w", err)
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" && u.Host != "localhost" || u.RawQuery != "" || !strings.HasPrefix(u.Path, "/") {
			return nil, fmt.Errorf("recording: store %s: a directory is given as file:///path", location)
		}
		return openDir(u.Path)
	case "s3":
		return openS3(u)
	case "":
		return openDir(location)
	}
	return nil, fmt.Errorf("recording: store %s: known are a path, file:// and s3://", u.Redacted())
}

// ErrOverwrites: the store replaces objects although it was told not to
// (If-None-Match: *). Recordings would not be safe there.
var ErrOverwrites = errors.New("the store overwrites objects although told not to (If-None-Match: *): recordings there would not be safe")

// checkKey is the object CheckWriteOnce writes.
const checkKey = "check/write-once"

// CheckWriteOnce makes sure that the store can be written and read and refuses
// to overwrite: a server that ignores If-None-Match would let recordings be
// replaced unseen. It leaves one small object, the same each time.
func CheckWriteOnce(ctx context.Context, store recording.Store) error {
	want := []byte("sallyport: this object must not change\n")
	if err := store.Put(ctx, checkKey, want); err != nil && !errors.Is(err, recording.ErrExists) {
		return fmt.Errorf("recording: store %s cannot be written: %w", store, err)
	}
	err := store.Put(ctx, checkKey, []byte("sallyport: this store overwrites objects\n"))
	if err == nil {
		return fmt.Errorf("recording: store %s: %w", store, ErrOverwrites)
	}
	if !errors.Is(err, recording.ErrExists) {
		return fmt.Errorf("recording: store %s cannot be written: %w", store, err)
	}
	got, err := store.Get(ctx, checkKey)
	if err != nil {
		return fmt.Errorf("recording: store %s cannot be read: %w", store, err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("recording: store %s holds another %s than was written: %w", store, checkKey, ErrOverwrites)
	}
	return nil
}

// checkKeyName refuses keys that are not ours: they become paths.
func checkKeyName(key string) error {
	if key == "" || len(key) > 512 {
		return fmt.Errorf("recording: key %q", key)
	}
	for part := range strings.SplitSeq(key, "/") {
		if err := recording.CheckSession(part); err != nil {
			return fmt.Errorf("recording: key %q", key)
		}
	}
	return nil
}

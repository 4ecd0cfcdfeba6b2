package upload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
)

// dirStore keeps objects as files of mode 0600 in directories of mode 0700. An
// object is written under ROOT/.tmp, synced, and linked to its name, which
// fails when the name is taken: a crash leaves an object whole or not there.
type dirStore struct {
	root string
}

const tmpName = ".tmp" // no key begins with a dot

func openDir(root string) (*dirStore, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("recording: store: %w", err)
	}
	d := &dirStore{root: root}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("recording: store: %w", err)
	}
	return d, nil
}

func (d *dirStore) String() string { return d.root }

func (d *dirStore) path(key string) (string, error) {
	if err := checkKeyName(key); err != nil {
		return "", err
	}
	return filepath.Join(d.root, filepath.FromSlash(key)), nil
}

func (d *dirStore) Put(ctx context.Context, key string, data []byte) error {
	path, err := d.path(key)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.put(path, data); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return recording.ErrExists
		}
		return fmt.Errorf("recording: store: %w", err)
	}
	return nil
}

func (d *dirStore) put(path string, data []byte) error {
	if _, err := os.Lstat(path); err == nil {
		return fs.ErrExist
	}
	tmp, err := d.writeTmp(data)
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	if err := d.makeDirs(filepath.Dir(path)); err != nil {
		return err
	}
	if err := os.Link(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// writeTmp writes data to a file of its own and syncs it.
func (d *dirStore) writeTmp(data []byte) (string, error) {
	dir := filepath.Join(d.root, tmpName)
	if err := os.Mkdir(dir, 0o700); err == nil {
		// The first writer of this store.
	} else if !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	f, err := os.CreateTemp(dir, "put-") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// makeDirs is MkdirAll below root that brings new directories to disk.
func (d *dirStore) makeDirs(dir string) error {
	if _, err := os.Stat(dir); err == nil || dir == d.root {
		return err
	}
	if err := d.makeDirs(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *dirStore) Get(ctx context.Context, key string) ([]byte, error) {
	path, err := d.path(key)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, recording.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("recording: store: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("recording: store: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, recording.ErrNotFound
	}
	return readObject(f, info.Size())
}

// readObject reads an object that says it is size bytes long.
func readObject(r io.Reader, size int64) ([]byte, error) {
	if size > recording.MaxObjectBytes {
		return nil, recording.ErrTooLarge
	}
	b := make([]byte, 0, max(size, 0)+1)
	for {
		n, err := r.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if len(b) > recording.MaxObjectBytes {
			return nil, recording.ErrTooLarge
		}
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return nil, fmt.Errorf("recording: store: %w", err)
		}
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
	}
}

func (d *dirStore) List(ctx context.Context, prefix, after string, fn func(recording.Object) error) error {
	err := d.walk(ctx, "", prefix, after, fn)
	if errors.Is(err, recording.ErrStop) {
		return nil
	}
	return err
}

// walk visits one directory (key ends in "/" or is empty) in the byte order of
// keys, in which a directory counts with its slash, and passes by what prefix
// or after exclude.
func (d *dirStore) walk(ctx context.Context, key, prefix, after string, fn func(recording.Object) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(d.root, filepath.FromSlash(key)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("recording: store: %w", err)
	}
	keys := make([]string, 0, len(entries))
	kinds := make(map[string]fs.DirEntry, len(entries))
	for _, e := range entries {
		k := key + e.Name()
		if e.IsDir() {
			k += "/"
		} else if !e.Type().IsRegular() {
			continue
		}
		if k == tmpName+"/" {
			continue
		}
		keys = append(keys, k)
		kinds[k] = e
	}
	slices.Sort(keys)
	for _, k := range keys {
		e := kinds[k]
		if e.IsDir() {
			below := strings.HasPrefix(k, prefix) || strings.HasPrefix(prefix, k)
			if !below || k <= after && !strings.HasPrefix(after, k) {
				continue
			}
			if err := d.walk(ctx, k, prefix, after, fn); err != nil {
				return err
			}
			continue
		}
		if !strings.HasPrefix(k, prefix) || k <= after {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return fmt.Errorf("recording: store: %w", err)
		}
		if err := fn(recording.Object{Key: k, Size: info.Size(), Modified: info.ModTime().In(time.UTC)}); err != nil {
			return err
		}
	}
	return nil
}

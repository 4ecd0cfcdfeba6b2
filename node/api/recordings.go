package api

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/sallyport/sallyport/recording"
)

// The store of recordings may be reachable by nodes only. These calls lend it,
// read-only, to whoever may recordings:read. What they return is verified by
// the reader like anything from a store: a node is not trusted for it.

// maxListed bounds one answer of a listing; the caller asks on from the last.
const maxListed = 1000

// Objects is a part of a store's listing.
type Objects struct {
	Objects []recording.Object `json:"objects"`
	More    bool               `json:"more"`
}

// ObjectData is one object of the store.
type ObjectData struct {
	Data string `json:"data"` // base64
}

func (s *Server) listObjects(_ http.ResponseWriter, r *request) (any, error) {
	q := r.URL.Query()
	if !strings.HasPrefix(q.Get("prefix"), recording.Root) {
		return nil, invalid("prefix: want one that begins with %s", recording.Root)
	}
	out := Objects{Objects: []recording.Object{}}
	err := s.Recordings.List(r.Context(), q.Get("prefix"), q.Get("after"), func(o recording.Object) error {
		if len(out.Objects) == maxListed {
			out.More = true
			return recording.ErrStop
		}
		out.Objects = append(out.Objects, o)
		return nil
	})
	return out, err
}

func (s *Server) getObject(_ http.ResponseWriter, r *request) (any, error) {
	key := r.URL.Query().Get("key")
	if !strings.HasPrefix(key, recording.Root) {
		return nil, invalid("key: want one that begins with %s", recording.Root)
	}
	data, err := s.Recordings.Get(r.Context(), key)
	if errors.Is(err, recording.ErrNotFound) {
		return nil, notFound("the store has no object %q", key)
	}
	if err != nil {
		return nil, err
	}
	return ObjectData{base64.StdEncoding.EncodeToString(data)}, nil
}

// Store is the cluster's store of recordings, read through the API.
func (c *Client) Store() recording.Store { return clientStore{c} }

type clientStore struct{ c *Client }

func (s clientStore) String() string { return "the cluster's store, through the API" }

func (s clientStore) Put(context.Context, string, []byte) error {
	return errors.New("the API does not write recordings")
}

func (s clientStore) Get(ctx context.Context, key string) ([]byte, error) {
	d, err := call[ObjectData](ctx, s.c, http.MethodGet, "/v1/recordings/object?key="+url.QueryEscape(key), nil)
	var f *Failure
	if errors.As(err, &f) && f.Status == http.StatusNotFound {
		return nil, recording.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return base64.StdEncoding.DecodeString(d.Data)
}

func (s clientStore) List(ctx context.Context, prefix, after string, fn func(recording.Object) error) error {
	for {
		q := url.Values{"prefix": {prefix}, "after": {after}}
		part, err := call[Objects](ctx, s.c, http.MethodGet, "/v1/recordings?"+q.Encode(), nil)
		if err != nil {
			return err
		}
		for _, o := range part.Objects {
			if err := fn(o); errors.Is(err, recording.ErrStop) {
				return nil
			} else if err != nil {
				return err
			}
			after = o.Key
		}
		if !part.More || len(part.Objects) == 0 {
			return nil
		}
	}
}

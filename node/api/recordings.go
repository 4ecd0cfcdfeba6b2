package api

import (
	"encoding/base64"
	"errors"
	"net/http"
	"strings"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/index"
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

// lent says that a key is of a recording or of their index.
func lent(key string) bool {
	return strings.HasPrefix(key, recording.Root) || strings.HasPrefix(key, index.Root)
}

func (s *Server) listObjects(_ http.ResponseWriter, r *request) (any, error) {
	q := r.URL.Query()
	if !lent(q.Get("prefix")) {
		return nil, invalid("prefix: want one that begins with %s or %s", recording.Root, index.Root)
	}
	return listPart(r.Context(), s.Recordings.List, q.Get("prefix"), q.Get("after"))
}

func (s *Server) getObject(_ http.ResponseWriter, r *request) (any, error) {
	key := r.URL.Query().Get("key")
	if !lent(key) {
		return nil, invalid("key: want one that begins with %s or %s", recording.Root, index.Root)
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
func (c *Client) Store() recording.Store {
	return clientStore{c: c, list: "/v1/recordings", object: "/v1/recordings/object", name: "the cluster's store, through the API"}
}

package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/raftstore/tlog"
	"github.com/sallyport/sallyport/recording"
)

// The event log as objects, in the form they are exported, made from what this
// node has: who may events:read can verify it without access to the store. What
// is returned is verified by the reader; the node is not trusted for it.

func (s *Server) listLog(_ http.ResponseWriter, r *request) (any, error) {
	q := r.URL.Query()
	if !strings.HasPrefix(q.Get("prefix"), tlog.Root) {
		return nil, invalid("prefix: want one that begins with %s", tlog.Root)
	}
	return listPart(r.Context(), s.EventLog.List, q.Get("prefix"), q.Get("after"))
}

func (s *Server) getLog(_ http.ResponseWriter, r *request) (any, error) {
	key := r.URL.Query().Get("key")
	data, err := s.EventLog.Get(r.Context(), key)
	if errors.Is(err, recording.ErrNotFound) {
		return nil, notFound("the event log has no object %q", key)
	}
	if err != nil {
		return nil, err
	}
	return ObjectData{base64.StdEncoding.EncodeToString(data)}, nil
}

// meshCosign vouches for this node's own events. Any member may ask: whoever it
// is learns the root of a log that it has itself.
func (s *Server) meshCosign(w http.ResponseWriter, r *http.Request) {
	var in eventlog.Request
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, smallBody)).Decode(&in)
	if err != nil {
		fail(w, problem(invalid("the body is no request to cosign: %v", err)))
		return
	}
	rep, err := s.EventLog.Cosign(r.Context(), &in)
	if err != nil {
		fail(w, &Problem{Code: "unavailable", Error: err.Error(), Status: http.StatusServiceUnavailable})
		return
	}
	reply(w, rep)
}

// Cosign asks another node for its cosignature.
func (s *Server) Cosign(ctx context.Context, node string, in *eventlog.Request) (*eventlog.Reply, error) {
	out := &eventlog.Reply{}
	return out, s.exchange(ctx, http.MethodPost, node, "/mesh/v1/cosign", in, out)
}

// settleTimeout is how long a removal waits for the change of members before it
// to be cosigned.
const settleTimeout = 10 * time.Second

// awaitSettled waits until the newest checkpoint knows the voters as they are
// now: see tlog.Members.CheckNote. It does not hold a removal up for ever, since
// what keeps the voters from cosigning may be the node that is to go.
func (s *Server) awaitSettled(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.EventLog.Settled()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.Log.Warn("a node is removed before the last change of members was cosigned; auditors may need a checkpoint known from elsewhere (events verify --from)", "err", err)
			return
		}
	}
}

// Log is the event log as this cluster has it now, for eventlog.Verify.
func (c *Client) Log() eventlog.Source {
	return clientStore{c: c, list: "/v1/log", object: "/v1/log/object", name: "the cluster's event log, through the API"}
}

// clientStore reads objects through the API.
type clientStore struct {
	c                  *Client
	list, object, name string
}

func (s clientStore) String() string { return s.name }

func (s clientStore) Put(context.Context, string, []byte) error {
	return errors.New("the API does not write objects")
}

func (s clientStore) Get(ctx context.Context, key string) ([]byte, error) {
	d, err := call[ObjectData](ctx, s.c, http.MethodGet, s.object+"?key="+url.QueryEscape(key), nil)
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
		part, err := call[Objects](ctx, s.c, http.MethodGet, s.list+"?"+q.Encode(), nil)
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

// listPart is one answer of a listing.
func listPart(ctx context.Context, list func(ctx context.Context, prefix, after string, fn func(recording.Object) error) error, prefix, after string) (Objects, error) {
	out := Objects{Objects: []recording.Object{}}
	err := list(ctx, prefix, after, func(o recording.Object) error {
		if len(out.Objects) == maxListed {
			out.More = true
			return recording.ErrStop
		}
		out.Objects = append(out.Objects, o)
		return nil
	})
	return out, err
}

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"time"

	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/spool"
)

// Live is the part of a node's recorder that shows what is being recorded.
type Live interface {
	Tail(ctx context.Context, session string, c spool.Cursor, max, maxBytes int) (*spool.Part, error)
}

// Watched is a part of a live session's recording: entries as they are
// recorded, masked where they are.
type Watched struct {
	Node    string            `json:"node"` // that has the session
	Entries []recording.Entry `json:"entries"`
	Segment uint64            `json:"segment"` // these two say where to go on
	After   uint64            `json:"after"`
	Ending  *recording.Ending `json:"ending,omitempty"` // it is over, and these are the last entries
	Name    string            `json:"name"`             // YYYY/MM/DD/session, to read it from the store
}

const (
	watchEntries = 500
	watchBytes   = 1 << 20
	// watchPoll is how often the recorder is looked at, and watchGather how long
	// entries are gathered for one answer: each is a call that is audited.
	watchPoll   = 100 * time.Millisecond
	watchGather = 400 * time.Millisecond
	// maxWatchers bounds the calls that wait at a node.
	maxWatchers = 200
	maxWatch    = 30 * time.Second
)

// watch answers with the entries of a live session after a place, holding the
// answer for `wait` until there are any. The node that has the session answers;
// others hand the call on with the caller's own credential, which that node
// judges itself. As each answer is a call of its own, whoever may no longer
// watch sees no more than one further answer.
func (s *Server) watch(w http.ResponseWriter, r *request) (any, error) {
	session := r.PathValue("id")
	if err := recording.CheckSession(session); err != nil {
		return nil, invalid("session: %v", err)
	}
	q := r.URL.Query()
	number := func(name string) (uint64, error) {
		if q.Get(name) == "" {
			return 0, nil
		}
		n, err := strconv.ParseUint(q.Get(name), 10, 64)
		if err != nil {
			return 0, invalid("%s: want a number", name)
		}
		return n, nil
	}
	segment, err := number("segment")
	if err != nil {
		return nil, err
	}
	after, err := number("after")
	if err != nil {
		return nil, err
	}
	part, err := s.tail(r.Context(), session, spool.Cursor{Segment: segment, LSN: recording.LSN(after)}, q.Get("wait"))
	if errors.Is(err, spool.ErrNotLive) {
		if tunnel.Peer(r.Context()) != "" {
			return nil, notFound("session %s is not live on node %s", session, s.Node)
		}
		return nil, s.watchElsewhere(w, r, session, q.Get("node"))
	}
	if err != nil {
		return nil, err
	}
	v := &Watched{Node: s.Node, Entries: part.Entries, Segment: part.Next.Segment, After: uint64(part.Next.LSN), Ending: part.Ending, Name: part.Name}
	if v.Entries == nil {
		v.Entries = []recording.Entry{}
	}
	return v, nil
}

// tail waits for entries of a session that this node records.
func (s *Server) tail(ctx context.Context, session string, c spool.Cursor, wait string) (*spool.Part, error) {
	patience, _ := time.ParseDuration(wait)
	part, err := s.Live.Tail(ctx, session, c, watchEntries, watchBytes)
	if err != nil || part.More || part.Ending != nil || patience <= 0 {
		return part, err
	}
	select {
	case s.watchers <- struct{}{}:
		defer func() { <-s.watchers }()
	default:
		return nil, &Failure{&Problem{Code: "unavailable", Error: fmt.Sprintf("%d calls watch sessions of this node already", maxWatchers), Status: http.StatusServiceUnavailable}}
	}
	ctx, cancel := context.WithTimeout(ctx, min(patience, maxWatch))
	defer cancel()
	tick := time.NewTicker(watchPoll)
	defer tick.Stop()
	var since time.Time // when the first entry was seen
	for {
		if len(part.Entries) > 0 && since.IsZero() {
			since = time.Now()
		}
		if part.More || part.Ending != nil || !since.IsZero() && time.Since(since) >= watchGather {
			return part, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return part, nil
		}
		next, err := s.Live.Tail(ctx, session, c, watchEntries, watchBytes)
		if errors.Is(err, spool.ErrNotLive) || ctx.Err() != nil {
			return part, nil // it went to the store, or the time is over
		}
		if err != nil {
			return nil, err
		}
		part = next
	}
}

// watchElsewhere hands the call on to the node that has the session: the one
// the caller has been told, or the one that lists it.
func (s *Server) watchElsewhere(w http.ResponseWriter, r *request, session, node string) error {
	if _, member := s.State.View().Nodes[node]; !member || node == s.Node {
		node = ""
		unreachable := ""
		everyNode(r.Context(), s, "/mesh/v1/sessions", s.localSessions, func(n string, v Sessions, err error) {
			if err != nil {
				unreachable = n
			}
			for _, i := range v.Sessions {
				if i.ID == session && n != s.Node {
					node = n
				}
			}
		})
		if node == "" {
			hint := ""
			if unreachable != "" {
				hint = fmt.Sprintf(" (node %s did not answer)", unreachable)
			}
			return notFound("no node has a live session %s%s; a session that has ended is in the recordings", session, hint)
		}
	}
	var failed error
	rp := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.Out.URL.Scheme, p.Out.URL.Host, p.Out.Host = "http", node, node
			p.Out.Header.Set("Sallyport-Client", clientIP(r.Request))
		},
		Transport: s.Mesh.Transport(),
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, err error) {
			failed = &Failure{&Problem{Code: "unavailable", Error: fmt.Sprintf("node %s, which has the session, cannot be reached: %v", node, err), Status: http.StatusServiceUnavailable}}
		},
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
	}
	rp.ServeHTTP(w, r.Request)
	return failed
}

// Watch returns what a live session's recording has after what v tells (nil:
// from its beginning), waiting up to wait for the first entry.
func (c *Client) Watch(ctx context.Context, session string, v *Watched, wait time.Duration) (*Watched, error) {
	q := url.Values{"wait": {wait.String()}}
	if v != nil {
		q.Set("node", v.Node)
		q.Set("segment", strconv.FormatUint(v.Segment, 10))
		q.Set("after", strconv.FormatUint(v.After, 10))
	}
	return call[Watched](ctx, c, http.MethodGet, "/v1/sessions/"+url.PathEscape(session)+"/watch?"+q.Encode(), nil)
}

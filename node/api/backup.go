package api

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"
)

// backupRequest asks for a backup encrypted to an age recipient (X25519).
type backupRequest struct {
	Recipient string `json:"recipient"`
}

// backupStall is how long one write of a backup may wait for its reader.
const backupStall = time.Minute

// backup streams a backup. What goes wrong after its beginning ends the stream
// early, which the reader notices: an age file has an end.
func (s *Server) backup(w http.ResponseWriter, r *request) (any, error) {
	var in backupRequest
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	out := &slowWriter{w: w, c: http.NewResponseController(w)}
	w.Header().Set("Content-Type", "application/octet-stream")
	err := s.Backup(r.Context(), in.Recipient, out)
	if err != nil && !out.begun {
		w.Header().Del("Content-Type")
		return nil, invalid("%v", err)
	}
	if err != nil {
		s.Log.Error("a backup was not completed", "err", err)
		panic(http.ErrAbortHandler)
	}
	return nil, nil
}

// slowWriter gives each write a deadline instead of one to all of them.
type slowWriter struct {
	w     http.ResponseWriter
	c     *http.ResponseController
	begun bool // an error can no longer be told
}

func (s *slowWriter) Write(b []byte) (int, error) {
	if err := s.c.SetWriteDeadline(time.Now().Add(backupStall)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return 0, err
	}
	s.begun = true
	return s.w.Write(b)
}

// Backup writes a backup, encrypted to recipient, to w. An error leaves a part of
// it there.
func (c *Client) Backup(ctx context.Context, recipient string, w io.Writer) error {
	h := *c.http
	h.Timeout = 0 // as long as bytes come
	slow := &Client{servers: c.servers, http: &h, token: c.token, cert: c.cert, key: c.key}
	return slow.Call(ctx, http.MethodPost, "/v1/cluster/backup", backupRequest{recipient}, stream{w})
}

// stream as Call's out takes the body as it comes.
type stream struct{ io.Writer }

// Package tunnel is how nodes talk to each other: plain HTTP/1.1 exchanged
// over QUIC streams with mutual TLS, on the mesh class of the node's one UDP
// socket. The peer's name comes from its certificate.
package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/sallyport/sallyport/raftstore/transport"
)

// Mesh reaches every node of the cluster by its name.
type Mesh struct {
	endpoint *transport.Endpoint
	http     *http.Transport
	log      *slog.Logger
}

// New returns a Mesh; resolve gives a member's address by its name.
func New(e *transport.Endpoint, resolve func(node string) (addr string, ok bool), log *slog.Logger) *Mesh {
	m := &Mesh{endpoint: e, log: log}
	m.http = &http.Transport{
		DialContext: func(ctx context.Context, _, hostport string) (net.Conn, error) {
			name, _, err := net.SplitHostPort(hostport)
			if err != nil {
				return nil, err
			}
			addr, ok := resolve(name)
			if !ok {
				return nil, fmt.Errorf("node %q is not a member of the cluster", name)
			}
			return e.Dial(ctx, transport.ClassMesh, addr, name)
		},
		MaxIdleConnsPerHost:    4,
		IdleConnTimeout:        30 * time.Second,
		ResponseHeaderTimeout:  2 * time.Minute, // a fence waits for sessions to end
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true,
	}
	return m
}

// Transport sends requests to http://NODE/….
func (m *Mesh) Transport() http.RoundTripper { return m.http }

// CloseIdle has the next request to each node open a stream of its own: one kept
// from earlier is on a connection of an earlier certificate.
func (m *Mesh) CloseIdle() { m.http.CloseIdleConnections() }

type (
	peerKey struct{}
	certKey struct{}
)

// Peer returns the node that sent the request, from its certificate; "" when
// the request did not come over the mesh.
func Peer(ctx context.Context) string {
	name, _ := ctx.Value(peerKey{}).(string)
	return name
}

// PeerCertificate is the certificate of the node that sent the request; nil when
// the request did not come over the mesh.
func PeerCertificate(ctx context.Context) *x509.Certificate {
	c, _ := ctx.Value(certKey{}).(*x509.Certificate)
	return c
}

// Serve answers other nodes until ctx ends; it returns when running requests
// have ended or two seconds have passed.
func (m *Mesh) Serve(ctx context.Context, h http.Handler) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if tc, ok := c.(*transport.Conn); ok {
				ctx = context.WithValue(ctx, certKey{}, tc.PeerCertificate())
				return context.WithValue(ctx, peerKey{}, tc.Peer())
			}
			return ctx
		},
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		sctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(sctx) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(m.endpoint.Listener(transport.ClassMesh))
	if !stop() {
		<-stopped
	}
	m.http.CloseIdleConnections()
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}

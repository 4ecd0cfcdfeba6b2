package api

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
)

// RotateReply is a node's new certificate.
type RotateReply struct {
	Node        string    `json:"node"`
	Fingerprint string    `json:"fingerprint"` // SHA-256, hex
	Expires     time.Time `json:"expires"`
}

type renewRequest struct {
	CSR []byte `json:"csr"` // DER; only its public key is used
}

// Rotate has a node make a new key and get a certificate for it.
func (c *Client) Rotate(ctx context.Context, node string) (*RotateReply, error) {
	return call[RotateReply](ctx, c, http.MethodPost, "/v1/cluster/nodes/"+url.PathEscape(node)+"/rotate", struct{}{})
}

// rotate has the node named renew its certificate now.
func (s *Server) rotate(_ http.ResponseWriter, r *request) (any, error) {
	name := r.PathValue("name")
	if _, member := s.State.View().Nodes[name]; !member {
		return nil, notFound("no node is named %q; `sallyport status` lists them", name)
	}
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	if name == s.Node {
		return s.Deps.Rotate(ctx)
	}
	var rep RotateReply
	err := s.exchange(ctx, http.MethodPost, name, "/mesh/v1/rotate", struct{}{}, &rep)
	return rep, err
}

// meshRotate renews this node's certificate: the leader was told to have it done.
func (s *Server) meshRotate(w http.ResponseWriter, r *http.Request) {
	if leader, _ := s.Store.Leader(); leader != tunnel.Peer(r.Context()) {
		fail(w, &Problem{Code: "forbidden", Error: "only the leader tells a node to renew its certificate", Status: http.StatusForbidden})
		return
	}
	rep, err := s.Deps.Rotate(r.Context())
	if err != nil {
		fail(w, problem(err))
		return
	}
	reply(w, rep)
}

// Renew asks the leader for a certificate of this node for the key that signed
// csr. It comes as an event.
func (s *Server) Renew(ctx context.Context, csr []byte) error {
	return s.renewal(ctx, "/mesh/v1/renew", func(ctx context.Context) error {
		return s.renewFor(ctx, s.Node, s.State.View().Nodes[s.Node].Cert, csr)
	}, renewRequest{csr})
}

// Renewed tells the leader that this node uses its new certificate.
func (s *Server) Renewed(ctx context.Context) error {
	return s.renewal(ctx, "/mesh/v1/renewed", func(ctx context.Context) error {
		return s.retireFor(ctx, s.Node, s.State.View().Nodes[s.Node].Cert)
	}, struct{}{})
}

func (s *Server) renewal(ctx context.Context, path string, here func(context.Context) error, in any) error {
	switch leader, _ := s.Store.Leader(); leader {
	case "":
		return raftstore.ErrNoLeader
	case s.Node:
		return here(ctx)
	default:
		return s.exchange(ctx, http.MethodPost, leader, path, in, nil)
	}
}

// meshRenew issues a certificate for the node at the other end of the connection,
// and for no other: what proves that it may is the key that opened the
// connection.
func (s *Server) meshRenew(w http.ResponseWriter, r *http.Request) {
	var in renewRequest
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, smallBody)).Decode(&in)
	if err != nil {
		err = invalid("%v", err)
	} else {
		err = s.renewFor(r.Context(), tunnel.Peer(r.Context()), certOf(r.Context()), in.CSR)
	}
	if err != nil {
		fail(w, problem(err))
		return
	}
	reply(w, struct{}{})
}

func (s *Server) meshRenewed(w http.ResponseWriter, r *http.Request) {
	if err := s.retireFor(r.Context(), tunnel.Peer(r.Context()), certOf(r.Context())); err != nil {
		fail(w, problem(err))
		return
	}
	reply(w, struct{}{})
}

func certOf(ctx context.Context) []byte {
	if c := tunnel.PeerCertificate(ctx); c != nil {
		return c.Raw
	}
	return nil
}

func forbidden(format string, args ...any) error {
	return &Failure{&Problem{Code: "forbidden", Error: fmt.Sprintf(format, args...), Status: http.StatusForbidden}}
}

// renewFor is what the leader does about a renewal of node, which presented cert.
func (s *Server) renewFor(ctx context.Context, node string, cert, csr []byte) error {
	v := s.State.View()
	info, member := v.Nodes[node]
	switch {
	case !member:
		return forbidden("not a member of this cluster")
	case !bytes.Equal(info.Cert, cert):
		// One that was renewed already: whoever has that key only is not the node.
		return forbidden("node %s has another certificate by now", node)
	case v.Superseded[node] != nil:
		return invalid("the renewal before is not done: take up the certificate that was issued")
	}
	before, err := x509.ParseCertificate(info.Cert)
	if err != nil {
		return err
	}
	if age := s.Now().Sub(pki.Issued(before)); age < s.MinRenewal {
		return &Failure{&Problem{Code: "conflict", Error: fmt.Sprintf("node %s had a new certificate %v ago: wait until %v have passed", node, age.Round(time.Second), s.MinRenewal), Status: http.StatusTooManyRequests}}
	}
	version := s.Store.Version("node/" + node)
	if !bytes.Equal(s.State.View().Nodes[node].Cert, cert) {
		return forbidden("node %s has another certificate by now", node)
	}
	der, err := s.SignRenewal(node, csr)
	if err != nil {
		return invalid("%v", err)
	}
	next, err := x509.ParseCertificate(der)
	if err == nil && bytes.Equal(next.RawSubjectPublicKeyInfo, before.RawSubjectPublicKeyInfo) {
		err = invalid("a renewal is for a new key")
	}
	if err != nil {
		return err
	}
	return s.nodeRenewed(ctx, event.NodeRenewed{Name: node, Cert: der}, version)
}

// retireFor ends the use of the certificate before the one that node presented.
func (s *Server) retireFor(ctx context.Context, node string, cert []byte) error {
	version := s.Store.Version("node/" + node)
	v := s.State.View()
	info, member := v.Nodes[node]
	switch {
	case !member:
		return forbidden("not a member of this cluster")
	case !bytes.Equal(info.Cert, cert):
		return forbidden("node %s does not use its new certificate yet", node)
	case v.Superseded[node] == nil:
		return nil
	}
	return s.nodeRenewed(ctx, event.NodeRenewed{Name: node, Cert: info.Cert, Retired: true}, version)
}

func (s *Server) nodeRenewed(ctx context.Context, p event.NodeRenewed, expect uint64) error {
	version, data, err := event.Encode(s.Store.FeatureLevel(), event.TypeNodeRenewed, p)
	if err != nil {
		return err
	}
	_, err = s.append(ctx, nil, event.Proposal{
		ID: event.NewID(), Actor: event.Actor{Principal: p.Name, Kind: event.Node, Authn: "node", CertFP: pki.Fingerprint(p.Cert), Via: s.Node},
		Type: event.TypeNodeRenewed, Version: version, Aggregate: "node/" + p.Name, Expect: expect, Payload: data,
	})
	return err
}

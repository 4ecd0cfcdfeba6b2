package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/recording"
)

// Identity providers tell that somebody's session with them is over. Their
// signature is the credential; the leader verifies it, whichever node the
// signal came to. What it ends are credentials issued before, and the sessions
// they opened: who logs in again is let in again.

// logout is the back-channel logout endpoint (OpenID Connect Back-Channel
// Logout 1.0, sections 2.5 to 2.8).
func (s *Server) logout(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	s.signal(w, r, signalKind{
		read: func(ctx context.Context, body []byte) ([]identity.Signal, error) {
			form, err := url.ParseQuery(string(body))
			if err != nil || len(form["logout_token"]) != 1 {
				return nil, &protocols.AuthError{Code: "malformed-token", Reason: "want one logout_token in a form"}
			}
			return s.LogoutToken(ctx, form.Get("logout_token"))
		},
		done: http.StatusOK,
		refuse: func(_, reason string) any {
			return map[string]string{"error": "invalid_request", "error_description": reason}
		},
	})
}

// securityEvent takes security event tokens that a transmitter pushes (RFC
// 8935; OpenID Shared Signals Framework 1.0).
func (s *Server) securityEvent(w http.ResponseWriter, r *http.Request) {
	s.signal(w, r, signalKind{
		read: func(ctx context.Context, body []byte) ([]identity.Signal, error) {
			return s.SecurityEvent(ctx, string(body))
		},
		done: http.StatusAccepted,
		refuse: func(code, reason string) any {
			errs := map[string]string{"unknown-issuer": "invalid_issuer", "wrong-audience": "invalid_audience", "bad-signature": "invalid_key"} // RFC 8935 section 2.4
			e := errs[code]
			if e == "" {
				e = "invalid_request"
			}
			return map[string]string{"err": e, "description": reason}
		},
	})
}

// signalKind is what the two protocols differ in.
type signalKind struct {
	read   func(ctx context.Context, body []byte) ([]identity.Signal, error)
	done   int                           // status of an answer without an error
	refuse func(code, reason string) any // body of an answer with status 400
}

func (s *Server) signal(w http.ResponseWriter, r *http.Request, k signalKind) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, smallBody))
	if err != nil {
		fail(w, problem(invalid("reading the request: %v", err)))
		return
	}
	if !s.Store.IsLeader() {
		if tunnel.Peer(r.Context()) != "" {
			fail(w, &Problem{Code: "unavailable", Error: "this node is not the leader", Status: http.StatusMisdirectedRequest})
			return
		}
		s.toLeader(w, r, body)
		return
	}
	signals, err := k.read(r.Context(), body)
	var auth *protocols.AuthError
	switch {
	case errors.As(err, &auth) && auth.Code == "issuer-unavailable":
		fail(w, &Problem{Code: "unavailable", Error: auth.Reason, Status: http.StatusServiceUnavailable})
		return
	case err != nil:
		code, reason := "", err.Error()
		if auth != nil {
			code, reason = auth.Code, auth.Reason
		}
		s.Log.Warn("a signal of an identity provider was refused", "path", r.URL.Path, "client", clientIP(r), "code", code, "reason", reason)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(k.refuse(code, reason)) // the caller went away: nobody is left to tell
		return
	}
	for _, sig := range signals {
		if err := s.endOn(w, r, sig); err != nil {
			fail(w, problem(err)) // transmitters repeat what was not taken
			return
		}
	}
	w.WriteHeader(k.done)
}

// endOn makes a signal a revocation, once.
func (s *Server) endOn(w http.ResponseWriter, r *http.Request, sig identity.Signal) error {
	scope := event.Scope{Kind: event.ScopeSubject, Value: sig.Provider + "/" + sig.Subject}
	if sig.Claim != "" {
		scope = event.Scope{Kind: event.ScopeClaim, Name: sig.Claim, Value: sig.Value}
	}
	// Unambiguous: none of the three can hold a zero byte.
	sum := sha256.Sum256([]byte("signal\x00" + sig.Provider + "\x00" + sig.Issuer + "\x00" + sig.ID))
	id := hex.EncodeToString(sum[:5])
	effect, rule := "permit", "revocation/"+id
	if sig.Subject == "" && sig.Claim == "" {
		effect, rule = "ignore", sig.Event // a kind of event that asks for nothing here
	}
	err := s.Audit(&recording.Entry{
		Type: recording.Decided, Verb: r.Method + " " + r.URL.Path, Effect: effect, Rule: rule, Reason: sig.Reason,
		Detail: map[string]string{"client": clientIP(r), "provider": sig.Provider, "event": sig.Event, "id": sig.ID, "scope": scope.String()},
	})
	if err != nil {
		return fmt.Errorf("this node cannot record now, and nothing happens unrecorded: %w", err)
	}
	if effect == "ignore" || s.State.View().Revocations.Get(id) != nil {
		return nil
	}
	reason := fmt.Sprintf("identity provider %s: session revoked", sig.Provider)
	if sig.Event == identity.EventLogout {
		reason = fmt.Sprintf("identity provider %s: logged out", sig.Provider)
	}
	if sig.Reason != "" {
		reason += ": " + sig.Reason
	}
	p := event.NewRevoked(id, scope, reason)
	p.Until = sig.At.UTC()
	version, data, err := event.Encode(s.Store.FeatureLevel(), event.TypeRevoked, p)
	if err != nil {
		return err
	}
	_, err = s.append(r.Context(), w, event.Proposal{
		ID: event.ID(sum[:16]), Type: event.TypeRevoked, Version: version, Aggregate: "revocation/" + id, Expect: 0, Payload: data,
		Actor: event.Actor{Principal: sig.Provider + "/" + sig.Issuer, Kind: event.Service, Authn: "signal", Source: clientIP(r), Via: s.Node},
	})
	var conflict *raftstore.ConflictError
	if errors.As(err, &conflict) {
		return nil // it came twice at once
	}
	return err
}

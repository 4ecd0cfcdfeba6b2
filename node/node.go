// Package node puts a Sallyport node together and owns every goroutine that
// outlives a connection: what is started, and in which order it stops, is one
// list in Run.
package node

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/approval"
	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/eventlog"
	"github.com/sallyport/sallyport/node/gossip"
	"github.com/sallyport/sallyport/node/identity"
	"github.com/sallyport/sallyport/node/listener"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/session"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/tunnel"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/policy"
	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/postgres"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
	"github.com/sallyport/sallyport/raftstore/fence"
	"github.com/sallyport/sallyport/raftstore/fence/gate"
	"github.com/sallyport/sallyport/raftstore/transport"
	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/index"
	"github.com/sallyport/sallyport/recording/replay"
	"github.com/sallyport/sallyport/recording/spool"
	"github.com/sallyport/sallyport/recording/upload"
)

// DrainTimeout is how long sessions may go on after the node was told to stop.
const DrainTimeout = 20 * time.Second

// Node is one node of a cluster.
type Node struct {
	cfg     *config.Config
	version string
	log     *slog.Logger
	started time.Time
	serving atomic.Bool // lets clients in

	self atomic.Pointer[credentials]
	// renewing is held by a renewal from its key to its end, adopting while a new
	// key is taken up.
	renewing, adopting sync.Mutex
	role               string // of the certificate: pki.Voter, pki.Gateway or pki.Connector
	ca                 *x509.Certificate
	cluster            string
	ident              *vault.NodeIdentity
	first              *firstEvent
	seeds              []event.NodeInfo

	store      *raftstore.Store
	endpoint   *transport.Endpoint
	state      *state.Projection
	vault      atomic.Pointer[vault.Vault]
	verifier   *identity.Verifier
	sessions   *session.Registry
	approvals  *approval.Service
	mesh       *tunnel.Mesh
	api        *api.Server
	spool      *spool.Spool
	recordings recording.Store
	eventLog   *eventlog.Service
	gossip     *gossip.Gossip // for the status, and nothing else
	audit      *audit
	targets    *targets
	fences     *fences
	leases     *leases
	gate       *gate.Gate   // nil without one
	tolerance  atomic.Int64 // the most that the rules in force tolerate; a policy.Tolerance
	letIn      letIn
	postgres   *postgres.Protocol
	env        *protocols.Env
	tokens     tokenKeep
	features   features
	members    *membership

	nonces identity.Nonces // refuse signed requests that come to this node's door again

	// background are short tasks that outlive their session: handing over and
	// dropping a session's account. Run waits for them.
	background sync.WaitGroup
	fatal      chan error
}

// New reads the node's keys; it starts nothing.
func New(cfg *config.Config, version string, log *slog.Logger) (*Node, error) {
	n := &Node{cfg: cfg, version: version, log: log, fatal: make(chan error, 1)}
	file := func(name string) string { return filepath.Join(cfg.DataDir, name) }
	var err error
	if n.ca, err = pki.LoadCert(file(caFile)); err != nil {
		return nil, err
	}
	self, err := loadCredentials(cfg.DataDir, n.ca)
	if err != nil {
		return nil, err
	}
	n.self.Store(self)
	id, err := pki.ParseIdentity(self.cert)
	if err != nil {
		return nil, err
	}
	if _, err := pki.VerifyPeer(self.cert, pki.Pool(n.ca.Raw), id.Cluster, pki.NodeRoles...); err != nil {
		return nil, fmt.Errorf("this node's certificate is not good: %w; one that expired while the node was down cannot be renewed: remove the node and join anew under another name", err)
	}
	if id.Name != cfg.Name {
		return nil, fmt.Errorf("%s names the node %q, its certificate %q", config.FileName, cfg.Name, id.Name)
	}
	n.cluster, n.role = id.Cluster, id.Role
	if n.ident, err = vault.LoadNodeIdentity(file(identityFile)); err != nil {
		return nil, err
	}
	n.first = &firstEvent{}
	if ok, err := loadJSON(file(bootstrapFile), n.first); err != nil {
		return nil, fmt.Errorf("%s: %w", bootstrapFile, err)
	} else if !ok {
		n.first = nil
	}
	if _, err := loadJSON(file(peersFile), &n.seeds); err != nil {
		return nil, fmt.Errorf("%s: %w", peersFile, err)
	}
	return n, nil
}

// Run runs the node until ctx ends or something fails that it cannot go on
// without; everything it started has ended when it returns.
func (n *Node) Run(ctx context.Context) (err error) {
	n.started = time.Now()
	var stops []func() // undone last to first
	defer func() {
		for i := len(stops) - 1; i >= 0; i-- {
			stops[i]()
		}
	}()
	onStop := func(f func()) { stops = append(stops, f) }

	if err := fence.CheckClock(); err != nil {
		if !n.cfg.AllowUnstableClock {
			return fmt.Errorf("%w; allowUnstableClock in node.yaml starts all the same", err)
		}
		n.log.Warn("revocations may be reported as complete too early", "err", err)
	}

	// The network: one port number, TCP and UDP.
	ln, err := net.Listen("tcp", n.cfg.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	onStop(func() { ln.Close() })
	udpAddr, err := net.ResolveUDPAddr("udp", n.cfg.Listen)
	if err != nil {
		return err
	}
	udp, err := net.ListenUDP("udp", udpAddr)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	n.state = state.New(n.log)
	n.endpoint, err = transport.Listen(transport.EndpointConfig{
		UDPConn:     udp,
		Certificate: func() (*tls.Certificate, error) { return n.self.Load().tls, nil },
		Roots:       func() *x509.CertPool { return pki.Pool(n.ca.Raw) },
		Authorize:   n.authorizePeer,
		Classes:     transport.Classes,
		ResetKey:    n.resetKey(),
		Log:         n.log,
	})
	if err != nil {
		udp.Close()
		return err
	}
	onStop(func() { n.endpoint.Close() })

	// The event store.
	n.store, err = raftstore.Open(raftstore.Config{
		Dir: filepath.Join(n.cfg.DataDir, raftDirName), NodeID: n.cfg.Name, Addr: n.cfg.Addr, Endpoint: n.endpoint,
		HeartbeatTimeout: n.cfg.HeartbeatTimeout, Log: n.log, OnFatal: n.fail,
		// Whoever joins subscribes first; members.run gives votes.
		Subscribe: n.first == nil, Sources: n.sources,
		HeldBack: n.features.list,
		WALDir:   n.cfg.WALDir, WALFailoverDir: n.cfg.WALFailoverDir,
	})
	if err != nil {
		return err
	}
	onStop(func() {
		if err := n.store.Close(); err != nil {
			n.log.Error("closing the event store", "err", err)
		}
	})

	// Recordings. They come before anything that could forward a byte.
	dest, err := upload.Open(ctx, n.cfg.Recordings)
	if err != nil {
		return fmt.Errorf("the store of recordings: %w", err)
	}
	n.recordings = dest
	cctx, cancelCheck := context.WithTimeout(ctx, 5*time.Second)
	err = upload.CheckWriteOnce(cctx, dest)
	cancelCheck()
	switch {
	case errors.Is(err, upload.ErrOverwrites):
		return err
	case err != nil: // it may come back; until then the spool takes what it can
		n.log.Warn("the store of recordings cannot be used now; recordings wait in the spool", "err", err)
	}
	appender := index.NewAppender(dest, replay.Trust{Roots: pki.Pool(n.ca.Raw), CheckNode: pki.CheckNode}, n.log)
	n.spool, err = spool.Open(spool.Options{
		Dir: filepath.Join(n.cfg.DataDir, "spool"), Node: n.cfg.Name, Cluster: n.cluster,
		Signer: n.self.Load().key, Certificate: n.self.Load().cert.Raw, Store: dest,
		SegmentAge: n.cfg.SegmentAge, MaxSpoolBytes: n.cfg.SpoolBytes, Stored: appender.Stored, Log: n.log,
	})
	if err != nil {
		return err
	}
	spoolCtx, stopSpool := context.WithCancel(context.WithoutCancel(ctx))
	spoolDone := make(chan struct{})
	go func() {
		defer close(spoolDone)
		if err := n.spool.Run(spoolCtx); err != nil && spoolCtx.Err() == nil {
			n.fail(fmt.Errorf("recordings: %w", err))
		}
	}()
	onStop(func() {
		dctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := n.spool.Drain(dctx); err != nil {
			n.log.Warn("recordings wait in the spool for the next start", "err", err)
		}
		if err := n.spool.Close(); err != nil {
			n.log.Error("closing the spool", "err", err)
		}
		stopSpool()
		<-spoolDone
	})
	if n.audit, err = openAudit(n.spool, n.cfg.Name, n.version, n.log); err != nil {
		return err
	}
	onStop(n.audit.close)

	// What acts on the state.
	n.sessions = session.NewRegistry(n.cfg.MaxConnections)
	n.verifier, err = identity.NewVerifier(nil, identity.Options{Dev: n.cfg.Dev, Log: n.log})
	if err != nil {
		return err
	}
	n.targets = newTargets(n)
	onStop(n.targets.close)
	cutting, stopCutting := context.WithCancel(context.WithoutCancel(ctx))
	onStop(stopCutting)
	n.fences = newFences(cutting, n.state, n.sessions, n.log)
	if err := n.openGate(); err != nil {
		return err
	}
	onStop(func() {
		if n.gate == nil {
			return
		}
		if err := n.gate.Close(); err != nil {
			n.log.Error("removing the kernel gate", "err", err)
		}
	})
	n.leases = n.newLeases(n.fences)
	n.mesh = tunnel.New(n.endpoint, n.resolve, n.log)
	n.members = newMembership(n)
	n.approvals = approval.New(approval.Env{
		Node: n.cfg.Name, State: n.state, Propose: n.propose, Seal: n.sealHere, VerifyVote: n.verifyVote,
		Decide: n.decide, Now: time.Now, Log: n.log,
	})
	if n.eventLog, err = n.openEventLog(dest); err != nil {
		return err
	}
	n.gossip = n.newGossip()
	n.env = n.newEnv()
	n.postgres = n.newPostgres()
	n.api = api.NewServer(n.apiDeps())
	n.state.OnChange(n.onChange)

	g, gctx := errgroup.WithContext(context.WithoutCancel(ctx))
	gctx, stopAll := context.WithCancel(gctx)
	onStop(func() {
		stopAll()
		if gerr := g.Wait(); gerr != nil && err == nil {
			err = gerr
		}
		stopCutting()
		n.fences.ending.Wait()
		n.background.Wait()
	})
	run := func(what string, f func(context.Context) error) {
		g.Go(func() error {
			if err := f(gctx); err != nil && gctx.Err() == nil {
				n.fail(fmt.Errorf("%s: %w", what, err))
				return err
			}
			return nil
		})
	}
	run("event store", func(ctx context.Context) error { return n.store.Follow(ctx, 1, n.state.Fold) })
	run("event log", n.eventLog.Run)
	run("gossip", n.gossip.Run)
	run("mesh", func(ctx context.Context) error { return n.mesh.Serve(ctx, n.api.MeshHandler()) })
	run("leases", n.leases.run)
	run("bootstrap", n.bootstrap)
	run("sweeper", n.targets.sweep)
	run("sessions", func(ctx context.Context) error { return n.sessions.Run(ctx, n.leases.holder.Changed) })
	run("revocations", n.api.CompleteRevocations)
	run("members", n.reconcileMembers)
	run("voters", n.members.run)
	run("feature level", n.raiseLevel)
	run("secrets", n.keepSealed)
	run("certificate", n.keepCertificate)
	run("marks", n.storeMarks)
	run("index of recordings", appender.Run)

	// Clients, once what was known when the node stopped is known again.
	if err := n.catchUp(ctx); ctx.Err() != nil {
		n.log.Info("stopping: this node had not begun to serve")
		return nil
	} else if err != nil {
		return err
	}
	httpConns := listener.NewConnListener(ln.Addr())
	run("API", func(ctx context.Context) error { return n.serveHTTP(ctx, httpConns) })
	lctx, stopListening := context.WithCancel(gctx)
	onStop(stopListening)
	ls := listener.New(listener.Options{
		TLS:            n.serverTLS(),
		Postgres:       n.servePostgres(gctx),
		HTTP:           httpConns,
		MaxConnections: n.cfg.MaxConnections, MaxUnauthenticated: n.cfg.MaxUnauthenticated, MaxUnauthenticatedPerIP: n.cfg.MaxUnauthenticatedPerIP,
		Log: n.log,
	})
	run("listener", func(context.Context) error { return ls.Run(lctx, gated{ln}) })
	n.serving.Store(true)
	n.log.Info("node is up", "addr", n.cfg.Addr, "cluster", n.cluster, "recordings", dest.String(), "dev", n.cfg.Dev)

	select {
	case <-ctx.Done():
		n.log.Info("stopping: no new sessions, waiting for those there are", "at_most", DrainTimeout)
	case err = <-n.fatal:
		n.log.Error("stopping: this node cannot go on", "err", err)
	}
	n.serving.Store(false)
	stopListening()
	dctx, cancel := context.WithTimeout(context.Background(), DrainTimeout)
	if err != nil {
		n.leases.stop(false)
		cancel() // what is wrong might be what protects the sessions: cut now
	}
	n.sessions.Drain(dctx, &protocols.Refusal{Rule: "shutdown", Reason: "this node is shutting down: connect to another node", Code: "57P01"})
	cancel()
	n.leases.stop(len(n.sessions.List()) == 0)
	return err
}

// resetKey lets peers notice at once that this node was restarted. It is the
// same after a restart, and secret.
func (n *Node) resetKey() *[32]byte {
	der, err := x509.MarshalPKCS8PrivateKey(n.self.Load().key)
	if err != nil {
		return nil // peers notice after their idle timeout instead
	}
	key := sha256.Sum256(append([]byte("sallyport QUIC reset\x00"), der...))
	return &key
}

// fail stops the node.
func (n *Node) fail(err error) {
	select {
	case n.fatal <- err:
	default:
	}
}

func mustCert(der []byte) *x509.Certificate {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return &x509.Certificate{} // equal to none
	}
	return c
}

// resolve finds a member's address; before there is any state, among those
// known when the node joined.
func (n *Node) resolve(name string) (string, bool) {
	if info, ok := n.state.View().Nodes[name]; ok {
		return info.Addr, true
	}
	if n.state.View().Seq == 0 {
		for _, s := range n.seeds {
			if s.Name == name {
				return s.Addr, true
			}
		}
	}
	return "", false
}

// bootstrap brings the first event of a new cluster into the log.
func (n *Node) bootstrap(ctx context.Context) error {
	if n.first == nil {
		return nil
	}
	if n.first.Restored != nil {
		return n.appendRestored(ctx)
	}
	if err := n.store.Bootstrap(); err != nil && !errors.Is(err, raftstore.ErrNotFresh) {
		return err
	}
	payload, err := json.Marshal(n.first.Created)
	if err != nil {
		return err
	}
	for {
		// It may be there since before a crash, and another node lead now.
		// Ids are forgotten after a day; the cluster's own is not.
		if _, there, err := n.store.ByID(n.first.ID); err == nil && there || n.state.View().ClusterID == n.first.Created.ID {
			return os.Remove(filepath.Join(n.cfg.DataDir, bootstrapFile))
		}
		_, err := n.store.Append(ctx, append([]event.Proposal{{
			ID: n.first.ID, Type: event.TypeClusterCreated, Version: 1, Aggregate: "cluster", Expect: 0, Payload: payload, Actor: n.actor(),
		}}, n.firstLevel()...)...)
		if err == nil {
			continue
		}
		var conflict *raftstore.ConflictError
		if v := n.state.View(); errors.As(err, &conflict) && v.Seq > 0 && v.ClusterID != n.first.Created.ID {
			return fmt.Errorf("the log holds another cluster: %w", err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

// appendRestored brings the first event of a cluster that was made from a backup
// into the log.
func (n *Node) appendRestored(ctx context.Context) error {
	version, payload, err := event.Encode(n.store.FeatureLevel(), event.TypeClusterRestored, n.first.Restored)
	if err != nil {
		return err
	}
	for {
		if n.state.View().Nodes[n.cfg.Name].Name != "" { // appended, perhaps before a crash
			return os.Remove(filepath.Join(n.cfg.DataDir, bootstrapFile))
		}
		if n.store.IsLeader() {
			actx, cancel := context.WithTimeout(ctx, 10*time.Second)
			if _, err := n.store.Append(actx, event.Proposal{
				ID: n.first.ID, Type: event.TypeClusterRestored, Version: version, Aggregate: "cluster", Expect: event.Any, Payload: payload, Actor: n.actor(),
			}); err != nil {
				n.log.Warn("the restored cluster has not begun yet", "err", err)
			}
			cancel()
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

// catchUp waits until this node has folded what the cluster had agreed on when
// it started. A node that was away does not know what was revoked meanwhile:
// before it does, and while there is no majority to ask, it serves nobody.
func (n *Node) catchUp(ctx context.Context) error {
	warn := time.NewTicker(10 * time.Second)
	defer warn.Stop()
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	head, known := uint64(0), false
	for {
		changed := n.state.Changed()
		if v := n.state.View(); v.Nodes[n.cfg.Name].Name != "" && v.Seq > 0 {
			if !known {
				if h, err := n.api.ClusterHead(ctx); err == nil {
					head, known = h, true
				} else {
					n.log.Debug("asking the leader for its newest event", "err", err)
				}
			}
			if known && v.Seq >= head {
				return nil
			}
		}
		select {
		case <-changed:
		case <-retry.C:
		case err := <-n.fatal:
			return err
		case <-warn.C:
			n.log.Warn("waiting for the cluster before serving anybody: is a majority of its nodes running, and is UDP open between them?")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// reconcileMembers completes, at the leader, removals that were interrupted
// between Raft's configuration and the event.
func (n *Node) reconcileMembers(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if !n.store.IsLeader() {
			continue
		}
		members, err := n.store.Members()
		if err != nil {
			continue
		}
		for _, m := range members {
			if n.state.View().Removed[m.ID] {
				rctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				if err := n.store.Remove(rctx, m.ID); err != nil {
					n.log.Warn("a removed node is still counted by Raft", "member", m.ID, "err", err)
				}
				cancel()
			}
		}
	}
}

// onChange acts on new events. It runs on the goroutine that folds them, and
// must not wait for anything.
func (n *Node) onChange(old, v *state.View, events []event.Event) {
	if n.vault.Load() == nil {
		if info, ok := v.Nodes[n.cfg.Name]; ok {
			vlt, err := vault.Unwrap(n.ident, info.VaultWrap, v.VaultRecipient)
			if len(info.VaultWrap) == 0 {
				// The cluster seals to its nodes' own keys.
			} else if err != nil {
				n.fail(fmt.Errorf("this node cannot unwrap the cluster's vault: %w", err))
			} else {
				n.vault.Store(vlt)
			}
		}
	}
	if v.ConfigVersion != old.ConfigVersion || reflect.ValueOf(v.Secrets).Pointer() != reflect.ValueOf(old.Secrets).Pointer() { // a View's maps never change
		n.targets.update(v)
	}
	if v.ConfigIndex != old.ConfigIndex {
		if err := n.verifier.Update(providers(v, n.cfg.Dev)); err != nil {
			n.log.Error("identity providers could not be taken up; the earlier ones stand", "err", err)
		}
	}
	for _, e := range events {
		switch e.Type {
		case event.TypeNodeRenewed:
			n.background.Go(n.endpoint.Recheck)
		case event.TypeRevoked:
			if p, err := event.Decode[event.Revoked](e); err == nil && p.Ends().Kind == event.ScopeNode && p.Ends().Value != n.cfg.Name {
				n.endpoint.Disconnect(p.Ends().Value)
			}
		case event.TypeNodeJoined, event.TypeVotersSet:
			n.members.look()
		case event.TypeNodeRemoved:
			if p, err := event.Decode[event.NodeRemoved](e); err == nil {
				if p.Name == n.cfg.Name {
					n.fail(errRemoved)
				} else {
					n.endpoint.Disconnect(p.Name)
				}
			}
		}
	}
	most := policy.Strict
	if v.Config != nil {
		most = v.Config.Policies.LargestTolerance()
	}
	n.tolerance.Store(int64(most))
	n.leases.onChange(v, events)
	n.fences.folded(v)
}

// serveHTTP serves the API over connections with TLS on.
func (n *Node) serveHTTP(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           n.api.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		WriteTimeout:      3 * time.Minute, // an answer may wait for a revocation or an event
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(n.log.Handler(), slog.LevelDebug),
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
	err := srv.Serve(ln)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}

// status is this node's own part of `sallyport status`.
func (n *Node) status(ctx context.Context) api.NodeStatus {
	st := n.store.Status()
	seq, _, chain := n.store.Head()
	v := n.state.View()
	leader, _ := n.store.Leader()
	sp := n.spool.Status()
	s := api.NodeStatus{
		Node: n.cfg.Name, Addr: n.cfg.Addr, Reachable: true, Serving: n.serving.Load(), Version: n.version, Started: n.started, Now: time.Now(),
		RaftState: st.State, Leader: leader, Term: st.Term, LastIndex: st.LastIndex, CommitIndex: st.CommitIndex, AppliedIndex: st.AppliedLog,
		Events: seq, Chain: hex.EncodeToString(chain[:]), ConfigIndex: v.ConfigIndex, FeatureLevel: n.featureLevel(),
		Sessions: len(n.sessions.List()), Dev: n.cfg.Dev, EventLog: n.eventLog.Status(), Gossip: n.gossip.Members(),
		Spool:   api.Spool{Open: sp.Open, BytesWaiting: sp.BytesWaiting, OldestUnsent: sp.OldestUnsent, Store: n.cfg.Recordings, LastError: sp.LastError},
		Targets: n.targets.probe(ctx),
	}
	if v.ConfigErr != nil {
		s.ConfigError = v.ConfigErr.Error()
	}
	for _, a := range sp.Alarms {
		s.Spool.LastError = a
	}
	members, _ := n.store.Members()
	for _, m := range members {
		if m.ID == n.cfg.Name {
			s.Voter = m.Voter
		}
	}
	return s
}

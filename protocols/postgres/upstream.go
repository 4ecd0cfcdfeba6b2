package postgres

import (
	"context"
	"fmt"
	"maps"
	"net"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/protocols"
)

// loginString makes pgconn read nothing of the environment, the home
// directory or a service file; every field that matters is set afterwards.
const loginString = "host=target port=5432 user=none password=none database=none sslmode=disable " +
	"connect_timeout=0 target_session_attrs=any require_auth=scram-sha-256 channel_binding=prefer " +
	"min_protocol_version=3.0 max_protocol_version=3.0 passfile='' sslcert='' sslkey='' sslrootcert='' krbsrvname='' options='' application_name=''"

// login logs in to the target and returns what it reported.
func (p *Protocol) login(ctx context.Context, l protocols.Login, h *hello, searchPath []string) (protocols.Upstream, map[string]string, error) {
	cfg, err := pgconn.ParseConfig(loginString)
	if err != nil {
		return protocols.Upstream{}, nil, fmt.Errorf("the node's environment has PostgreSQL client variables that cannot be used (PGSERVICE?): %w", err)
	}
	params := maps.Clone(h.params)
	maps.Copy(params, pinned)
	if len(searchPath) > 0 {
		params["search_path"] = quotePath(searchPath)
	}
	cfg.Host, cfg.Port, cfg.Fallbacks = "127.0.0.1", 5432, nil // DialFunc knows where
	cfg.User, cfg.Password, cfg.Database = l.User, l.Password, h.database
	cfg.TLSConfig = l.TLS
	cfg.RuntimeParams = params
	cfg.RequireAuth, cfg.ChannelBinding = "scram-sha-256", "prefer"
	cfg.SSLNegotiation, cfg.SSLCertMode = "", ""
	cfg.KerberosSrvName, cfg.KerberosSpn = "", ""
	cfg.MinProtocolVersion, cfg.MaxProtocolVersion = "3.0", "3.0"
	cfg.MaxProtocolMessageBodyLen = maxAnswer
	cfg.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	cfg.DialFunc = func(context.Context, string, string) (net.Conn, error) { return l.Conn, nil }
	cfg.ValidateConnect, cfg.AfterConnect, cfg.AfterNetConnect = nil, nil, nil
	cfg.OAuthTokenProvider = nil

	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return protocols.Upstream{}, nil, err
	}
	// A slow write may have left pgconn reading in the background: it would take
	// the first answer away from us. This ends it, with an empty query if need be.
	if err := conn.SyncConn(ctx); err != nil {
		return protocols.Upstream{}, nil, err
	}
	hijacked, err := conn.Hijack()
	if err != nil {
		return protocols.Upstream{}, nil, err
	}
	for name, want := range pinned {
		if got := hijacked.ParameterStatuses[name]; got != want {
			return protocols.Upstream{}, nil, fmt.Errorf("the target has %s = %q; it must be %q", name, got, want)
		}
	}
	return protocols.Upstream{Conn: hijacked.Conn, Backend: hijacked.PID}, hijacked.ParameterStatuses, nil
}

// quotePath writes names as the value of search_path.
func quotePath(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = `"` + strings.ReplaceAll(n, `"`, `""`) + `"`
	}
	return strings.Join(quoted, ", ")
}

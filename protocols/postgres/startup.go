package postgres

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/sallyport/sallyport/protocols"
	"github.com/sallyport/sallyport/protocols/postgres/sql"
)

const (
	// greetWait is how long a client may take to say who it is. Nothing but a
	// slow network stands between a driver's connect and its password.
	greetWait = 10 * time.Second
	// maxStartup is PostgreSQL's own limit (MAX_STARTUP_PACKET_LENGTH).
	maxStartup = 10_000
	// maxToken bounds the password: tokens with many groups have tens of KiB.
	maxToken = 64 << 10
	// maxCancelKey is the longest key of protocol 3.2.
	maxCancelKey = 256
)

// Request codes that stand where a protocol version would.
const (
	codeCancel  = 80877102
	codeTLS     = 80877103
	codeGSS     = 80877104
	protocol3_0 = 3 << 16
)

// errHandled ends a connection that asked for something other than a session.
var errHandled = errors.New("postgres: done")

// hello is what a client says at start-up.
type hello struct {
	user, database  string
	target, profile string
	application     string
	params          map[string]string // for the target
}

// greet takes a connection to the point where the client has said what it
// wants and shown its token. It leaves s.Client secured.
func (p *Protocol) greet(ctx context.Context, s *protocols.Session) (*hello, string, error) {
	s.Client.SetDeadline(time.Now().Add(greetWait))
	packet, code, err := p.negotiate(ctx, s)
	if err != nil {
		return nil, "", err
	}
	h, options, err := readHello(packet)
	if err != nil {
		return nil, "", err
	}
	var out []byte
	if code != protocol3_0 || len(options) > 0 {
		out = negotiateVersion(out, options)
	}
	out = message(out, 'R', "\x00\x00\x00\x03") // AuthenticationCleartextPassword, inside TLS
	if _, err := s.Client.Write(out); err != nil {
		return nil, "", err
	}
	token, err := readToken(s.Client)
	if err != nil {
		return nil, "", err
	}
	s.Client.SetDeadline(time.Time{})
	return h, token, nil
}

// negotiate answers requests for encryption until the client sends its
// StartupMessage inside TLS. It reads exactly the bytes of each packet, so that
// nothing sent in the clear can be taken for part of what comes secured
// (CVE-2021-23214): what is sent too early breaks the handshake.
func (p *Protocol) negotiate(ctx context.Context, s *protocols.Session) (packet []byte, code uint32, err error) {
	for range 4 { // GSS, TLS, StartupMessage, and one to spare
		var head [8]byte
		if _, err := io.ReadFull(s.Client, head[:]); err != nil {
			return nil, 0, err
		}
		size := binary.BigEndian.Uint32(head[:])
		code = binary.BigEndian.Uint32(head[4:])
		if size < 8 || size > maxStartup {
			return nil, 0, &protocols.Refusal{Rule: "protocol", Reason: "invalid length of start-up packet", Code: "08P01"}
		}
		packet = make([]byte, size-8)
		if _, err := io.ReadFull(s.Client, packet); err != nil {
			return nil, 0, err
		}
		switch code {
		case codeCancel:
			p.cancels.request(ctx, packet)
			return nil, 0, errHandled
		case codeGSS:
			if len(packet) != 0 || s.Secured {
				return nil, 0, malformed("GSSENCRequest")
			}
			if _, err := s.Client.Write([]byte{'N'}); err != nil {
				return nil, 0, err
			}
		case codeTLS:
			if len(packet) != 0 || s.Secured {
				return nil, 0, malformed("SSLRequest")
			}
			if _, err := s.Client.Write([]byte{'S'}); err != nil {
				return nil, 0, err
			}
			conn := tls.Server(s.Client, p.cfg.TLS)
			if err := conn.HandshakeContext(ctx); err != nil {
				return nil, 0, fmt.Errorf("TLS: %w", err)
			}
			s.Client, s.Secured = conn, true
		default:
			if code>>16 != 3 {
				return nil, 0, &protocols.Refusal{Rule: "protocol", Reason: fmt.Sprintf("protocol %d.%d is not spoken here: use 3.0", code>>16, code&0xFFFF), Code: "0A000"}
			}
			if !s.Secured {
				return nil, 0, &protocols.Refusal{Rule: "tls", Reason: "plaintext logins are refused: use sslmode=verify-full", Code: "28000"}
			}
			return packet, code, nil
		}
	}
	return nil, 0, &protocols.Refusal{Rule: "protocol", Reason: "too many requests for encryption", Code: "08P01"}
}

// readHello reads a StartupMessage. Every parameter is one the gateway knows
// to be harmless, or the login is refused. options are those of the protocol.
func readHello(packet []byte) (h *hello, options []string, err error) {
	h = &hello{params: map[string]string{}}
	r := &reader{b: packet}
	for {
		name := string(r.cstring())
		if name == "" {
			break
		}
		value := string(r.cstring())
		switch {
		case name == "user":
			h.user = value
		case name == "database":
			h.database = value
		case name == "replication":
			switch strings.ToLower(value) {
			case "false", "off", "no", "0":
			default:
				return nil, nil, &protocols.Refusal{Rule: "unsupported", Reason: "replication connections are refused", Code: "0A000"}
			}
		case strings.HasPrefix(name, "_pq_."):
			options = append(options, name)
		case name == "client_encoding" && strings.EqualFold(value, "SQL_ASCII"):
			// psql in the C locale; it shows bytes as they are, and is told UTF8
		default:
			ok, pinned := sql.StartupParameterAllowed(name, value)
			if !ok {
				reason := fmt.Sprintf("the start-up parameter %s may not be set here", name)
				switch {
				case pinned != "" && strings.EqualFold(name, "options"):
					reason = fmt.Sprintf("the start-up parameter options names a setting that is held at %q here", pinned)
				case pinned != "":
					reason = fmt.Sprintf("the start-up parameter %s is held at %q here", name, pinned)
				}
				return nil, nil, &protocols.Refusal{Rule: "startup-parameter", Reason: reason, Code: "42501"}
			}
			h.params[name] = value
		}
	}
	if r.bad || len(r.b) != 0 {
		return nil, nil, malformed("StartupMessage")
	}
	if h.user == "" {
		return nil, nil, &protocols.Refusal{Rule: "login", Reason: "no user name: it names the target, as in user=prod-db", Code: "28000"}
	}
	if h.database == "" {
		return nil, nil, &protocols.Refusal{Rule: "login", Reason: "no database: say which with dbname=", Code: "3D000"}
	}
	h.application = h.params["application_name"]
	h.target, h.profile, _ = strings.Cut(h.user, ".")
	return h, options, nil
}

// negotiateVersion appends a NegotiateProtocolVersion: we speak 3.0, and none
// of the options.
func negotiateVersion(dst []byte, options []string) []byte {
	b := appendUint32(nil, protocol3_0)
	b = appendUint32(b, uint32(len(options)))
	for _, o := range options {
		b = append(append(b, o...), 0)
	}
	return message(dst, 'v', string(b))
}

func readToken(r io.Reader) (string, error) {
	var head [headerBytes]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return "", err
	}
	n, err := measure(head[:])
	if err != nil {
		return "", err
	}
	if head[0] != 'p' {
		return "", &protocols.Refusal{Rule: "protocol", Reason: "expected a password, which is the token", Code: "08P01"}
	}
	if n-headerBytes > maxToken {
		return "", &protocols.Refusal{Rule: "limits", Reason: "the password, which is the token, is longer than 64 KiB", Code: "28000"}
	}
	b := make([]byte, n-headerBytes)
	if _, err := io.ReadFull(r, b); err != nil {
		return "", err
	}
	if len(b) == 0 || b[len(b)-1] != 0 {
		return "", malformed("PasswordMessage")
	}
	return string(b[:len(b)-1]), nil
}

package tlog

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/sallyport/sallyport/raftstore/event"
)

type voter struct {
	name string
	key  *ecdsa.PrivateKey
	der  []byte
}

func newVoter(t testing.TB, name string) voter {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return voter{name, key, der}
}

func (v voter) info() event.NodeInfo { return event.NodeInfo{Name: v.name, Role: "voter", Cert: v.der} }

func nameIs(_ []byte, cert *x509.Certificate, _, name string) error {
	if cert.Subject.CommonName != name {
		return fmt.Errorf("it is of %s", cert.Subject.CommonName)
	}
	return nil
}

func fold(t testing.TB, m *Members, seq uint64, typ string, payload any) {
	t.Helper()
	if err := tryFold(m, seq, typ, payload); err != nil {
		t.Fatal(err)
	}
}

func tryFold(m *Members, seq uint64, typ string, payload any) error {
	b, _ := json.Marshal(payload)
	return m.Fold(&event.Event{Seq: seq, Proposal: event.Proposal{Type: typ, Version: 1, Payload: b}}, nameIs)
}

func sign(t testing.TB, c Checkpoint, vs ...voter) []byte {
	t.Helper()
	sigs := map[string][]byte{}
	for _, v := range vs {
		s, err := Cosign(c, v.name, v.key, time.Unix(1700000000, 0))
		if err != nil {
			t.Fatal(err)
		}
		sigs[v.name] = s
	}
	return Note(c, sigs)
}

func TestNote(t *testing.T) {
	v := newVoter(t, "n1")
	c := Checkpoint{Origin: "prod", Size: 42, Root: leafN(1)}
	b := sign(t, c, v, newVoter(t, "n2"))
	if want := "prod\n42\n" + leafN(1).String() + "\n\n— prod/n1 "; !strings.HasPrefix(string(b), want) {
		t.Fatalf("%q does not begin with %q", b, want)
	}
	got, sigs, err := ParseNote(b)
	if err != nil || got != c || len(sigs) != 2 || sigs[0].Node != "n1" {
		t.Fatal(got, sigs, err)
	}
	cert, _ := x509.ParseCertificate(v.der)
	who, err := NewCosigner("n1", cert)
	if err != nil {
		t.Fatal(err)
	}
	if at, err := who.Check(c, sigs[0].Sig); err != nil || at.Unix() != 1700000000 {
		t.Fatal(at, err)
	}
	if bytes.Equal(Note(c, map[string][]byte{"n1": sigs[0].Sig, "n2": sigs[1].Sig}), b) == false {
		t.Error("a second encoding differs")
	}
	// Nothing of what it is over can change: text, time, name, key.
	for i := range sigs[0].Sig {
		bad := bytes.Clone(sigs[0].Sig)
		bad[i] ^= 1
		if _, err := who.Check(c, bad); !errors.Is(err, ErrCosignature) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
	for _, o := range []Checkpoint{{"prod", 43, c.Root}, {"prod2", 42, c.Root}, {"prod", 42, leafN(2)}} {
		if _, err := who.Check(o, sigs[0].Sig); !errors.Is(err, ErrCosignature) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := (Cosigner{"n2", who.Key}).Check(c, sigs[0].Sig); !errors.Is(err, ErrCosignature) {
		t.Error("under another name:", err)
	}
	for _, s := range [][]byte{nil, sigs[0].Sig[:11], append(bytes.Clone(sigs[0].Sig), make([]byte, 100)...)} {
		if _, err := who.Check(c, s); !errors.Is(err, ErrCosignature) {
			t.Errorf("%d bytes: %v", len(s), err)
		}
	}
}

func TestParseNoteRefuses(t *testing.T) {
	good := string(sign(t, Checkpoint{Origin: "prod", Size: 42, Root: leafN(1)}, newVoter(t, "n1")))
	for name, s := range map[string]string{
		"empty":          "",
		"no signature":   good[:strings.Index(good, "\n\n")+2],
		"size":           strings.Replace(good, "\n42\n", "\n042\n", 1),
		"negative":       strings.Replace(good, "\n42\n", "\n-42\n", 1),
		"huge":           strings.Replace(good, "\n42\n", "\n99999999999999999999\n", 1),
		"root":           strings.Replace(good, leafN(1).String(), "AAAA", 1),
		"extension":      strings.Replace(good, "\n\n", "\nextension\n\n", 1),
		"no origin":      good[4:],
		"another's name": strings.Replace(good, "prod/n1", "test/n1", 1),
		"twice":          good + string(sign(t, Checkpoint{Origin: "prod", Size: 42, Root: leafN(1)}, newVoter(t, "n1")))[strings.Index(good, "— "):],
		"too long":       good + strings.Repeat("x", MaxNote),
		"control":        strings.Replace(good, "prod", "pr\x00d", 1),
	} {
		if c, _, err := ParseNote([]byte(s)); !errors.Is(err, ErrNote) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}

// TestQuorum is who must cosign, as members come and go.
func TestQuorum(t *testing.T) {
	a, b, c, d, e := newVoter(t, "a"), newVoter(t, "b"), newVoter(t, "c"), newVoter(t, "d"), newVoter(t, "e")
	b2 := newVoter(t, "b") // b with another key
	set := func(vs ...voter) Voters {
		m := &Members{Cluster: "x"}
		for i, v := range vs {
			fold(t, m, uint64(i+2), event.TypeNodeJoined, event.NodeJoined{Node: v.info()})
		}
		return m.Voters
	}
	renew := func(retire bool) Voters {
		m := &Members{Cluster: "x", Voters: set(a, b, c)}
		fold(t, m, 9, event.TypeNodeRenewed, event.NodeRenewed{Name: "b", Cert: b2.der})
		if retire {
			fold(t, m, 10, event.TypeNodeRenewed, event.NodeRenewed{Name: "b", Cert: b2.der, Retired: true})
		}
		return m.Voters
	}
	renewed, retired := renew(false), renew(true)
	for _, x := range []struct {
		name    string
		prev    Voters
		now     Voters
		by      []voter
		want    error
		goodNow int
	}{
		{"all", set(a, b, c), set(a, b, c), []voter{a, b, c}, nil, 3},
		{"majority", set(a, b, c), set(a, b, c), []voter{a, c}, nil, 2},
		{"one of three", set(a, b, c), set(a, b, c), []voter{a}, ErrCosigners, 1},
		{"half", set(a, b, c, d), set(a, b, c, d), []voter{a, b}, ErrCosigners, 2},
		{"none", set(a), set(a), nil, ErrCosigners, 0},
		{"strangers do not count", set(a, b, c), set(a, b, c), []voter{a, d, e}, ErrCosigners, 1},
		{"a stranger does not hurt", set(a, b, c), set(a, b, c), []voter{a, b, d}, nil, 2},
		{"one came", set(a, b, c), set(a, b, c, d), []voter{a, b, d}, nil, 3},
		{"one came, too few", set(a, b, c), set(a, b, c, d), []voter{a, d}, ErrCosigners, 2},
		{"one went", set(a, b, c), set(a, b), []voter{a, b}, nil, 2},
		{"a minority throws two out", set(a, b, c), set(a), []voter{a}, ErrCosigners, 1},
		{"two went, the majority agreed", set(a, b, c), set(a), []voter{a, b}, nil, 1},
		{"a minority brings its own", set(a, b, c), set(a, d, e), []voter{a, d, e}, ErrCosigners, 3},
		{"two came, both majorities", set(a), set(a, b, c), []voter{a, b}, nil, 2},
		{"two came, without who was there", set(a), set(a, b, c), []voter{b, c}, ErrCosigners, 2},
		{"a key comes, the others agree", set(a, b, c), renewed, []voter{a, b2, c}, nil, 2},
		{"a key comes by a minority", set(a, b, c), renewed, []voter{a, b2}, ErrCosigners, 1},
		{"a key comes, the old one agrees", set(a, b, c), renewed, []voter{a, b}, nil, 2},
		{"a key came", renewed, renewed, []voter{a, b2}, nil, 2},
		{"the old key goes", renewed, retired, []voter{a, b2}, nil, 2},
		{"the old key goes and vouches", renewed, retired, []voter{a, b}, ErrCosigners, 1},
		{"the old key is gone", retired, retired, []voter{a, b}, ErrCosignature, 0},
		{"a key replaced at once", set(a, b, c), retired, []voter{a, b2}, ErrCosigners, 1},
		{"forged by who is no b", set(a, b, c), set(a, b, c), []voter{a, b2}, ErrCosignature, 0},
	} {
		m := &Members{Cluster: "x", Voters: x.now}
		cp := Checkpoint{Origin: "x", Size: 9, Root: leafN(1)}
		n := sign(t, cp, x.by...)
		if len(x.by) == 0 { // a note needs one line
			n = sign(t, cp, e)
		}
		got, by, err := m.CheckNote(n, x.prev)
		if !errors.Is(err, x.want) || got != cp || len(by) != x.goodNow && x.want != ErrCosignature {
			t.Errorf("%s: %v by %v, want %v", x.name, err, by, x.want)
		}
	}
	m := &Members{Cluster: "y", Voters: set(a)}
	if _, _, err := m.CheckNote(sign(t, Checkpoint{Origin: "x", Size: 9, Root: leafN(1)}, a), m.Voters); !errors.Is(err, ErrNote) {
		t.Error("another log's:", err)
	}
}

func TestMembers(t *testing.T) {
	a, b, g := newVoter(t, "a"), newVoter(t, "b"), newVoter(t, "g")
	m := &Members{}
	fold(t, m, 1, event.TypeClusterCreated, event.ClusterCreated{ID: "x", CA: []byte("ca"), Node: a.info()})
	before := *m
	fold(t, m, 2, event.TypeNodeJoined, event.NodeJoined{Node: b.info()})
	gw := g.info()
	gw.Role = "gateway"
	fold(t, m, 3, event.TypeNodeJoined, event.NodeJoined{Node: gw})
	fold(t, m, 4, event.TypeConfigApplied, event.ConfigApplied{})
	if got := strings.Join(m.Voters.Names(), " "); got != "a b" || len(m.Genesis) != 1 || len(before.Voters) != 1 {
		t.Fatal(got, m.Genesis.Names(), before.Voters.Names())
	}
	fold(t, m, 5, event.TypeNodeRemoved, event.NodeRemoved{Name: "a"})
	if got := strings.Join(m.Voters.Names(), " "); got != "b" || len(m.Genesis) != 1 {
		t.Fatal(got)
	}
	for name, err := range map[string]error{
		"second creation":        tryFold(m, 6, event.TypeClusterCreated, event.ClusterCreated{ID: "x", Node: a.info()}),
		"not its name":           tryFold(m, 6, event.TypeNodeJoined, event.NodeJoined{Node: event.NodeInfo{Name: "z", Role: "voter", Cert: a.der}}),
		"renewed with another's": tryFold(m, 6, event.TypeNodeRenewed, event.NodeRenewed{Name: "b", Cert: a.der}),
		"no certificate":         tryFold(m, 6, event.TypeNodeJoined, event.NodeJoined{Node: event.NodeInfo{Name: "z", Role: "voter"}}),
		"no payload":             m.Fold(&event.Event{Seq: 6, Proposal: event.Proposal{Type: event.TypeNodeJoined, Version: 1}}, nameIs),
	} {
		if err == nil {
			t.Error(name, "was taken")
		}
	}
}

func TestKeys(t *testing.T) {
	cert := CertKey([]byte("x"))
	for key, want := range map[string]Object{
		CheckpointKey(1):               {Kind: KindCheckpoint, Number: 1},
		CheckpointKey(1234567):         {Kind: KindCheckpoint, Number: 1234567},
		TileKey(0, 0, TileWidth):       {Kind: KindTile, Width: TileWidth},
		TileKey(2, 1234067, 5):         {Kind: KindTile, Level: 2, Number: 1234067, Width: 5},
		EntriesKey(1000, 255):          {Kind: KindEntries, Number: 1000, Width: 255},
		LargeKey(70_000):               {Kind: KindLarge, Number: 70_000},
		CertKey([]byte("x")):           {Kind: KindCert, Hash: sha256.Sum256([]byte("x"))},
		"log/tile/1/x001/x234/067":     {Kind: KindTile, Level: 1, Number: 1234067, Width: TileWidth},
		"log/checkpoint/000000001/234": {Kind: KindCheckpoint, Number: 1234},
	} {
		if got := ParseKey(key); got != want {
			t.Errorf("%s: %+v, want %+v", key, got, want)
		}
	}
	for _, key := range []string{
		"", "log", "log/", "sessions/x", "log/checkpoint/000000000/000", "log/checkpoint/0/1", "log/checkpoint/000000001/2345", "log/tile/0/1",
		"log/tile/0/x000/001", "log/tile/00/001", "log/tile/8/001", "log/tile/0/001.p/256", "log/tile/0/001.p/0", "log/tile/0/001.p/01", "log/tile/0/-01",
		"log/entries/", "log/entries/001/002", "log/large/ab", "log/large/001.p/3", cert + "0", cert[:len(cert)-2], Root + "cert/" + strings.ToUpper(cert[len(Root)+5:]), "log/entries/x999/x999/x999/x999/x999/x999/x999/x999/999",
	} {
		if o := ParseKey(key); o.Kind != KindUnknown {
			t.Errorf("%q is %+v", key, o)
		}
	}
	if CheckpointKey(999) >= CheckpointKey(1000) || CheckpointKey(999_999) >= CheckpointKey(1_000_000) {
		t.Error("keys of checkpoints do not sort by number")
	}
}

func TestBundle(t *testing.T) {
	small, big := []byte("small"), bytes.Repeat([]byte("x"), maxInBundle+1)
	most := big[:maxInBundle]
	var b []byte
	for i, e := range [][]byte{small, big, most} {
		var large bool
		if b, large = AppendEntry(b, e); large != (i == 1) {
			t.Fatal(i, large)
		}
	}
	got, err := ParseBundle(b, 3)
	if err != nil || !bytes.Equal(got[0].Envelope, small) || got[1].Envelope != nil || got[1].Leaf != LeafHash(big) || !bytes.Equal(got[2].Envelope, most) {
		t.Fatal(got, err)
	}
	for name, c := range map[string]struct {
		b     []byte
		width int
	}{
		"fewer": {b, 4}, "more": {b, 2}, "cut": {b[:len(b)-1], 3}, "cut length": {b[:8], 2}, "empty entry": {[]byte{0, 0}, 1},
		"cut hash": {[]byte{0xff, 0xff, 1}, 1}, "too long": {append([]byte{0xff, 0xfe}, make([]byte, 70000)...), 1}, "none": {nil, 1},
	} {
		if _, err := ParseBundle(c.b, c.width); !errors.Is(err, ErrBundle) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("prod\n42\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\n— prod/n1 AAAAAAA=\n"), 1)
	b, _ := AppendEntry(nil, []byte("x"))
	f.Add(b, 1)
	f.Add([]byte("log/tile/0/x001/002.p/7"), 0)
	f.Fuzz(func(t *testing.T, b []byte, width int) {
		if c, sigs, err := ParseNote(b); err == nil {
			m := map[string][]byte{}
			for _, s := range sigs {
				m[s.Node] = s.Sig
			}
			if d, _, err := ParseNote(Note(c, m)); err != nil || d != c {
				t.Fatalf("%+v became %+v, %v", c, d, err)
			}
		}
		if es, err := ParseBundle(b, width); err == nil && len(es) != width {
			t.Fatal(len(es))
		}
		ParseKey(string(b))
	})
}

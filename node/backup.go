package node

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"filippo.io/age"

	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/pki"
	"github.com/sallyport/sallyport/node/state"
	"github.com/sallyport/sallyport/node/vault"
	"github.com/sallyport/sallyport/raftstore"
	"github.com/sallyport/sallyport/raftstore/event"
)

// A backup is one stream, encrypted with age as a whole, so that neither the
// wire's relays nor the file show anything of it:
//
//	magic
//	parts of the event store's export: length u32 big-endian, not 0, and bytes
//	0 u32
//	length u32, the contents as JSON (backupContents)
//	length u32, signature (ECDSA, ASN.1) over the SHA-256 of all before
//
// The signature is the exporting node's, whose certificate the contents hold:
// whoever restores knows the cluster's CA and so that it is a backup of that
// cluster, made by one of its voters, whole and as it was.
const (
	backupMagic = "sallyport-backup-v1\n"
	backupPart  = 256 << 10
	// maxBackupContents bounds what restoring holds in memory: thousands of
	// secrets.
	maxBackupContents = 64 << 20
)

// ErrNoBackup means that a file is not a backup, or not of this cluster.
var ErrNoBackup = errors.New("this is not a backup of the cluster")

// backupContents is what a backup holds beside the events.
type backupContents struct {
	Cluster string    `json:"cluster"`
	Made    time.Time `json:"made"`
	Node    string    `json:"node"` // that made it
	Cert    []byte    `json:"cert"`
	Seq     uint64    `json:"seq"`
	Chain   []byte    `json:"chain"`
	CA      []byte    `json:"ca"`
	// Names are those that the cluster's nodes have or had.
	Names   []string          `json:"names"`
	Secrets map[string][]byte `json:"secrets"`
	Keys    map[string][]byte `json:"keys"`
	Missing []string          `json:"missing,omitempty"` // secrets this node could not open
}

// backup writes a backup to w, encrypted to recipient. It is of one moment: the
// secrets are those of the newest event in it.
func (n *Node) backup(ctx context.Context, recipient string, w io.Writer) error {
	r, err := age.ParseX25519Recipient(recipient)
	if err != nil {
		return fmt.Errorf("recipient: %w", err)
	}
	if len(n.state.View().Keys) == 0 {
		return errors.New("the cluster seals to one vault key still: a backup can be made when all its nodes run this build, see `sallyport status`")
	}
	enc, err := age.Encrypt(w, r)
	if err != nil {
		return err
	}
	sum := sha256.New()
	out := io.MultiWriter(enc, sum)
	if _, err := io.WriteString(out, backupMagic); err != nil {
		return err
	}
	before := n.state.View()
	parts := bufio.NewWriterSize(partWriter{out}, backupPart)
	seq, chain, err := n.store.Export(ctx, parts)
	if err == nil {
		err = parts.Flush()
	}
	if err == nil {
		_, err = out.Write([]byte{0, 0, 0, 0})
	}
	if err != nil {
		return err
	}
	if err := n.folded(ctx, seq); err != nil {
		return err
	}
	v := n.state.View()
	if v.ConfigVersion != before.ConfigVersion {
		return errors.New("the configuration or the nodes changed while the backup was made: make it again")
	}
	c, err := n.contents(v)
	if err != nil {
		return err
	}
	c.Seq, c.Chain = seq, chain[:]
	data, err := json.Marshal(c)
	if err == nil {
		err = writePart(out, data)
	}
	if err != nil {
		return err
	}
	self := n.self.Load()
	sig, err := self.key.Sign(rand.Reader, sum.Sum(nil), crypto.SHA256)
	if err == nil {
		err = writePart(enc, sig)
	}
	if err != nil {
		return err
	}
	return enc.Close()
}

// folded waits until this node's view has event seq.
func (n *Node) folded(ctx context.Context, seq uint64) error {
	for {
		changed := n.state.Changed()
		if n.state.View().Seq >= seq {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (n *Node) contents(v *state.View) (*backupContents, error) {
	c := &backupContents{
		Cluster: n.cluster, Made: time.Now().UTC(), Node: n.cfg.Name, Cert: n.self.Load().cert.Raw, CA: v.CA,
		Names:   slices.Sorted(maps.Keys(v.Nodes)),
		Secrets: map[string][]byte{}, Keys: map[string][]byte{},
	}
	c.Names = append(c.Names, slices.Sorted(maps.Keys(v.Removed))...)
	var err error
	if c.Keys[caKeyName], err = n.caKey(v); err != nil {
		return nil, err
	}
	if c.Keys[maskKeyName], err = n.maskKey(v); err != nil {
		return nil, err
	}
	for name, sealed := range v.Secrets {
		switch plain, err := n.unseal(api.SecretName(name), sealed); {
		case errors.Is(err, vault.ErrNotSealedToUs):
			c.Missing = append(c.Missing, name)
		case err != nil:
			return nil, err
		default:
			c.Secrets[name] = plain
		}
	}
	slices.Sort(c.Missing)
	return c, nil
}

// partWriter writes each piece with its length before it.
type partWriter struct{ w io.Writer }

func (p partWriter) Write(b []byte) (int, error) {
	for piece := range slices.Chunk(b, backupPart) {
		if err := writePart(p.w, piece); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

func writePart(w io.Writer, b []byte) error {
	if _, err := w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b)))); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

// partReader reads what partWriter wrote, up to the part of length 0.
type partReader struct {
	r    io.Reader
	left uint32
	end  bool
}

func (p *partReader) Read(b []byte) (int, error) {
	for p.left == 0 {
		if p.end {
			return 0, io.EOF
		}
		n, err := readLen(p.r, backupPart)
		if err != nil {
			return 0, err
		}
		p.left, p.end = n, n == 0
	}
	n, err := p.r.Read(b[:min(uint64(len(b)), uint64(p.left))])
	p.left -= uint32(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func readLen(r io.Reader, most uint32) (uint32, error) {
	var b [4]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, noEOF(err)
	}
	n := binary.BigEndian.Uint32(b[:])
	if n > most {
		return 0, fmt.Errorf("%w: a part of %d bytes", ErrNoBackup, n)
	}
	return n, nil
}

func readPart(r io.Reader, most uint32) ([]byte, error) {
	n, err := readLen(r, most)
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	_, err = io.ReadFull(r, b)
	return b, noEOF(err)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// RestoreOptions say how to make a cluster from a backup.
type RestoreOptions struct {
	Config *config.Config // of the one node; its name must be new to the cluster
	Hosts  []string       // further names and addresses that clients use for the node
	Backup io.Reader      // decrypted
	CA     *x509.Certificate
}

// Restored tells what was restored.
type Restored struct {
	Cluster string    `json:"cluster"`
	Made    time.Time `json:"made"`
	Seq     uint64    `json:"seq"`
	Missing []string  `json:"missing,omitempty"` // secrets to be given again by `sallyport apply`
}

// Restore makes a data directory whose node, when it is started, is the one
// member of a cluster with the events, configuration and secrets of a backup. The
// cluster that was backed up must be gone for good: the new one knows its nodes
// as removed.
func Restore(o RestoreOptions) (_ *Restored, err error) {
	c := o.Config
	if err := prepare(c); err != nil {
		return nil, err
	}
	raftDir := filepath.Join(c.DataDir, raftDirName)
	if entries, err := os.ReadDir(c.DataDir); err != nil || len(entries) > 0 {
		return nil, errors.Join(fmt.Errorf("%s is not empty: a restored node needs a new directory", c.DataDir), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(raftDir))
		}
	}()
	sum := sha256.New()
	in := io.TeeReader(o.Backup, sum)
	magic := make([]byte, len(backupMagic))
	if _, err := io.ReadFull(in, magic); err != nil || string(magic) != backupMagic {
		return nil, errors.Join(ErrNoBackup, err)
	}
	parts := &partReader{r: in}
	seq, chain, err := raftstore.Import(raftstore.Config{Dir: raftDir, NodeID: c.Name, Addr: c.Addr, Log: slog.New(slog.DiscardHandler)}, parts)
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, parts); err != nil {
		return nil, err
	}
	contents, err := readContents(in, o.Backup, sum, o.CA)
	if err != nil {
		return nil, err
	}
	if seq != contents.Seq || !slices.Equal(chain[:], contents.Chain) {
		return nil, fmt.Errorf("%w: its events are not those that were backed up", ErrNoBackup)
	}
	if slices.Contains(contents.Names, c.Name) {
		return nil, fmt.Errorf("the cluster has, or had, a node named %q: choose another name", c.Name)
	}
	return restored(o, contents, hex.EncodeToString(sum.Sum(nil)))
}

// readContents reads and checks what follows the events.
func readContents(in, raw io.Reader, sum hash.Hash, ca *x509.Certificate) (*backupContents, error) {
	data, err := readPart(in, maxBackupContents)
	if err != nil {
		return nil, err
	}
	digest := sum.Sum(nil)
	sig, err := readPart(raw, 1<<10) // not part of what it signs
	if err != nil {
		return nil, err
	}
	if n, err := io.Copy(io.Discard, raw); err != nil || n > 0 {
		return nil, errors.Join(fmt.Errorf("%w: %d bytes follow its end", ErrNoBackup, n), err)
	}
	var c backupContents
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, errors.Join(ErrNoBackup, err)
	}
	cert, err := x509.ParseCertificate(c.Cert)
	if err != nil {
		return nil, errors.Join(ErrNoBackup, err)
	}
	id, err := pki.VerifyPeerAt(cert, pki.Pool(ca.Raw), c.Cluster, c.Made, pki.Voter)
	if err != nil || id.Name != c.Node || !slices.Equal(c.CA, ca.Raw) {
		return nil, errors.Join(fmt.Errorf("%w: it was not made by a voter that the given CA has certified", ErrNoBackup), err)
	}
	if pub, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !ecdsa.VerifyASN1(pub, digest, sig) {
		return nil, fmt.Errorf("%w: its signature is wrong", ErrNoBackup)
	}
	return &c, nil
}

// restored makes the node's keys and what it appends first.
func restored(o RestoreOptions, b *backupContents, digest string) (*Restored, error) {
	c := o.Config
	ca, err := pki.LoadCA(b.CA, b.Keys[caKeyName])
	if err != nil {
		return nil, err
	}
	ca.NodeValidity = c.CertLifetime
	key, ident, csr, err := nodeKeys()
	if err != nil {
		return nil, err
	}
	info, err := signNode(ca, nil, &api.JoinRequest{Name: c.Name, Addr: c.Addr, CSR: csr, Hosts: o.Hosts, Recipient: ident.Recipient()}, b.Cluster, pki.Voter, time.Now())
	if err != nil {
		return nil, err
	}
	to := event.Recipients{info.Recipient}
	e := event.ClusterRestored{Backup: digest, Seq: b.Seq, Node: info, Missing: b.Missing, Secrets: event.SecretsSealed{
		Secrets: map[string]event.Sealed{}, SealedTo: map[string]event.Recipients{}, Keys: map[string]event.SealedKey{},
	}}
	for name, plain := range b.Secrets {
		if e.Secrets.Secrets[name], err = vault.Seal(api.SecretName(name), plain, to...); err != nil {
			return nil, err
		}
		e.Secrets.SealedTo[name] = to
	}
	for name, plain := range b.Keys {
		sealed, err := vault.Seal(name, plain, to...)
		if err != nil {
			return nil, err
		}
		e.Secrets.Keys[name] = event.SealedKey{Sealed: sealed, SealedTo: to}
	}
	data, err := json.Marshal(firstEvent{ID: event.NewID(), Restored: &e})
	if err != nil {
		return nil, err
	}
	if err := pki.WriteFile(filepath.Join(c.DataDir, bootstrapFile), data); err != nil {
		return nil, err
	}
	r := &Restored{Cluster: b.Cluster, Made: b.Made, Seq: b.Seq, Missing: b.Missing}
	return r, saveNode(c, key, ident, b.CA, info.Cert)
}

// DecryptBackup opens a backup file with identities.
func DecryptBackup(r io.Reader, identities ...age.Identity) (io.Reader, error) {
	out, err := age.Decrypt(r, identities...)
	if none := new(age.NoIdentityMatchError); errors.As(err, &none) {
		return nil, errors.New("the backup was encrypted to another key or passphrase")
	}
	if err != nil {
		return nil, errors.Join(ErrNoBackup, err)
	}
	return out, nil
}

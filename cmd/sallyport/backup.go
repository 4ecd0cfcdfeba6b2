package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node"
	"github.com/sallyport/sallyport/node/pki"
)

func clusterBackup(f *clientFlags) *cobra.Command {
	var out, passphrase string
	var recipients []string
	c := &cobra.Command{
		Use: "backup -o FILE (--recipient AGE | --passphrase-file FILE)", Short: "Back the cluster up: events, configuration, secrets, the CA's key", Args: noArgs,
		Long: `Writes an encrypted backup of the whole cluster as it is at one moment: what was
agreed on, the configuration with its secrets, and the authority's key. Whoever
can decrypt it has all of these. Recordings are not in it. It is written by the
leader, encrypted all the way, and signed: "cluster restore" takes it only with
the cluster's CA certificate.

Secrets of targets that only certain nodes may serve are in it when the leader
may open them; the others are to be given again after a restore.`,
		Example: `  age-keygen -o backup.key          # keep it offline; it prints the public key
  sallyport cluster backup -o cluster.backup --recipient age1…
  sallyport cluster backup -o cluster.backup --passphrase-file pass.txt`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			to, err := backupRecipients(recipients, passphrase)
			if err != nil {
				return err
			}
			if _, err := os.Lstat(out); !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s exists already: a backup overwrites nothing", out)
			}
			cl, err := f.client()
			if err != nil {
				return err
			}
			// The cluster encrypts to a key of this call alone; here it is
			// encrypted again, to whoever shall be able to restore.
			call, err := age.GenerateX25519Identity()
			if err != nil {
				return err
			}
			tmp, err := os.CreateTemp(filepath.Dir(out), ".backup.*") // mode 0600
			if err != nil {
				return err
			}
			defer os.Remove(tmp.Name())
			defer tmp.Close()
			pr, pw := io.Pipe()
			go func() { pw.CloseWithError(cl.Backup(cmd.Context(), call.Recipient().String(), pw)) }()
			n, err := reencrypt(tmp, pr, call, to)
			pr.CloseWithError(err)
			if err == nil {
				err = errors.Join(tmp.Sync(), os.Link(tmp.Name(), out))
			}
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), map[string]any{"file": out, "bytes": n})
			}
			say(cmd.OutOrStdout(), "%s: %d bytes before encryption.\nTo restore, it takes the key or passphrase and the cluster's CA certificate (ca.crt).", out, n)
			return nil
		},
	}
	c.Flags().StringVarP(&out, "output", "o", "", "new file for the backup (required)")
	c.Flags().StringSliceVar(&recipients, "recipient", nil, "age public key that may decrypt it; may be given several times")
	c.Flags().StringVar(&passphrase, "passphrase-file", "", "file whose first line is a passphrase instead")
	_ = c.MarkFlagRequired("output")
	return c
}

func reencrypt(w io.Writer, r io.Reader, from age.Identity, to []age.Recipient) (int64, error) {
	plain, err := age.Decrypt(r, from)
	if err != nil {
		return 0, err
	}
	enc, err := age.Encrypt(w, to...)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(enc, plain)
	if err != nil {
		return n, err
	}
	return n, enc.Close()
}

func backupRecipients(recipients []string, passphrase string) ([]age.Recipient, error) {
	if (len(recipients) > 0) == (passphrase != "") {
		return nil, usageError{errors.New("give --recipient or --passphrase-file, one of the two")}
	}
	if passphrase != "" {
		p, err := readPassphrase(passphrase)
		if err != nil {
			return nil, err
		}
		r, err := age.NewScryptRecipient(p)
		return []age.Recipient{r}, err
	}
	var to []age.Recipient
	for _, s := range recipients {
		r, err := age.ParseX25519Recipient(s)
		if err != nil {
			return nil, usageError{fmt.Errorf("--recipient: %w", err)}
		}
		to = append(to, r)
	}
	return to, nil
}

// minPassphrase is what a passphrase must have at least: whoever has the file can
// try as many as they like.
const minPassphrase = 12

func readPassphrase(path string) (string, error) {
	if err := pki.CheckPrivate(path); err != nil {
		return "", err
	}
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	line, err := bufio.NewReader(io.LimitReader(file, 4<<10)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", err
	}
	if line = strings.TrimRight(line, "\r\n"); len(line) < minPassphrase {
		return "", fmt.Errorf("%s: the first line is the passphrase, of at least %d bytes", path, minPassphrase)
	}
	return line, nil
}

func clusterRestore(f *clientFlags) *cobra.Command {
	n := &nodeFlags{}
	var identity, passphrase string
	c := &cobra.Command{
		Use: "restore FILE --name NAME --data-dir DIR --addr HOST:PORT --ca FILE (--identity FILE | --passphrase-file FILE)", Short: "Make a cluster of one node from a backup", Args: exactArgs("FILE"),
		Long: `Makes the first node of a cluster that goes on where a backup was made: same
name, same CA, same administrator, configuration and revocations. The nodes of
then are known as removed, so the name must be a new one; further nodes join as
usual. The cluster that was backed up must be gone for good: what happened in it
after the backup is lost, revocations too.`,
		Example: `  sallyport cluster restore cluster.backup --identity backup.key --ca ca.crt --name r1 --data-dir /var/lib/sallyport --addr gw1.example.com:7443
  sallyport serve --data-dir /var/lib/sallyport`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := backupIdentities(identity, passphrase)
			if err != nil {
				return err
			}
			s, err := f.resolve()
			if err != nil {
				return err
			}
			ca, err := pki.ParseCertPEM([]byte(s.CA))
			if err != nil {
				return usageError{errors.New("--ca FILE is needed: the CA certificate of the cluster that was backed up")}
			}
			file, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			plain, err := node.DecryptBackup(bufio.NewReader(file), ids...)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			r, err := node.Restore(node.RestoreOptions{Config: &n.Config, Hosts: n.hosts, Backup: plain, CA: ca})
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), r)
			}
			say(cmd.OutOrStdout(), "Restored cluster %s as of %s, %d events.\nStart its one node, then let others join:\n  sallyport serve --data-dir %s", r.Cluster, stamp(r.Made), r.Seq, n.DataDir)
			if len(r.Missing) > 0 {
				say(cmd.OutOrStdout(), "Not in the backup; give them again with `sallyport apply`: %s", strings.Join(r.Missing, ", "))
			}
			return nil
		},
	}
	n.register(c)
	c.Flags().StringVar(&identity, "identity", "", "file with the age key the backup was encrypted to")
	c.Flags().StringVar(&passphrase, "passphrase-file", "", "file whose first line is the passphrase")
	return c
}

func backupIdentities(identity, passphrase string) ([]age.Identity, error) {
	switch {
	case (identity == "") == (passphrase == ""):
		return nil, usageError{errors.New("give --identity or --passphrase-file, one of the two")}
	case passphrase != "":
		p, err := readPassphrase(passphrase)
		if err != nil {
			return nil, err
		}
		id, err := age.NewScryptIdentity(p)
		return []age.Identity{id}, err
	}
	if err := pki.CheckPrivate(identity); err != nil {
		return nil, err
	}
	file, err := os.Open(identity)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	ids, err := age.ParseIdentities(io.LimitReader(file, 64<<10))
	if err != nil {
		return nil, fmt.Errorf("%s holds no age key", identity) // the error may quote it
	}
	return ids, nil
}

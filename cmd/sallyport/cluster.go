package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/sallyport/sallyport/node"
	"github.com/sallyport/sallyport/node/api"
	"github.com/sallyport/sallyport/node/config"
	"github.com/sallyport/sallyport/node/pki"
)

// nodeFlags make a node's settings.
type nodeFlags struct {
	config.Config
	hosts []string
}

func (n *nodeFlags) register(c *cobra.Command) {
	fl := c.Flags()
	fl.StringVar(&n.Name, "name", "", "the node's name: lower-case letters, digits, dashes (required)")
	fl.StringVar(&n.DataDir, "data-dir", "", "new directory for the node's keys, state and spool (required)")
	fl.StringVar(&n.Addr, "addr", "", "host:port that clients and other nodes reach the node at, TCP and UDP (required)")
	fl.StringVar(&n.Listen, "listen", "", "host:port to bind when it differs from --addr")
	fl.StringSliceVar(&n.hosts, "host", nil, "further names and addresses for the node's certificate, such as a load balancer's")
	fl.StringVar(&n.Zone, "zone", "", "where the node is, such as a data centre: voters are spread over zones")
	fl.StringVar(&n.Recordings, "recordings", "", "where recordings go: a directory, or s3://bucket/prefix?endpoint=URL&region=R (default DATADIR/recordings)")
	fl.BoolVar(&n.Dev, "dev", false, "for local trials: accept tokens of sallyport dev-issuer and targets without TLS")
	for _, f := range []string{"name", "data-dir", "addr"} {
		_ = c.MarkFlagRequired(f)
	}
}

func clusterCommand(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "cluster", Short: "Make a cluster, add and remove nodes"}
	c.AddCommand(clusterInit(), clusterToken(f), clusterJoin(), clusterMembers(f), clusterVoters(f), clusterRotate(f), clusterBackup(f), clusterRestore(f), clusterLeave(f), clusterRemove(f))
	return c
}

func clusterInit() *cobra.Command {
	n := &nodeFlags{}
	var adminOut, cluster string
	c := &cobra.Command{
		Use: "init --name NAME --data-dir DIR --addr HOST:PORT --admin-out DIR", Short: "Make a cluster: its CA, its first node and an administrator", Args: noArgs,
		Example: `  sallyport cluster init --name n1 --data-dir /var/lib/sallyport --addr gw1.example.com:7443 --admin-out ~/sallyport-admin
  sallyport serve --data-dir /var/lib/sallyport`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := node.Init(node.InitOptions{Config: &n.Config, Cluster: cluster, Hosts: n.hosts, AdminOut: adminOut}); err != nil {
				return err
			}
			say(cmd.OutOrStdout(), `Made the first node in %s.
The administrator's certificate is %s: keep it safe, it may change everything.

Next:
  sallyport serve --data-dir %s
  sallyport login --server %s --ca %s --admin-cert %s --admin-key %s
  sallyport cluster token create      # one for each further node`,
				n.DataDir, filepath.Join(adminOut, "admin.crt"), n.DataDir, n.Addr,
				filepath.Join(adminOut, "ca.crt"), filepath.Join(adminOut, "admin.crt"), filepath.Join(adminOut, "admin.key"))
			return nil
		},
	}
	n.register(c)
	c.Flags().StringVar(&cluster, "cluster", "", "the cluster's name (default: made up)")
	c.Flags().StringVar(&adminOut, "admin-out", "", "directory for the bootstrap administrator's certificate, key and the CA certificate (required)")
	_ = c.MarkFlagRequired("admin-out")
	return c
}

func clusterToken(f *clientFlags) *cobra.Command {
	c := &cobra.Command{Use: "token", Short: "Make tokens for new nodes"}
	var ttl time.Duration
	var role string
	create := &cobra.Command{
		Use: "create", Short: "Make a one-time token for `cluster join`", Args: noArgs,
		Long: `Makes a token with which one node may join, in the role given here: a voter
takes part in Raft and may be promoted to lead, a gateway only serves sessions
and follows. The role goes into the node's certificate and cannot be changed.
The token's secret is made by this command and is sent to nobody; the token is
dead when a node it was made through is removed.`,
		Example: `  sallyport cluster token create
  sallyport cluster token create --role gateway --ttl 15m`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.resolve()
			if err != nil {
				return err
			}
			cl, err := s.client()
			if err != nil {
				return err
			}
			ca, err := pki.ParseCertPEM([]byte(s.CA))
			if err != nil {
				return err
			}
			t, err := cl.JoinToken(cmd.Context(), ttl, role, ca.Raw)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), t)
			}
			fmt.Fprintln(cmd.OutOrStdout(), t.Token)
			say(cmd.ErrOrStderr(), "Good for one node, as %s, until %s. It pins the cluster's CA.", t.Role, stamp(t.Expires))
			return nil
		},
	}
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it may be used, 1m to 24h")
	create.Flags().StringVar(&role, "role", pki.Voter, "what the node will be: voter or gateway")
	c.AddCommand(create)
	return c
}

func clusterJoin() *cobra.Command {
	n := &nodeFlags{}
	var token, server string
	c := &cobra.Command{
		Use: "join --token TOKEN --server HOST:PORT --name NAME --data-dir DIR --addr HOST:PORT", Short: "Make this machine a node of a cluster", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if token == "" {
				token = os.Getenv("SALLYPORT_JOIN_TOKEN")
			}
			if token == "" {
				return usageError{errors.New("--token or SALLYPORT_JOIN_TOKEN is needed: `sallyport cluster token create` makes one")}
			}
			if err := node.Join(cmd.Context(), node.JoinOptions{Config: &n.Config, Token: token, Server: server, Hosts: n.hosts}); err != nil {
				return err
			}
			say(cmd.OutOrStdout(), "Joined. Start the node:\n  sallyport serve --data-dir %s", n.DataDir)
			return nil
		},
	}
	n.register(c)
	c.Flags().StringVar(&token, "token", "", "from sallyport cluster token create (or SALLYPORT_JOIN_TOKEN)")
	c.Flags().StringVar(&server, "server", "", "any node of the cluster, host:port (required)")
	_ = c.MarkFlagRequired("server")
	return c
}

func clusterRotate(f *clientFlags) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "rotate NODE | --all", Short: "Have nodes make a new key and renew their certificate", ValidArgsFunction: cobra.NoFileCompletions,
		Long: `Nodes renew their certificates by themselves, with a new key, at two thirds of
their life. This has it done now, one node after the other: sessions go on, and
the earlier key is dead when the command returns. A key that somebody else may
have is no reason to rotate but to remove the node: they could renew it too.`,
		Example: `  sallyport cluster rotate n2
  sallyport cluster rotate --all`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) == 1) || len(args) > 1 {
				return usageError{errors.New("name one node, or --all")}
			}
			cl, err := f.client()
			if err != nil {
				return err
			}
			if all {
				st, err := cl.Status(cmd.Context())
				if err != nil {
					return err
				}
				for _, n := range st.Nodes {
					args = append(args, n.Node)
				}
			}
			var done []*api.RotateReply
			var errs []error
			for _, node := range args {
				if !pki.ValidName(node) {
					return usageError{fmt.Errorf("%q is no node name", node)}
				}
				rep, err := cl.Rotate(cmd.Context(), node)
				if err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", node, err))
					continue
				}
				done = append(done, rep)
				if !f.json {
					say(cmd.OutOrStdout(), "%s has a new key; its certificate lives until %s.", rep.Node, stamp(rep.Expires))
				}
			}
			if f.json {
				errs = append(errs, printJSON(cmd.OutOrStdout(), done))
			}
			return errors.Join(errs...)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all nodes, one after the other")
	return c
}

func clusterRemove(f *clientFlags) *cobra.Command {
	var reason string
	var drain time.Duration
	c := &cobra.Command{
		Use: "remove NODE --reason TEXT", Short: "Take a node out of the cluster", Args: exactArgs("NODE"),
		Long: `Takes a node out of the cluster for good. A voter is replaced first, if a
healthy node may take its place; a leader hands over first. The node's sessions
go on for --drain and are ended; then it stops, and no other node accepts its
certificate. Its name is not used again.`,
		Example: `  sallyport cluster remove n3 --reason "hardware replaced"
  sallyport cluster remove n3 --reason "compromised" --drain 0s`,
		RunE: func(cmd *cobra.Command, args []string) error {
			return removeNode(cmd, f, args[0], reason, drain)
		},
	}
	reasonFlag(c, &reason)
	drainFlag(c, &drain)
	return c
}

func clusterLeave(f *clientFlags) *cobra.Command {
	var reason, dir string
	var drain time.Duration
	c := &cobra.Command{
		Use: "leave --data-dir DIR --reason TEXT", Short: "Take this machine's node out of its cluster", Args: noArgs,
		Long:    `Does what "cluster remove" does, with the node whose data directory is given.`,
		Example: `  sallyport cluster leave --data-dir /var/lib/sallyport --reason "machine retired"`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(dir)
			if err != nil {
				return err
			}
			return removeNode(cmd, f, cfg.Name, reason, drain)
		},
	}
	c.Flags().StringVar(&dir, "data-dir", "", "the node's data directory (required)")
	_ = c.MarkFlagRequired("data-dir")
	reasonFlag(c, &reason)
	drainFlag(c, &drain)
	return c
}

func drainFlag(c *cobra.Command, drain *time.Duration) {
	c.Flags().DurationVar(drain, "drain", 5*time.Second, "how long the node's sessions may go on, at most 1m")
}

func removeNode(cmd *cobra.Command, f *clientFlags, name, reason string, drain time.Duration) error {
	if !pki.ValidName(name) {
		return usageError{fmt.Errorf("%q is no node name", name)}
	}
	cl, err := f.client()
	if err != nil {
		return err
	}
	rep, err := cl.RemoveNode(cmd.Context(), name, reason, drain)
	if err != nil {
		return err
	}
	if f.json {
		return printJSON(cmd.OutOrStdout(), rep)
	}
	if !rep.Stopped {
		say(cmd.OutOrStdout(), "%s is no member any more. It could not be told (%s): if it still runs, its sessions end when it has missed the leader for too long: stop it.", name, rep.Detail)
		return nil
	}
	say(cmd.OutOrStdout(), "%s has ended its sessions and stopped, and is no member any more.", name)
	return nil
}

func clusterMembers(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "members", Short: "List all nodes with their parts in the cluster", Args: noArgs,
		Long: `Lists each node with its role (what its certificate allows), its part now
(leader, follower, or subscriber: fed by the node named), zone, version, health,
and how many events it lacks.`,
		Example: `  sallyport cluster members
  sallyport cluster members --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := f.client()
			if err != nil {
				return err
			}
			m, err := cl.Members(cmd.Context())
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), m)
			}
			say(cmd.OutOrStdout(), "Cluster %s, %d voters wanted.", m.Cluster, m.Voters)
			var rows [][]string
			for _, n := range m.Members {
				row := []string{n.Name, n.Addr, n.Role, n.Zone, "no", "?", "", "no", "", n.Error}
				if n.Voter {
					row[4] = "yes"
				}
				if h := n.Health; h != nil {
					row[5], row[6], row[8] = h.State, h.Version, fmt.Sprint(n.Lag)
					if h.Source != "" {
						row[9] = "fed by " + h.Source
					}
				}
				if n.Healthy {
					row[7] = "yes"
				}
				rows = append(rows, row)
			}
			table(cmd.OutOrStdout(), "NODE ADDRESS ROLE ZONE VOTER PART VERSION HEALTHY LAG NOTES", rows)
			return nil
		},
	}
}

func clusterVoters(f *clientFlags) *cobra.Command {
	return &cobra.Command{
		Use: "voters 3|5", Short: "Say how many nodes are to have a vote", Args: exactArgs("3|5"),
		Long: `The leader gives votes to that many nodes whose role is voter, spread over
zones, and replaces those that die by others that are well. With 3, one may fail
at a time, with 5, two. The rest follow and serve sessions all the same.`,
		Example: "  sallyport cluster voters 5",
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[0])
			if err != nil || n != 3 && n != 5 {
				return usageError{fmt.Errorf("%q: want 3 or 5", args[0])}
			}
			cl, err := f.client()
			if err != nil {
				return err
			}
			rep, err := cl.SetVoters(cmd.Context(), n)
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(cmd.OutOrStdout(), rep)
			}
			say(cmd.OutOrStdout(), "%d nodes are to have a vote; `sallyport cluster members` shows which.", n)
			return nil
		},
	}
}

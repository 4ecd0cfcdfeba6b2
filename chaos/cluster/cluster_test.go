package cluster

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/sallyport/sallyport/node/bundle"
	"github.com/sallyport/sallyport/node/devissuer"
	"github.com/sallyport/sallyport/protocols/protocoltest/pgserver"
)

const childVar = "CLUSTER_TEST_CHILD"

// TestMain plays the process that is killed in TestNothingOutlivesTheStarter.
func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		if err := playStarter(); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		select {}
	}
	os.Exit(m.Run())
}

// playStarter starts two long sleeps as if they were nodes; the first ends.
func playStarter() error {
	dir, err := os.MkdirTemp("", "sallyport-cluster-")
	if err != nil {
		return err
	}
	c := &Cluster{Dir: dir, Binary: "/bin/sleep"}
	if c.undertake, err = newUndertaker(dir); err != nil {
		return err
	}
	gone, err := c.spawn(dir+"/gone.log", "600")
	if err != nil {
		return err
	}
	left, err := c.spawn(dir+"/left.log", "600")
	if err != nil {
		return err
	}
	gone.Kill()
	fmt.Println(left.cmd.Process.Pid, dir)
	return nil
}

func TestNothingOutlivesTheStarter(t *testing.T) {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childVar+"=1")
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	child.Process.Kill()
	child.Wait()
	var pid int
	var dir string
	if n, _ := fmt.Sscan(line, &pid, &dir); n != 2 {
		t.Fatalf("the child said %q", line)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, dirErr := os.Stat(dir)
		cmdline, procErr := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		// An orphan that init has not reaped yet has no command line any more.
		if errors.Is(dirErr, fs.ErrNotExist) && (procErr != nil || len(cmdline) == 0) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: process %d (%q), directory %s (%v)", pid, cmdline, dir, dirErr)
		}
	}
}

func TestDefaultFilesAreValid(t *testing.T) {
	issuer, err := devissuer.Create(t.TempDir(), "127.0.0.1:8443")
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(issuer.CAPath())
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{issuer: issuer, PG: &pgserver.Server{Addr: "127.0.0.1:5432", CAPEM: ca}}
	dir := fstest.MapFS{}
	for name, content := range c.defaultFiles(ca) {
		dir[name] = &fstest.MapFile{Data: []byte(content)}
	}
	env := map[string]string{"TARGET_PASSWORD": AdminPassword}
	b, _, problems := bundle.Load(dir, bundle.LoadOptions{Dev: true, Getenv: func(k string) string { return env[k] }})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if b.Targets[TargetName] == nil || len(b.Providers) != 2 {
		t.Fatalf("targets %v, providers %v", b.Targets, b.Providers)
	}
}

func TestFillPostgres(t *testing.T) {
	s := pgserver.Shared(t)
	if err := fillPostgres(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	// The administrative account can log in.
	conn, err := pgx.Connect(t.Context(), s.DSNFor(adminUser, AdminPassword, "shop"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close(t.Context())
}

func TestCPU(t *testing.T) {
	before, err := CPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); {
		_ = time.Now().String()
	}
	after, err := CPU(os.Getpid())
	if err != nil || after-before < 30*time.Millisecond || after-before > 30*time.Second {
		t.Fatalf("used %v, %v", after-before, err)
	}
}

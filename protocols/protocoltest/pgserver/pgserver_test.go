package pgserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const childVar = "PGSERVER_TEST_CHILD"

// TestMain plays the process that is killed in TestEndsWithItsStarter.
func TestMain(m *testing.M) {
	if os.Getenv(childVar) != "" {
		s, err := Run(context.Background(), Options{})
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println(s.Addr, s.dir)
		select {}
	}
	code := m.Run()
	Stop()
	os.Exit(code)
}

func TestOnlyTLSAndSCRAM(t *testing.T) {
	s := Shared(t)
	ctx := context.Background()
	var ssl bool
	var stored string
	conn := s.Conn(t, "postgres")
	if err := conn.QueryRow(ctx, "select ssl from pg_stat_ssl where pid = pg_backend_pid()").Scan(&ssl); err != nil || !ssl {
		t.Fatalf("ssl %v, %v", ssl, err)
	}
	if err := conn.QueryRow(ctx, "select rolpassword from pg_authid where rolname = 'postgres'").Scan(&stored); err != nil || !strings.HasPrefix(stored, "SCRAM-SHA-256$") {
		t.Fatalf("password stored as %q, %v", stored, err)
	}
	for name, dsn := range map[string]string{
		"plaintext":      strings.Replace(s.DSN("postgres"), "verify-full", "disable", 1),
		"wrong password": s.DSNFor("postgres", "nonsense", "postgres"),
	} {
		if c, err := pgx.Connect(ctx, dsn); err == nil {
			c.Close(ctx)
			t.Errorf("%s was let in", name)
		} else if pe := (*pgconn.PgError)(nil); !errors.As(err, &pe) || pe.Code[:2] != "28" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDatabasesAreApart(t *testing.T) {
	s := Shared(t)
	a, b := s.CreateDatabase(t), s.CreateDatabase(t)
	s.MustExec(t, a, "create table only_here (i int)")
	if err := s.Exec(context.Background(), b, "select from only_here"); err == nil {
		t.Fatal("the table is in both databases")
	}
}

func TestPSQL(t *testing.T) {
	s := Shared(t)
	out, err := exec.Command(PSQL(t), "-X", "-At", "-c", "select 6*7", s.DSN("postgres")).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "42" {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestOptions(t *testing.T) {
	s := Start(t, LogStatements(), Durable(), WithSetting("work_mem", "7MB"), WithHBA("host all all 127.0.0.1/32 scram-sha-256"))
	conn, err := pgx.Connect(t.Context(), strings.Replace(s.DSN("postgres"), "verify-full", "disable", 1))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for setting, want := range map[string]string{"work_mem": "7MB", "fsync": "on"} {
		var got string
		if err := conn.QueryRow(t.Context(), "show "+setting).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, want %q (%v)", setting, got, want, err)
		}
	}
	if _, err := conn.Exec(t.Context(), "select 'find me'"); err != nil {
		t.Fatal(err)
	}
	if log, err := s.Log(); err != nil || !strings.Contains(log, "select 'find me'") {
		t.Errorf("statement not in the log: %v\n%s", err, log)
	}
}

func TestBadSettingIsExplained(t *testing.T) {
	_, err := Run(t.Context(), Options{Settings: map[string]string{"no_such_setting": "1"}})
	if err == nil || !strings.Contains(err.Error(), "no_such_setting") {
		t.Fatal(err)
	}
}

func TestEndsWithItsStarter(t *testing.T) {
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
	child.Process.Kill() // SIGKILL
	child.Wait()
	var addr, dir string
	if n, _ := fmt.Sscan(line, &addr, &dir); n != 2 {
		t.Fatalf("the child said %q", line)
	}
	if !strings.HasPrefix(filepath.Base(dir), "sallyport-pg-") {
		t.Fatalf("unexpected directory %q", dir)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			return // removed last of all
		}
		if time.Now().After(end) {
			t.Fatalf("server at %s still there 20 s after its starter was killed", addr)
		}
	}
}

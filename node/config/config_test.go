package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	c := &Config{Name: "n1", Addr: "gw.example.com:7443", DataDir: dir}
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	if err := c.Save(); err == nil {
		t.Fatal("an existing node.yaml was overwritten")
	}
	got, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got.Listen != c.Addr || got.Recordings != filepath.Join(dir, "recordings") || got.SegmentAge != 5*time.Second || got.Dev {
		t.Fatalf("defaults: %+v", got)
	}
}

func TestLoadRefuses(t *testing.T) {
	if _, err := Load(t.TempDir()); err == nil || !strings.Contains(err.Error(), "cluster init") {
		t.Fatalf("an empty directory: %v", err)
	}
	good := "name: n1\naddr: 127.0.0.1:7443\n"
	for name, c := range map[string]struct{ yaml, want string }{
		"unknown field":    {good + "colour: red\n", "colour"},
		"bad name":         {"name: N_1\naddr: 127.0.0.1:7443\n", "name"},
		"no port":          {"name: n1\naddr: 127.0.0.1\n", "addr"},
		"no host":          {"name: n1\naddr: :7443\n", "addr"},
		"port 0":           {"name: n1\naddr: 127.0.0.1:0\n", "addr"},
		"small spool":      {good + "spoolBytes: 100\n", "spoolBytes"},
		"slow segments":    {good + "segmentAge: 1h\n", "segmentAge"},
		"relative log":     {good + "walDir: wal\n", "walDir"},
		"one disk twice":   {good + "walDir: /wal\nwalFailoverDir: /wal\n", "walFailoverDir"},
		"hasty heartbeats": {good + "heartbeatTimeout: 1ms\n", "heartbeatTimeout"},
		"a third gate":     {good + "kernelGate: ajar\n", "kernelGate"},
		"no connections":   {good + "maxConnections: -1\n", "maxConnections"},
		"not YAML":         {"name: [\n", "node.yaml"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, FileName), []byte(c.yaml), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
	}
}

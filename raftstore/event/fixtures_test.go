package event

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("rewrite", false, "write the fixtures of new types and versions, and how this build reads the old ones")

// A fixture is an event as a node stored it, and what this build reads in it:
//
//	testdata/fixtures/TYPE.vN.envelope  hex; never changed once a release has it
//	testdata/fixtures/TYPE.vN.json      the payload as the newest version's struct
func fixture(typ string, version uint32, ext string) string {
	return filepath.Join("testdata", "fixtures", fmt.Sprintf("%s.v%d.%s", typ, version, ext))
}

// Every version of every type that was ever stored is still read, and read as
// it was read before.
func TestFixtures(t *testing.T) {
	want := map[string]bool{}
	for _, typ := range Types() {
		for v := uint32(1); v <= Newest(typ); v++ {
			t.Run(fmt.Sprintf("%s.v%d", typ, v), func(t *testing.T) { checkFixture(t, typ, v) })
			want[filepath.Base(fixture(typ, v, "envelope"))] = true
			want[filepath.Base(fixture(typ, v, "json"))] = true
		}
	}
	files, err := os.ReadDir(filepath.Join("testdata", "fixtures"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !want[f.Name()] {
			t.Errorf("%s: its type or version is gone from the registry, and events of it may be stored", f.Name())
		}
	}
}

func checkFixture(t *testing.T, typ string, version uint32) {
	name := fixture(typ, version, "envelope")
	stored, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && *rewrite && version == Newest(typ) {
		stored = writeEnvelope(t, typ, version)
	} else if err != nil {
		t.Fatalf("%v\nan event of each type and version is kept for ever: `go test ./raftstore/event -rewrite` makes those of the newest", err)
	}
	envelope, err := hex.DecodeString(strings.TrimSpace(string(stored)))
	if err != nil {
		t.Fatal(err)
	}
	e, err := UnmarshalEnvelope(envelope)
	if err != nil || e.Type != typ || e.Version != version {
		t.Fatalf("%s holds %s version %d, %v", name, e.Type, e.Version, err)
	}
	raw, err := e.Proposal.Marshal()
	if err != nil || !bytes.Equal(MarshalEnvelope(&e, raw), envelope) {
		t.Fatalf("a second encoding differs (%v)", err)
	}
	p, err := DecodeAny(e)
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(p, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *rewrite {
		if err := os.WriteFile(fixture(typ, version, "json"), got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	read, err := os.ReadFile(fixture(typ, version, "json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, read) {
		t.Errorf("read as\n%s\nwant\n%s", got, read)
	}
	// A field that the newest fixture lacks is a field that other builds, which
	// know this version, would not see.
	if version == Newest(typ) {
		full := kinds[typ].newPayload()
		fill(reflect.ValueOf(full).Elem(), 0)
		if have, want := paths(t, e.Payload), paths(t, mustMarshal(t, full)); !slices.Equal(have, want) {
			t.Errorf("fields stored in version %d: %v\nfields of %T: %v\na stored version never changes: another field is another version (see registry.go)", version, have, full, want)
		}
	}
}

func writeEnvelope(t *testing.T, typ string, version uint32) []byte {
	p := kinds[typ].newPayload()
	fill(reflect.ValueOf(p).Elem(), 0)
	e := Event{
		Proposal: Proposal{
			ID: ID{byte(version), 0xf1}, Type: typ, Version: version, Aggregate: "fixture/" + typ, Expect: Any, Payload: mustMarshal(t, p),
			Actor: Actor{Principal: "ci/fixture", Kind: Service, Authn: "oidc", Source: "192.0.2.1", Via: "n1"},
		},
		Seq: 1, Index: 3, Term: 2, Time: time.Unix(1700000000, 1).UTC(), AggregateVersion: 1,
	}
	raw, err := e.Proposal.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	stored := []byte(hex.EncodeToString(MarshalEnvelope(&e, raw)) + "\n")
	name := fixture(typ, version, "envelope")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, stored, 0o644); err != nil {
		t.Fatal(err)
	}
	return stored
}

// fill gives every field a value that is not zero.
func fill(v reflect.Value, depth int) {
	if depth > 8 {
		return
	}
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)))
		return
	case time.Duration:
		v.SetInt(int64(time.Minute))
		return
	case ID:
		v.Set(reflect.ValueOf(ID{1}))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(v.Field(i), depth+1)
			}
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), depth+1)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), depth+1)
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), depth+1)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(k, depth+1)
		fill(e, depth+1)
		v.SetMapIndex(k, e)
	case reflect.Interface:
		v.Set(reflect.ValueOf("any"))
	case reflect.String:
		v.SetString("text")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(7)
	case reflect.Float32, reflect.Float64:
		v.SetFloat(0.5)
	default:
		panic(fmt.Sprintf("fill: a payload holds a %v", v.Type()))
	}
}

// paths lists the fields of a JSON value, sorted.
func paths(t *testing.T, data []byte) []string {
	t.Helper()
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	var walk func(prefix string, v any)
	walk = func(prefix string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, inner := range v {
				all[prefix+k] = true
				walk(prefix+k+".", inner)
			}
		case []any:
			for _, inner := range v {
				walk(prefix, inner)
			}
		}
	}
	walk("", v)
	out := make([]string, 0, len(all))
	for k := range all {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func mustMarshal(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Levels never fall from version to version, none is above this build's, and
// what a version adds is optional and exists.
func TestRegistry(t *testing.T) {
	for _, typ := range Types() {
		k := kinds[typ]
		empty, full := paths(t, mustMarshal(t, k.newPayload())), k.newPayload()
		fill(reflect.ValueOf(full).Elem(), 0)
		all := paths(t, mustMarshal(t, full))
		last := uint32(BaseLevel)
		for i, s := range k.versions {
			if s.level < last || s.level > Level {
				t.Errorf("%s version %d: level %d after %d, this build has %d", typ, i+1, s.level, last, Level)
			}
			last = s.level
			if i == 0 && (s.up != nil || s.added != nil) || i > 0 && (s.up == nil) == (len(s.added) == 0) {
				t.Errorf("%s version %d: neither an upcaster nor added fields, or both", typ, i+1)
			}
			for _, p := range s.added {
				if !slices.Contains(all, p) || slices.Contains(empty, p) {
					t.Errorf("%s version %d adds %q, which is no field or lacks omitempty", typ, i+1, p)
				}
			}
		}
	}
}

type thing struct {
	Name  string `json:"name"`
	Parts []struct {
		Zone string `json:"zone,omitempty"`
	} `json:"parts,omitempty"`
	Size int `json:"size"`
}

// with adds a type for one test.
func with(t *testing.T, typ string, k *kind) {
	kinds[typ] = k
	t.Cleanup(func() { delete(kinds, typ) })
}

func TestEncode(t *testing.T) {
	with(t, "thing", of[thing](1).
		then(2, func(b []byte) ([]byte, error) { return bytes.Replace(b, []byte(`"title"`), []byte(`"name"`), 1), nil }).
		adds(3, "parts.zone").
		adds(4, "parts"))
	plain := thing{Name: "a", Size: 1}
	zoned := plain
	zoned.Parts = append(zoned.Parts, struct {
		Zone string `json:"zone,omitempty"`
	}{"z"})
	for _, c := range []struct {
		level   uint32
		payload thing
		version uint32
		needs   uint32
	}{
		{5, zoned, 4, 0},
		{4, plain, 4, 0},
		{3, plain, 3, 0},
		{3, zoned, 0, 4},
		{2, plain, 2, 0},
		{1, plain, 0, 2}, // an older version that does not mean the same is not chosen
	} {
		v, data, err := Encode(c.level, "thing", c.payload)
		var le *LevelError
		if errors.As(err, &le); (le == nil) != (c.needs == 0) || le != nil && (le.Needs != c.needs || le.Have != c.level) {
			t.Errorf("level %d: %v, want it to need %d", c.level, err, c.needs)
			continue
		}
		if v != c.version {
			t.Errorf("level %d: version %d, want %d", c.level, v, c.version)
		}
		if le != nil {
			continue
		}
		got, err := Decode[thing](Event{Proposal: Proposal{Type: "thing", Version: v, Payload: data}})
		if err != nil || !reflect.DeepEqual(got, c.payload) {
			t.Errorf("level %d: %+v, %v", c.level, got, err)
		}
	}
	old := Event{Proposal: Proposal{Type: "thing", Version: 1, Payload: []byte(`{"title":"x","size":2}`)}}
	if got, err := Decode[thing](old); err != nil || got.Name != "x" || string(old.Payload) != `{"title":"x","size":2}` {
		t.Errorf("an upcast event: %+v, %v; stored %s", got, err, old.Payload)
	}
	if _, err := Decode[Revoked](old); err == nil {
		t.Error("a payload was read as another type's")
	}
	old.Version = 5
	if _, err := Decode[thing](old); !errors.Is(err, ErrUnknownType) {
		t.Errorf("a version of the future: %v", err)
	}
	if _, _, err := Encode(9, "no.such", plain); !errors.Is(err, ErrUnknownType) {
		t.Errorf("an unknown type: %v", err)
	}
}

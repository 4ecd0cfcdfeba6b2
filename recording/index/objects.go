package index

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/columnar"
	"github.com/sallyport/sallyport/recording/replay"
)

// Root is what the keys of the index begin with.
//
//	index/YYYY/MM/DD/node.NODE.TIME.RANDOM.parquet  rows that a node made
//	index/YYYY/MM/DD/day.GENERATION.PART.parquet    rows of the whole day, by `recordings index`
//
// All are written once. A generation has every row of those before it and of
// the nodes' files that it names; it counts when all its parts are there.
const Root = "index/"

const (
	metaKey     = "sallyport.index"
	metaVersion = 1
	// partRows and partBytes bound a part: it has to fit an object of the store,
	// and a reader's limits.
	partRows  = 40_000
	partBytes = 24 << 20
	// maxFiles of one day are read: what 35 nodes write that add a file every
	// five minutes and that nobody puts together.
	maxFiles = 10_000
	// maxIndexBytes of one day are read: some millions of rows.
	maxIndexBytes = 4 << 30
)

// limits of one file. A row is some 30 values and seldom more than 1 KiB.
var limits = columnar.Limits{Rows: 200_000, Values: 16 << 20, Bytes: 256 << 20}

// meta is what a file says of itself.
type meta struct {
	Version    int      `json:"version"`
	Day        string   `json:"day"`
	Parts      int      `json:"parts,omitempty"`      // of this generation
	Supersedes []string `json:"supersedes,omitempty"` // names of files of the same day
}

// file is a file of the index in a listing.
type file struct {
	store recording.Store
	key   string
	name  string
	size  int64
	gen   int // 0: a node's
	part  int
}

// dayPrefix of "2026/11/28" is "index/2026/11/28/".
func dayPrefix(day string) string { return Root + day + "/" }

// files lists a day's. Names that are not ours are ignored.
func files(ctx context.Context, stores []recording.Store, day string) ([]file, error) {
	var out []file
	for _, st := range stores {
		err := st.List(ctx, dayPrefix(day), "", func(o recording.Object) error {
			f := file{store: st, key: o.Key, name: strings.TrimPrefix(o.Key, dayPrefix(day)), size: o.Size}
			part := strings.Split(strings.TrimSuffix(f.name, ".parquet"), ".")
			switch {
			case !strings.HasSuffix(f.name, ".parquet"):
				return nil
			case part[0] == "node" && len(part) >= 4:
			case part[0] == "day" && len(part) == 3:
				var err1, err2 error
				f.gen, err1 = strconv.Atoi(part[1])
				f.part, err2 = strconv.Atoi(part[2])
				if err1 != nil || err2 != nil || f.gen <= 0 || f.part <= 0 || f.name != dayName(f.gen, f.part) {
					return nil
				}
			default:
				return nil
			}
			if len(out) == maxFiles {
				return recording.ErrStop
			}
			out = append(out, f)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func dayName(gen, part int) string { return fmt.Sprintf("day.%06d.%04d.parquet", gen, part) }

// BadFile is a file of the index that cannot be used; what it covered is read.
type BadFile struct {
	Key string `json:"key"`
	Why string `json:"why"`
}

// a dayIndex is what is read of one day's index.
type dayIndex struct {
	newest int      // generation, that there are files of
	names  []string // of the files that were read
	nodes  []string // of all nodes' files, those in no use too
	loose  int      // of them, files that no generation in use names
	bad    []BadFile
	bytes  int64
}

// load calls fn with the rows of a day: those of its newest generation that is
// complete, and of the files that this one does not name. fn may get several
// rows of one recording, and rows of recordings that there are not. A file of
// which some rows were taken can turn out bad.
func load(ctx context.Context, stores []recording.Store, day string, fn func(*Row)) (*dayIndex, error) {
	fs, err := files(ctx, stores, day)
	if err != nil {
		return nil, err
	}
	d := &dayIndex{}
	gens := map[int][]file{}
	var order []int
	var loose []file
	for _, f := range fs {
		if f.gen == 0 {
			loose = append(loose, f)
			continue
		}
		if gens[f.gen] == nil {
			order = append(order, f.gen)
		}
		gens[f.gen] = append(gens[f.gen], f)
		d.newest = max(d.newest, f.gen)
	}
	slices.Sort(order)
	superseded := map[string]bool{}
	for _, g := range slices.Backward(order) {
		m, err := d.generation(ctx, day, gens[g], fn)
		if err != nil {
			return nil, err
		}
		if m != nil {
			for _, n := range m.Supersedes {
				superseded[n] = true
			}
			break
		}
	}
	for _, f := range loose {
		d.nodes = append(d.nodes, f.name)
		if superseded[f.name] {
			continue
		}
		d.loose++
		if _, err := d.read(ctx, day, f, fn); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// generation reads one; nil when it is not complete. A part that turns out bad
// leaves recordings that are not covered.
func (d *dayIndex) generation(ctx context.Context, day string, files []file, fn func(*Row)) (*meta, error) {
	parts := map[int]file{}
	for _, f := range files {
		parts[f.part] = f // the same in two stores, or one of them is as good
	}
	b, m, err := d.get(ctx, day, parts[1])
	if err != nil || b == nil {
		return nil, err
	}
	for p := 1; p <= m.Parts; p++ {
		if _, ok := parts[p]; !ok {
			d.bad = append(d.bad, BadFile{files[0].key, fmt.Sprintf("part %d of its generation is not there", p)})
			return nil, nil
		}
	}
	d.rows(b, parts[1], day, fn)
	for p := 2; p <= m.Parts; p++ {
		if _, err := d.read(ctx, day, parts[p], fn); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// read passes on the rows of a file.
func (d *dayIndex) read(ctx context.Context, day string, f file, fn func(*Row)) (*meta, error) {
	b, m, err := d.get(ctx, day, f)
	if b != nil {
		d.rows(b, f, day, fn)
	}
	return m, err
}

// get reads a file and what it says of itself; nil without an error when it
// cannot be used.
func (d *dayIndex) get(ctx context.Context, day string, f file) ([]byte, *meta, error) {
	refuse := func(err error) ([]byte, *meta, error) {
		d.bad = append(d.bad, BadFile{f.key, err.Error()})
		return nil, nil, nil
	}
	if f.store == nil {
		return refuse(errors.New("it is not there"))
	}
	if d.bytes += f.size; d.bytes > maxIndexBytes {
		return refuse(fmt.Errorf("more than %d bytes of index for one day", int64(maxIndexBytes)))
	}
	b, err := f.store.Get(ctx, f.key)
	if errors.Is(err, recording.ErrTooLarge) || errors.Is(err, recording.ErrNotFound) {
		return refuse(err)
	}
	if err != nil {
		return nil, nil, err
	}
	kv, err := columnar.Meta[Row](b, limits)
	if err != nil {
		return refuse(err)
	}
	m := &meta{}
	if err := json.Unmarshal([]byte(kv[metaKey]), m); err != nil {
		return refuse(errors.New("it does not say what it is"))
	}
	if m.Version != metaVersion || m.Day != day || m.Parts < 0 || m.Parts > maxFiles {
		return refuse(fmt.Errorf("it is version %d for %s", m.Version, m.Day))
	}
	d.names = append(d.names, f.name)
	return b, m, nil
}

func (d *dayIndex) rows(b []byte, f file, day string, fn func(*Row)) {
	err := columnar.Read(b, limits, func(r *Row) error {
		if strings.HasPrefix(r.Name, day+"/") {
			fn(r)
		}
		return nil
	})
	if err != nil {
		d.bad = append(d.bad, BadFile{f.key, err.Error()})
	}
}

// encode makes a file of rows, which must be of one day and in order.
func encode(day string, m meta, rows []Row) ([]byte, error) {
	m.Version, m.Day = metaVersion, day
	j, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := columnar.NewWriter[Row](&b, map[string]string{metaKey: string(j)})
	if err := errors.Join(w.Write(rows...), w.Close()); err != nil {
		return nil, fmt.Errorf("recording: index: %w", err)
	}
	if b.Len() > recording.MaxObjectBytes {
		return nil, fmt.Errorf("recording: index: %d rows are %d bytes", len(rows), b.Len())
	}
	return b.Bytes(), nil
}

// split cuts rows into parts that fit an object each.
func split(rows []Row) [][]Row {
	var out [][]Row
	from, size := 0, 0
	for i := range rows {
		n := rows[i].size()
		if i-from == partRows || i > from && size+n > partBytes {
			out = append(out, rows[from:i])
			from, size = i, 0
		}
		size += n
	}
	return append(out, rows[from:])
}

// size is about what the row takes in a file, uncompressed.
func (r *Row) size() int {
	n := 300 + len(r.Trigrams)
	for _, set := range [][]string{r.Claims, r.Actions, r.Resources, r.Decisions, r.Rules, r.Actors} {
		for _, s := range set {
			n += len(s) + 8
		}
	}
	return n
}

// covers says that the row was made from what the listing shows.
func covers(r *Row, i replay.Item) bool {
	return int(r.Objects) == i.Objects() && r.Bytes == i.Bytes()
}

// putTimeout ends a request that hangs.
const putTimeout = 2 * time.Minute

// put writes a file and makes sure that it is there.
func put(ctx context.Context, store recording.Store, key string, b []byte) error {
	ctx, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	if err := store.Put(ctx, key, b); err != nil {
		return fmt.Errorf("recording: index: %s: %w", key, err)
	}
	return nil
}

// Package columnar writes and reads Parquet files: the index of recordings and
// what is exported for other tools. It is the one home of the Parquet library.
//
// Files that are read come from a store that others can write to. The library
// believes what a file says of its own sizes, and of a page that says it has
// fewer values than it has it hands out memory that it does not own. So it
// writes files and decodes their footers; Read looks at every length, count and
// page first (check.go), refuses what could cost more memory than its Limits
// allow, and decodes values itself (decode.go). It reads what Writer writes: plain
// values in version 1 pages compressed with Snappy, without dictionaries, whose
// few bytes can stand for any number of long values.
package columnar

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"sync"

	"github.com/parquet-go/parquet-go"
	"github.com/parquet-go/parquet-go/encoding/thrift"
	"github.com/parquet-go/parquet-go/format"
)

// ErrRefused is wrapped by every error that says that bytes are not a file
// that Read takes.
var ErrRefused = errors.New("not a usable Parquet file")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, args...))
}

// rowGroup is how many rows are written together. A Writer holds that many.
const rowGroup = 5000

// pageBytes bounds a page that is written, but for single longer values.
const pageBytes = 256 << 10

// Writer writes rows of T, a struct with `parquet` tags.
type Writer[T any] struct {
	w *parquet.GenericWriter[T]
}

// NewWriter returns a Writer to w. meta is kept in the file beside the rows.
func NewWriter[T any](w io.Writer, meta map[string]string) *Writer[T] {
	o := []parquet.WriterOption{
		parquet.Compression(&parquet.Snappy),
		parquet.DefaultEncoding(&parquet.Plain),
		parquet.DataPageVersion(1),
		parquet.MaxRowsPerRowGroup(rowGroup),
		parquet.PageBufferSize(pageBytes),
		parquet.CreatedBy("sallyport", "1", ""),
		// Statistics hold the least and the greatest value of each page, whole and
		// several times: with values of some kilobytes most of the file, in places
		// where readers rightly expect little.
		parquet.DataPageStatistics(false),
	}
	var zero T
	for _, path := range parquet.SchemaOf(zero).Columns() {
		o = append(o, parquet.SkipPageBounds(path...))
	}
	for _, k := range slices.Sorted(maps.Keys(meta)) {
		o = append(o, parquet.KeyValueMetadata(k, meta[k]))
	}
	return &Writer[T]{parquet.NewGenericWriter[T](w, o...)}
}

// Write appends rows.
func (w *Writer[T]) Write(rows ...T) error {
	_, err := w.w.Write(rows)
	return err
}

// Close completes the file. It does not close what it is written to.
func (w *Writer[T]) Close() error { return w.w.Close() }

// Limits bound what one file may cost to read.
type Limits struct {
	Rows   int64 // rows
	Values int64 // values of all columns together, those of lists each
	Bytes  int64 // of all pages, decompressed
}

// Read calls fn with each row of the file in b, in order, until fn returns an
// error, which it returns. A row's slices and strings may be kept. Errors about
// the file wrap ErrRefused; fn may have had rows of it before. T's fields are
// strings, bytes, int32, int64, bool, and lists of strings.
func Read[T any](b []byte, l Limits, fn func(*T) error) error {
	m, err := metadata[T](b, l)
	if err != nil {
		return err
	}
	for i := range m.RowGroups {
		rows := make([]T, m.RowGroups[i].NumRows)
		at := reflect.ValueOf(rows)
		for c := range m.RowGroups[i].Columns {
			if err := readColumn(b, &m.RowGroups[i].Columns[c].MetaData, at, c); err != nil {
				return err
			}
		}
		for r := range rows {
			if err := fn(&rows[r]); err != nil {
				return err
			}
		}
	}
	return nil
}

// Meta returns what the file in b keeps beside its rows of T.
func Meta[T any](b []byte, l Limits) (map[string]string, error) {
	m, err := metadata[T](b, l)
	if err != nil {
		return nil, err
	}
	meta := map[string]string{}
	for _, kv := range m.KeyValueMetadata {
		meta[kv.Key] = kv.Value
	}
	return meta, nil
}

// metadata reads and checks what the file says of itself.
func metadata[T any](b []byte, l Limits) (*format.FileMetaData, error) {
	footer, err := checkFooter(b)
	if err != nil {
		return nil, err
	}
	m, err := decodeFooter(footer)
	if err != nil {
		return nil, err
	}
	want, err := schemaOf[T]()
	if err != nil {
		return nil, err
	}
	if !reflect.DeepEqual(m.Schema, want) {
		return nil, refuse("its columns are others")
	}
	return m, checkPages(b, m, l, reflect.TypeFor[T]().NumField())
}

func decodeFooter(footer []byte) (m *format.FileMetaData, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = refuse("%v", p)
		}
	}()
	m = &format.FileMetaData{}
	if err := thrift.Unmarshal(&thrift.CompactProtocol{}, footer, m); err != nil {
		return nil, refuse("%v", err)
	}
	return m, nil
}

var schemas sync.Map // of reflect.Type: the schema of its files

// schemaOf returns the schema of a file of T: that of one without rows.
func schemaOf[T any]() (any, error) {
	typ := reflect.TypeFor[T]()
	if s, ok := schemas.Load(typ); ok {
		return s, nil
	}
	var b bytes.Buffer
	if err := NewWriter[T](&b, nil).Close(); err != nil {
		return nil, err
	}
	footer, err := checkFooter(b.Bytes())
	if err != nil {
		return nil, err
	}
	m, err := decodeFooter(footer)
	if err != nil {
		return nil, err
	}
	schemas.Store(typ, m.Schema)
	return m.Schema, nil
}

// Flush writes the rows so far as a row group.
func (w *Writer[T]) Flush() error { return w.w.Flush() }

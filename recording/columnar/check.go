package columnar

import (
	"encoding/binary"

	"github.com/klauspost/compress/snappy"
	"github.com/parquet-go/parquet-go/encoding/thrift"
	"github.com/parquet-go/parquet-go/format"
)

const (
	maxFooterBytes = 4 << 20
	maxPageHeader  = 16 << 10 // statistics of a page hold two of its values, cut
	maxPageValues  = 1 << 20
	// maxThriftItems bounds the elements of all lists of one structure: the
	// library makes room for as many as a list says before it reads them. A file
	// of 48 MiB with row groups of 5000 rows has some 10,000.
	maxThriftItems = 1 << 18
	maxThriftDepth = 16
)

// checkFooter returns the footer when it can be decoded in memory in
// proportion to its size.
func checkFooter(b []byte) ([]byte, error) {
	const magic = "PAR1"
	if len(b) < 12 || string(b[:4]) != magic || string(b[len(b)-4:]) != magic {
		return nil, refuse("it has not the marks of one")
	}
	n := int64(binary.LittleEndian.Uint32(b[len(b)-8:]))
	if n > maxFooterBytes || n > int64(len(b)-12) {
		return nil, refuse("a footer of %d bytes", n)
	}
	footer := b[int64(len(b))-8-n : len(b)-8]
	used, err := checkThrift(footer)
	if err != nil {
		return nil, err
	}
	if used != len(footer) {
		return nil, refuse("bytes after its footer's end")
	}
	return footer, nil
}

// checkPages walks the pages of every column, and refuses what is not written by
// Writer or exceeds the limits.
func checkPages(b []byte, m *format.FileMetaData, l Limits, columns int) error {
	if m.NumRows < 0 || m.NumRows > l.Rows {
		return refuse("%d rows; at most %d are read", m.NumRows, l.Rows)
	}
	var rows, values, size int64
	for i := range m.RowGroups {
		g := &m.RowGroups[i]
		if g.NumRows < 0 || g.NumRows > rowGroup || len(g.Columns) != columns {
			return refuse("a row group of %d rows in %d columns", g.NumRows, len(g.Columns))
		}
		rows += g.NumRows
		for j := range g.Columns {
			c := &g.Columns[j].MetaData
			v, s, err := checkColumn(b, c)
			if err != nil {
				return err
			}
			values += v
			size += s
			if values > l.Values || size > l.Bytes {
				return refuse("more than %d values or %d bytes", l.Values, l.Bytes)
			}
		}
	}
	if rows != m.NumRows {
		return refuse("%d rows where it says %d", rows, m.NumRows)
	}
	return nil
}

func checkColumn(b []byte, c *format.ColumnMetaData) (values, size int64, err error) {
	if c.Codec != format.Snappy && c.Codec != format.Uncompressed {
		return 0, 0, refuse("compressed with %v", c.Codec)
	}
	if c.DictionaryPageOffset != 0 {
		return 0, 0, refuse("a dictionary")
	}
	from, n := c.DataPageOffset, c.TotalCompressedSize
	if from < 4 || n < 0 || n > int64(len(b)) || from > int64(len(b))-n {
		return 0, 0, refuse("a column outside of the file")
	}
	err = pages(b[from:from+n], c.Codec, func(h *format.PageHeader, _ []byte) error {
		values += int64(h.DataPageHeader.V.NumValues)
		if size += int64(h.UncompressedPageSize); size > 1<<32 {
			return refuse("a column of %d bytes", size)
		}
		return nil
	})
	return values, size, err
}

// pages calls fn with the pages of a column, still compressed, whose
// decompressed length it has checked against the header's.
func pages(b []byte, codec format.CompressionCodec, fn func(*format.PageHeader, []byte) error) error {
	for len(b) > 0 {
		used, err := checkThrift(b[:min(len(b), maxPageHeader)])
		if err != nil {
			return err
		}
		var h format.PageHeader
		if err := thrift.Unmarshal(&thrift.CompactProtocol{}, b[:used], &h); err != nil {
			return refuse("a page: %v", err)
		}
		b = b[used:]
		d := &h.DataPageHeader
		switch {
		case h.Type != format.DataPage || !d.Valid || h.DictionaryPageHeader.Valid || h.DataPageHeaderV2.Valid:
			return refuse("a page of type %v", h.Type)
		case d.V.Encoding != format.Plain || d.V.DefinitionLevelEncoding != format.RLE || d.V.RepetitionLevelEncoding != format.RLE:
			return refuse("a page in encoding %v", d.V.Encoding)
		case d.V.NumValues < 0 || d.V.NumValues > maxPageValues:
			return refuse("a page of %d values", d.V.NumValues)
		case h.CompressedPageSize < 0 || int64(h.CompressedPageSize) > int64(len(b)) || h.UncompressedPageSize < 0:
			return refuse("a page that ends outside of its column")
		}
		page := b[:h.CompressedPageSize]
		b = b[h.CompressedPageSize:]
		real := len(page)
		if codec == format.Snappy {
			if real, err = snappy.DecodedLen(page); err != nil {
				return refuse("a page: %v", err)
			}
		}
		if real != int(h.UncompressedPageSize) {
			return refuse("a page that does not become as long as it says")
		}
		if err := fn(&h, page); err != nil {
			return err
		}
	}
	return nil
}

// checkThrift returns the length of the structure, in Thrift's compact
// protocol, that b begins with. It refuses what is nested deeply, ends early, or
// has lists of more elements than there are bytes for.
func checkThrift(b []byte) (int, error) {
	w := thriftWalk{b: b, items: maxThriftItems}
	w.structure(0)
	if w.bad {
		return 0, refuse("its description of itself is malformed or too large")
	}
	return w.at, nil
}

type thriftWalk struct {
	b     []byte
	at    int
	items int
	bad   bool
}

func (w *thriftWalk) skip(n uint64) {
	if w.bad || n > uint64(len(w.b)-w.at) {
		w.bad = true
		return
	}
	w.at += int(n)
}

func (w *thriftWalk) byte() byte {
	if w.bad || w.at >= len(w.b) {
		w.bad = true
		return 0
	}
	w.at++
	return w.b[w.at-1]
}

func (w *thriftWalk) uvarint() uint64 {
	v, n := binary.Uvarint(w.b[w.at:])
	if w.bad || n <= 0 {
		w.bad = true
		return 0
	}
	w.at += n
	return v
}

func (w *thriftWalk) structure(depth int) {
	if depth > maxThriftDepth {
		w.bad = true
	}
	for !w.bad {
		head := w.byte()
		if head == 0 || w.bad {
			return
		}
		if head>>4 == 0 {
			w.uvarint() // the field's number
		}
		if typ := head & 15; typ > 2 { // 1 and 2 are true and false
			w.value(typ, depth)
		}
	}
}

// take counts elements against the limit; each takes a byte at least.
func (w *thriftWalk) take(n uint64) int {
	if w.bad || n > uint64(w.items) || n > uint64(len(w.b)-w.at) {
		w.bad = true
		return 0
	}
	w.items -= int(n)
	return int(n)
}

func (w *thriftWalk) value(typ byte, depth int) {
	switch typ {
	case 1, 2, 3: // true, false (in a list), byte
		w.skip(1)
	case 4, 5, 6:
		w.uvarint()
	case 7:
		w.skip(8)
	case 8:
		w.skip(w.uvarint())
	case 9, 10: // list, set
		head := w.byte()
		n := uint64(head >> 4)
		if n == 15 {
			n = w.uvarint()
		}
		for range w.take(n) {
			if w.value(head&15, depth+1); w.bad {
				return
			}
		}
	case 11:
		if n := w.uvarint(); n > 0 {
			types := w.byte()
			for range w.take(n) {
				w.value(types>>4, depth+1)
				if w.value(types&15, depth+1); w.bad {
					return
				}
			}
		}
	case 12:
		w.structure(depth + 1)
	default:
		w.bad = true
	}
}

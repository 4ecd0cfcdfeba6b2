package columnar

import (
	"encoding/binary"
	"reflect"

	"github.com/klauspost/compress/snappy"
	"github.com/parquet-go/parquet-go/format"
)

// readColumn sets field c of every row in rows, a slice of structs, from one
// column of a row group, whose pages checkPages has seen.
func readColumn(b []byte, m *format.ColumnMetaData, rows reflect.Value, c int) error {
	r := columnReader{rows: rows, field: c, row: -1}
	list := rows.Type().Elem().Field(c).Type.Kind() == reflect.Slice && rows.Type().Elem().Field(c).Type.Elem().Kind() == reflect.String
	err := pages(b[m.DataPageOffset:m.DataPageOffset+m.TotalCompressedSize], m.Codec, func(h *format.PageHeader, page []byte) error {
		if m.Codec == format.Snappy {
			var err error
			if page, err = snappy.Decode(make([]byte, 0, h.UncompressedPageSize), page); err != nil {
				return refuse("a page: %v", err)
			}
		}
		if list {
			return r.lists(page, int(h.DataPageHeader.V.NumValues))
		}
		return r.values(page, int(h.DataPageHeader.V.NumValues))
	})
	if err == nil && r.row != rows.Len()-1 {
		err = refuse("a column of %d rows where its row group has %d", r.row+1, rows.Len())
	}
	return err
}

type columnReader struct {
	rows  reflect.Value
	field int
	row   int // that was begun last
}

// next begins a row and returns its field.
func (r *columnReader) next() (reflect.Value, error) {
	if r.row++; r.row >= r.rows.Len() {
		return reflect.Value{}, refuse("a column of more rows than its row group has")
	}
	return r.rows.Index(r.row).Field(r.field), nil
}

// values reads a page of n plain values, one a row.
func (r *columnReader) values(page []byte, n int) error {
	text := "" // of the page, which strings share
	rest := page
	for i := range n {
		f, err := r.next()
		if err != nil {
			return err
		}
		switch f.Kind() {
		case reflect.Bool: // eight to a byte
			if i/8 >= len(page) {
				return refuse("a page with fewer values than it says")
			}
			f.SetBool(page[i/8]>>(i%8)&1 == 1)
			rest = page[i/8+1:]
		case reflect.Int32:
			if len(rest) < 4 {
				return refuse("a page with fewer values than it says")
			}
			f.SetInt(int64(int32(binary.LittleEndian.Uint32(rest))))
			rest = rest[4:]
		case reflect.Int64:
			if len(rest) < 8 {
				return refuse("a page with fewer values than it says")
			}
			f.SetInt(int64(binary.LittleEndian.Uint64(rest)))
			rest = rest[8:]
		case reflect.String:
			if text == "" {
				text = string(page)
			}
			v, more, err := byteArray(rest)
			if err != nil {
				return err
			}
			at := len(page) - len(rest) + 4
			f.SetString(text[at : at+len(v)])
			rest = more
		default: // []byte; its own copy is the page's, which nobody else has
			v, more, err := byteArray(rest)
			if err != nil {
				return err
			}
			f.SetBytes(v[:len(v):len(v)])
			rest = more
		}
	}
	if len(rest) != 0 {
		return refuse("a page with more values than it says")
	}
	return nil
}

// byteArray returns the value that b begins with, and what follows.
func byteArray(b []byte) (v, rest []byte, err error) {
	if len(b) < 4 {
		return nil, nil, refuse("a page with fewer values than it says")
	}
	n := binary.LittleEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, refuse("a value that ends outside of its page")
	}
	return b[4 : 4+n], b[4+n:], nil
}

// lists reads a page of lists of strings: n levels of each kind and the values
// that there are. A row begins where the repetition level is 0; a list is empty
// where the definition level is.
func (r *columnReader) lists(page []byte, n int) error {
	repetition, rest, err := levels(page, n)
	if err != nil {
		return err
	}
	definition, rest, err := levels(rest, n)
	if err != nil {
		return err
	}
	text := string(rest)
	values := rest
	var cur []string
	var field reflect.Value
	keep := func() {
		if len(cur) > 0 {
			field.Set(reflect.ValueOf(cur))
		}
		cur = nil
	}
	for i := range n {
		if repetition[i] == 0 {
			keep()
			if field, err = r.next(); err != nil {
				return err
			}
		} else if len(cur) == 0 { // pages of Writer end with a row
			return refuse("a list without a beginning")
		}
		if definition[i] == 0 {
			if repetition[i] != 0 {
				return refuse("an empty place in a list")
			}
			continue
		}
		v, more, err := byteArray(values)
		if err != nil {
			return err
		}
		at := len(rest) - len(values) + 4
		cur = append(cur, text[at:at+len(v)])
		values = more
	}
	if len(values) != 0 {
		return refuse("a page with more values than it says")
	}
	keep()
	return nil
}

// levels decodes n levels of one bit, in the hybrid of runs and packed bits,
// with its length before it.
func levels(b []byte, n int) (out []byte, rest []byte, err error) {
	enc, rest, err := byteArray(b)
	if err != nil {
		return nil, nil, err
	}
	out = make([]byte, 0, n)
	for len(out) < n {
		head, used := binary.Uvarint(enc)
		if used <= 0 {
			return nil, nil, refuse("levels that end early")
		}
		enc = enc[used:]
		count := head >> 1
		if head&1 == 0 { // a run of one level
			if len(enc) < 1 || enc[0] > 1 || count == 0 || count > uint64(n-len(out)) {
				return nil, nil, refuse("a run of %d levels", count)
			}
			for range count {
				out = append(out, enc[0])
			}
			enc = enc[1:]
			continue
		}
		// Groups of eight; the last may be filled up.
		if count == 0 || count > uint64(len(enc)) {
			return nil, nil, refuse("%d groups of levels", count)
		}
		for _, packed := range enc[:count] {
			for bit := 0; bit < 8 && len(out) < n; bit++ {
				out = append(out, packed>>bit&1)
			}
		}
		enc = enc[count:]
	}
	return out, rest, nil
}

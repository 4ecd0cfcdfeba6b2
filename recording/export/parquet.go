package export

import (
	"maps"
	"slices"

	"github.com/sallyport/sallyport/recording"
	"github.com/sallyport/sallyport/recording/columnar"
	"github.com/sallyport/sallyport/recording/index"
)

// entryRow is an entry with what its session is looked up by, so that files of
// many recordings can be read as one table.
type entryRow struct {
	Session     string   `parquet:"session"`
	Node        string   `parquet:"node"`
	Subject     string   `parquet:"subject"`
	Target      string   `parquet:"target"`
	Database    string   `parquet:"database"`
	Repository  string   `parquet:"repository"`
	Commit      string   `parquet:"commit"`
	Run         string   `parquet:"run"`
	Entry       int64    `parquet:"entry"`
	At          int64    `parquet:"at,timestamp(microsecond)"`
	Type        string   `parquet:"type"`
	Op          int64    `parquet:"op"`
	Verb        string   `parquet:"verb"`
	Effect      string   `parquet:"effect"`
	Rule        string   `parquet:"rule"`
	Reason      string   `parquet:"reason"`
	PolicyIndex int64    `parquet:"policy_index"`
	Actions     []string `parquet:"actions,list"`
	Approval    string   `parquet:"approval"`
	Actor       string   `parquet:"actor"`
	Detail      []string `parquet:"detail,list"` // NAME=VALUE
	Text        []byte   `parquet:"text"`
	Data        []byte   `parquet:"data"`
	Result      string   `parquet:"result"`
	Rows        int64    `parquet:"rows"`
	Duration    int64    `parquet:"duration_ns"`
}

type parquetFile struct {
	exporter
	rows *columnar.Writer[entryRow]
	base entryRow
	size int
}

// flushBytes bounds what waits for a row group to be written.
const flushBytes = 32 << 20

func (p *parquetFile) begin() error {
	h := p.res.Header
	header, err := marshal(h)
	if err != nil {
		return err
	}
	verification, err := marshal(p.verification())
	if err != nil {
		return err
	}
	o := index.OriginOf(h.Claims)
	p.base = entryRow{Session: h.Session, Node: h.Node, Subject: h.Subject, Target: h.Target, Database: h.Database, Repository: o.Repository, Commit: o.Commit, Run: o.Run}
	p.rows = columnar.NewWriter[entryRow](p.w, map[string]string{
		"sallyport.recording": p.item.Name(), "sallyport.header": string(header), "sallyport.verification": string(verification),
	})
	return nil
}

func (p *parquetFile) entry(e *recording.Entry) error {
	result, err := p.result(e)
	if err != nil {
		return err
	}
	r := p.base
	r.Entry, r.At, r.Type, r.Op, r.Verb, r.Effect, r.Rule, r.Reason = int64(e.LSN), e.At.UnixMicro(), TypeName(e.Type), int64(e.Op), e.Verb, e.Effect, e.Rule, e.Reason
	r.PolicyIndex, r.Actions, r.Approval, r.Actor = int64(e.PolicyIndex), e.Actions, e.Approval, e.Actor
	for _, k := range slices.Sorted(maps.Keys(e.Detail)) {
		r.Detail = append(r.Detail, k+"="+e.Detail[k])
	}
	r.Text, r.Data, r.Result, r.Rows, r.Duration = e.Text, e.Data, result, int64(e.Rows), int64(e.Duration)
	if p.size += len(e.Text) + len(e.Data) + len(result); p.size > flushBytes {
		p.size = 0
		if err := p.rows.Flush(); err != nil {
			return err
		}
	}
	return p.rows.Write(r)
}

func (p *parquetFile) end() error { return p.rows.Close() }

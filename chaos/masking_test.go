package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/sallyport/sallyport/chaos/cluster"
)

// emails is what must not be seen: the addresses of cluster.ShopSQL, a part of
// one, and it written backwards.
var emails = []string{"@example.com", "moc.elpmaxe", "blaise@"}

func leaks(text string) bool {
	for _, e := range emails {
		if strings.Contains(strings.ToLower(text), e) {
			return true
		}
	}
	return false
}

// testMasking reads a sensitive column in every way that comes to mind.
func testMasking(t *testing.T, s *suite) {
	ctx := t.Context()
	n := s.Nodes[0]
	token := s.job(t, "masking", "main", map[string]any{"actor": "dana"})

	for _, n := range s.Nodes {
		t.Run("psql/"+n.Name, func(t *testing.T) {
			out, err := n.PSQL(ctx, "shop", token, "SELECT id, name, email FROM users ORDER BY id")
			if err != nil || leaks(out) || !strings.Contains(out, "1|Ada|[masked]") || strings.Count(out, "[masked]") != 4 {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	c := s.login(t, n, "shop", token)
	t.Run("every way to ask", func(t *testing.T) {
		for _, format := range []int16{pgx.TextFormatCode, pgx.BinaryFormatCode} {
			for _, mode := range []pgx.QueryExecMode{pgx.QueryExecModeCacheStatement, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol} {
				if mode == pgx.QueryExecModeSimpleProtocol && format == pgx.BinaryFormatCode {
					continue
				}
				args := []any{mode}
				if mode != pgx.QueryExecModeSimpleProtocol {
					args = append(args, pgx.QueryResultFormats{format})
				}
				for _, sql := range []string{
					"SELECT email, country FROM users",
					"SELECT u.email AS harmless, country FROM public.users AS u",
					"SELECT u.email, o.item FROM users u JOIN orders o ON o.user_id = u.id LIMIT 5",
				} {
					rows, err := c.Query(ctx, sql, args...)
					s.must(t, err)
					count := 0
					for rows.Next() {
						count++
						for i, raw := range rows.RawValues() {
							if leaks(string(raw)) || i == 0 && string(raw) != "[masked]" || i == 1 && strings.Contains(string(raw), "masked") {
								t.Errorf("%v, format %d: column %d of %s is %q", mode, format, i, sql, raw)
							}
						}
					}
					if rows.Err() != nil || count < 4 {
						t.Errorf("%v, format %d: %s: %d rows, %v", mode, format, sql, count, rows.Err())
					}
				}
			}
		}
	})
	s.must(t, s.PG.Exec(ctx, "shop", `
CREATE VIEW user_emails AS SELECT id, email AS contact FROM users;
CREATE FUNCTION all_emails() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER AS 'SELECT email FROM users';
ANALYZE users;
GRANT SELECT ON user_emails TO app_ro, app_rw, app_migrator;`))
	trick := s.login(t, n, "shop", token)
	for _, sql := range []string{
		"SELECT upper(email) FROM users",
		"SELECT reverse(email) FROM users",
		"SELECT email || '' FROM users",
		"SELECT email::varchar FROM users",
		"SELECT substr(email, 2) FROM users",
		"SELECT count(*) FROM users WHERE email = 'ada@example.com'",
		"SELECT count(*) FROM users WHERE email LIKE 'a%'",
		"SELECT id FROM users ORDER BY email",
		"SELECT country FROM users GROUP BY country, email",
		"SELECT min(email) FROM users",
		"SELECT max(u) FROM (SELECT email AS u FROM users) AS x",
		"SELECT users FROM users",
		"SELECT u.*::text FROM users u",
		"SELECT row(u.*) FROM users u",
		"SELECT row_to_json(u) FROM users u",
		"SELECT to_jsonb(users) FROM users",
		"SELECT array_agg(email) FROM users",
		"SELECT string_agg(email, ',') FROM users",
		"SELECT CASE WHEN email LIKE 'a%' THEN 1 ELSE 1/0 END FROM users",
		"SELECT 1 / (CASE WHEN email LIKE 'a%' THEN 0 ELSE 1 END) FROM users",
		"SELECT email::int FROM users",
		"SELECT a.id FROM users a JOIN users b ON a.email = b.email",
		"SELECT id FROM users a JOIN users b USING (id, email)",
		"SELECT a.id FROM users a NATURAL JOIN users b",
		"SELECT email FROM users UNION SELECT 'x'",
		"SELECT DISTINCT email FROM users",
		"WITH x AS (SELECT email AS e FROM users) SELECT upper(e) FROM x",
		"SELECT (SELECT upper(email) FROM users LIMIT 1)",
		"SELECT x FROM users, LATERAL (SELECT upper(email) AS x) AS l",
		"SELECT contact FROM user_emails",
		"SELECT contact || '' FROM user_emails",
		"SELECT all_emails()",
		"SELECT * FROM all_emails()",
		"SELECT query_to_xml('SELECT email FROM users', true, false, '')",
		"SELECT table_to_xml('users', true, false, '')",
		"SELECT most_common_vals, histogram_bounds FROM pg_stats WHERE tablename = 'users'",
		"SELECT most_common_vals::text FROM pg_catalog.pg_stats",
		"SELECT stavalues1 FROM pg_statistic",
		"COPY users TO STDOUT",
		"COPY users (email) TO STDOUT",
		"COPY (SELECT email FROM users) TO STDOUT",
		"COPY (SELECT upper(email) FROM users) TO STDOUT (FORMAT binary)",
		"BEGIN; DECLARE c CURSOR FOR SELECT email FROM users; FETCH ALL FROM c; COMMIT",
		"EXPLAIN ANALYZE SELECT * FROM users WHERE email LIKE 'a%'",
		"INSERT INTO orders (user_id, item, cents) SELECT 1, email, 1 FROM users RETURNING item",
		"UPDATE users SET country = email RETURNING country",
		"UPDATE users SET email = email RETURNING upper(email)",
		"UPDATE orders SET item = u.email FROM users u WHERE u.id = user_id RETURNING item",
		"SELECT id FROM users FOR UPDATE OF users; SELECT upper(email) FROM users",
		"CREATE TEMP TABLE t AS SELECT email FROM users",
		"SELECT email INTO TEMP t FROM users",
		"DO $$ BEGIN RAISE NOTICE '%', (SELECT email FROM users LIMIT 1); END $$",
		"PREPARE leak AS SELECT upper(email) FROM users; EXECUTE leak",
	} {
		t.Run(sql, func(t *testing.T) { trick = s.masked(t, n, trick, token, sql) })
	}
	t.Run("psql", func(t *testing.T) {
		for _, sql := range []string{"SELECT upper(email) FROM users", "COPY users TO STDOUT", `\copy users TO STDOUT`, "TABLE users; SELECT users FROM users", "EXPLAIN ANALYZE SELECT * FROM users WHERE email < 'b'"} {
			out, err := n.PSQL(ctx, "shop", token, sql)
			if err == nil || leaks(out) || !strings.Contains(out, "sallyport") {
				t.Errorf("%s: %v: %s", sql, err, out)
			}
		}
	})
	if got := s.int(t, "shop", "SELECT count(*) FROM users WHERE country LIKE '%@%'") + s.int(t, "shop", "SELECT count(*) FROM orders WHERE item LIKE '%@%'"); got != 0 {
		t.Errorf("%d values were written where they are not masked", got)
	}

	t.Run("error texts", func(t *testing.T) {
		for _, sql := range []string{
			"UPDATE users SET country = NULL WHERE id = 1",
			"INSERT INTO users (id, name, email, country) VALUES (1, 'n', 'mine', 'DE')",
			"INSERT INTO users (name, country) VALUES ('n', 'DE')",
			"UPDATE users SET id = 2 WHERE id = 1",
		} {
			err := c.simple(ctx, sql)
			refused(t, err, "")
			var pe = pgError(err)
			if pe == nil {
				continue
			}
			if leaks(fmt.Sprintf("%+v", *pe)) || pe.Detail != "" || pe.Where != "" || strings.Contains(pe.Message, "Failing row") {
				t.Errorf("%s: detail %q, hint %q, context %q: %s", sql, pe.Detail, pe.Hint, pe.Where, pe.Message)
			}
		}
		// The same error in a database without such columns keeps its detail, so that something is withheld above.
		other := s.login(t, n, "bench", token)
		err := other.simple(ctx, "INSERT INTO numbers VALUES ('twice', 1, ''), ('twice', 1, '')")
		s.must(t, other.Close(ctx))
		refused(t, err, "23505", "already exists")
	})
	t.Run("recording", func(t *testing.T) {
		s.must(t, c.Close(ctx))
		masked := 0
		for _, r := range s.listRecordings(t, "--subject", subject("masking")) {
			out := s.cli(t, s.AdminEnv(), "recordings", "replay", r.Name, "--store", s.Recordings)
			masked += strings.Count(out, "[masked]")
			for line := range strings.Lines(out) {
				if leaks(line) && !strings.Contains(line, "WHERE email = 'ada@example.com'") { // what the test asked itself
					t.Errorf("the replay of %s shows %s", r.Name, line)
				}
			}
		}
		if masked < 12 {
			t.Errorf("the replays show %d masked values", masked)
		}
	})
}

// masked runs a statement by the simple and the extended protocol: it must be
// refused, and nothing of the column may come back. It returns the session to
// go on with.
func (s *suite) masked(t *testing.T, n *cluster.Node, c *session, token, sql string) *session {
	if c.IsClosed() {
		c = s.login(t, n, "shop", token)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	check := func(how string, rows [][]byte, err error) {
		refused(t, err, "", "sallyport")
		if pe := pgError(err); pe != nil && leaks(strings.ReplaceAll(fmt.Sprintf("%+v", *pe), sql, "")) {
			t.Errorf("%s: the error shows %+v", how, *pe)
		}
		for _, v := range rows {
			if leaks(string(v)) {
				t.Errorf("%s: %q comes back", how, v)
			}
		}
		for {
			select {
			case notice := <-c.notices:
				if leaks(notice) {
					t.Errorf("%s: a notice says %q", how, notice)
				}
				continue
			default:
			}
			return
		}
	}
	var rows [][]byte
	simple := c.PgConn().Exec(ctx, sql)
	for simple.NextResult() {
		for r := simple.ResultReader(); r.NextRow(); {
			for _, v := range r.Values() {
				rows = append(rows, bytes.Clone(v))
			}
		}
	}
	check("simple", rows, simple.Close())
	if strings.HasPrefix(sql, "BEGIN") {
		_ = c.simple(ctx, "ROLLBACK")
	}
	if strings.Contains(sql, ";") || c.IsClosed() {
		return c
	}
	rows = nil
	r := c.PgConn().ExecParams(ctx, sql, nil, nil, nil, []int16{1})
	for r.NextRow() {
		for _, v := range r.Values() {
			rows = append(rows, bytes.Clone(v))
		}
	}
	_, err := r.Close()
	check("extended", rows, err)
	return c
}

// testLeaks looks for tokens where none may be.
func testLeaks(t *testing.T, s *suite) {
	needles := map[string]bool{}
	s.mu.Lock()
	for _, token := range s.tokens {
		if i := strings.LastIndexByte(token, '.'); i >= 0 && len(token)-i > 20 {
			needles[token[i+1:]] = true
		}
	}
	s.mu.Unlock()
	if len(needles) < 20 {
		t.Fatalf("only %d tokens were presented", len(needles))
	}
	// Files as they are: logs, the spools, the state.
	files := searchFiles(t, s.Dir, needles)
	if files < 20 {
		t.Errorf("only %d files were searched", files)
	}
	// What is compressed, by reading it.
	events, err := json.Marshal(s.events(t))
	s.must(t, err)
	searchText(t, "the events", string(events), needles)
	read := 0
	for _, r := range s.listRecordings(t) {
		header, err := json.Marshal(r)
		s.must(t, err)
		searchText(t, "the header of "+r.Name, string(header), needles)
		for _, e := range s.read(t, r.Name) {
			read++
			text, err := json.Marshal(e)
			s.must(t, err)
			searchText(t, "recording "+r.Name, string(text)+string(e.Text)+string(e.Data), needles)
		}
	}
	if read < 1000 {
		t.Errorf("only %d entries were searched", read)
	}
	log, err := s.PG.Log()
	s.must(t, err)
	searchText(t, "PostgreSQL's log", log, needles)
}

func searchText(t *testing.T, where, text string, needles map[string]bool) {
	t.Helper()
	for n := range needles {
		if strings.Contains(text, n) {
			t.Errorf("%s holds the signature of a token", where)
		}
	}
}

// searchFiles searches all files under dir and returns how many there are.
func searchFiles(t *testing.T, dir string, needles map[string]bool) int {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // a file that a node just removed
		}
		data, err := os.ReadFile(path)
		if err == nil {
			files++
			searchText(t, path, string(data), needles)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return files
}

func pgError(err error) *pgconn.PgError {
	var pe *pgconn.PgError
	errors.As(err, &pe)
	return pe
}

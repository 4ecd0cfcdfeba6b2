package sql

import (
	"fmt"
	"strconv"
	"strings"
)

// Settings decide what a statement's text means (search_path, encoding,
// standard_conforming_strings), as whom it runs (role), which checks run
// (row_security, session_replication_role) and what the server tells or writes
// (debug_*, log_*). So a client may set only what is listed here.

// harmlessSettings may be given any value.
var harmlessSettings = words(`
	application_name datestyle timezone intervalstyle extra_float_digits bytea_output xmlbinary lc_monetary lc_numeric lc_time
	statement_timeout lock_timeout idle_in_transaction_session_timeout idle_session_timeout transaction_timeout
	client_connection_check_interval tcp_keepalives_idle tcp_keepalives_interval tcp_keepalives_count tcp_user_timeout
	maintenance_work_mem logical_decoding_work_mem temp_buffers temp_file_limit
	maintenance_io_concurrency max_parallel_maintenance_workers jit jit_above_cost jit_inline_above_cost jit_optimize_above_cost
	gin_pending_list_limit
	default_transaction_isolation default_transaction_read_only default_transaction_deferrable
	transaction_isolation transaction_read_only transaction_deferrable
	synchronous_commit commit_delay commit_siblings deadlock_timeout
	default_tablespace temp_tablespaces default_table_access_method default_toast_compression
	vacuum_cost_delay vacuum_cost_limit vacuum_cost_page_hit vacuum_cost_page_miss vacuum_cost_page_dirty
	vacuum_freeze_min_age vacuum_freeze_table_age vacuum_multixact_freeze_min_age vacuum_multixact_freeze_table_age
	escape_string_warning check_function_bodies password_encryption gss_accept_delegation
	client_min_messages idle_in_transaction_timeout
`)

// plannerSettings steer the planner. SET may give them any value while no column
// is masked for the session: where one is, rows in the order of an index on it
// would tell its values. They are not taken at start-up, before that is known.
var plannerSettings = words(`
	enable_async_append enable_bitmapscan enable_gathermerge enable_hashagg enable_hashjoin enable_incremental_sort
	enable_indexonlyscan enable_indexscan enable_material enable_memoize enable_mergejoin enable_nestloop enable_parallel_append
	enable_parallel_hash enable_partition_pruning enable_partitionwise_aggregate enable_partitionwise_join enable_seqscan
	enable_sort enable_tidscan enable_group_by_reordering enable_presorted_aggregate
	seq_page_cost random_page_cost cpu_tuple_cost cpu_index_tuple_cost cpu_operator_cost parallel_setup_cost parallel_tuple_cost
	effective_cache_size effective_io_concurrency min_parallel_table_scan_size min_parallel_index_scan_size
	max_parallel_workers max_parallel_workers_per_gather parallel_leader_participation work_mem hash_mem_multiplier
	from_collapse_limit join_collapse_limit geqo geqo_threshold geqo_effort geqo_pool_size geqo_generations
	geqo_selection_bias geqo_seed constraint_exclusion cursor_tuple_fraction plan_cache_mode default_statistics_target
	recursive_worktable_factor gin_fuzzy_search_limit
`)

// pinnedValues are settings that have one allowed value, besides search_path
// and role, whose value the session decides.
var pinnedValues = map[string][]string{
	"client_encoding":             {"utf8", "utf-8", "unicode"},
	"standard_conforming_strings": {"on", "true", "yes", "1"},
	"backslash_quote":             {"safe_encoding"},
	"row_security":                {"on", "true", "yes", "1"},
	"session_replication_role":    {"origin"},
	"transform_null_equals":       {"off", "false", "no", "0"},
	"quote_all_identifiers":       {"off", "false", "no", "0"},
	"array_nulls":                 {"on", "true", "yes", "1"},
	"xmloption":                   {"content"},
	"lo_compat_privileges":        {"off", "false", "no", "0"},
	"default_with_oids":           {"off", "false", "no", "0"},
	"synchronize_seqscans":        {"on", "true", "yes", "1"},
	"debug_print_rewritten":       {"off", "false", "no", "0"},
	"exit_on_error":               {"off", "false", "no", "0"},
}

// settingAllowed says whether SET name TO value may pass; value is the
// setting's text form. pinned is the value it is held at, where there is one.
func settingAllowed(sc *Scope, name, value string) (ok bool, pinned string) {
	name = strings.ToLower(name)
	if harmlessSettings[name] {
		// Names of schemas and time zones are text; a client_min_messages below
		// notice would send the server's own parse trees (debug_*) to the client.
		if name == "client_min_messages" {
			switch strings.ToLower(value) {
			case "notice", "warning", "error", "fatal", "panic":
				return true, ""
			}
			return false, "notice"
		}
		return true, ""
	}
	if values := pinnedValues[name]; values != nil {
		v := strings.ToLower(strings.TrimSpace(value))
		for _, allowed := range values {
			if v == allowed {
				return true, values[0]
			}
		}
		return false, values[0]
	}
	if sc == nil {
		return false, ""
	}
	if plannerSettings[name] {
		return !sc.Masking(), ""
	}
	switch name {
	case "search_path":
		want := strings.Join(sc.SearchPath, ", ")
		got := strings.Split(value, ",")
		if len(got) != len(sc.SearchPath) || strings.TrimSpace(value) == "" {
			return false, want
		}
		for i, g := range got {
			g = strings.TrimSpace(g)
			if q, err := unquoteName(g); err == nil {
				g = q
			}
			if g != sc.SearchPath[i] {
				return false, want
			}
		}
		return true, want
	case "role":
		return sc.Role != "" && value == sc.Role, sc.Role
	}
	return false, ""
}

// unquoteName reads a name as in search_path: quoted, or folded to lower case.
func unquoteName(s string) (string, error) {
	if !strings.HasPrefix(s, `"`) {
		return lowerASCII(s), nil
	}
	if len(s) < 2 || !strings.HasSuffix(s, `"`) {
		return "", fmt.Errorf("name %s: quote without end", s)
	}
	return strings.ReplaceAll(s[1:len(s)-1], `""`, `"`), nil
}

// StartupParameterAllowed judges a parameter of the start-up packet, other than
// user and database, before anything is known of the session. ok says that it
// may be sent on; pinned is the value that the gateway holds the setting at,
// where there is one. "options" is judged by each setting that it holds.
// Parameters of the protocol itself (replication, _pq_.*) are not allowed.
func StartupParameterAllowed(name, value string) (ok bool, pinned string) {
	if strings.IndexByte(value, 0) >= 0 || strings.IndexByte(name, 0) >= 0 {
		return false, ""
	}
	if strings.EqualFold(name, "options") {
		settings, ok := parseOptions(value)
		if !ok {
			return false, ""
		}
		for _, s := range settings {
			if ok, pinned := StartupParameterAllowed(s[0], s[1]); !ok {
				return false, pinned
			}
		}
		return true, ""
	}
	return settingAllowed(nil, name, value)
}

// parseOptions reads the settings of an options parameter: -c name=value,
// -cname=value and --name=value, backslash escaping a character. Every other
// switch is refused.
func parseOptions(options string) ([][2]string, bool) {
	var words []string
	var word strings.Builder
	inside := false
	for i := 0; i < len(options); i++ {
		switch b := options[i]; {
		case b == '\\':
			if i++; i == len(options) {
				return nil, false
			}
			word.WriteByte(options[i])
			inside = true
		case isSpace(b) || b == '\v':
			if inside {
				words = append(words, word.String())
				word.Reset()
				inside = false
			}
		default:
			word.WriteByte(b)
			inside = true
		}
	}
	if inside {
		words = append(words, word.String())
	}
	var out [][2]string
	for i := 0; i < len(words); i++ {
		w := words[i]
		switch {
		case w == "-c":
			if i++; i == len(words) {
				return nil, false
			}
			w = words[i]
		case strings.HasPrefix(w, "-c"):
			w = w[2:]
		case strings.HasPrefix(w, "--"):
			w = w[2:]
		default:
			return nil, false
		}
		name, value, found := strings.Cut(w, "=")
		if !found || name == "" {
			return nil, false
		}
		// The server reads a dash in a name as an underscore here.
		out = append(out, [2]string{strings.ReplaceAll(name, "-", "_"), value})
	}
	return out, true
}

// number formats an integer constant as SET gives it to a setting.
func number(n int) string { return strconv.Itoa(n) }

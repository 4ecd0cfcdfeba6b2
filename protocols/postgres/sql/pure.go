package sql

import "strings"

// The lists below were read from pg_catalog of PostgreSQL 15 and checked by
// hand; pure_test.go holds them against a live server: each name exists, and
// no overload of it is volatile unless volatileButHarmless says why it may be.
// What is missing from a list costs a permit for postgres:call, nothing else.

// pureFunctions are functions of pg_catalog whose every overload computes from
// its arguments, the catalogue or the session alone. Left out though stable:
// all that run a query given as text (query_to_xml, ts_rewrite), show other
// sessions (pg_stat_get_*), show column statistics (pg_mcv_list_items), read
// XML (xpath), or fill types of users (json_populate_record).
var pureFunctions = words(`
	abbrev abs acos acosd acosh age area array_agg array_append array_cat array_dims array_fill array_length array_lower
	array_ndims array_position array_positions array_prepend array_remove array_replace array_to_json array_to_string
	array_to_tsvector array_upper ascii asin asind asinh atan atan2 atan2d atand atanh avg bit bit_and bit_count
	bit_length bit_or bit_xor bool bool_and bool_or bound_box box bpchar broadcast btrim cardinality cbrt ceil ceiling center
	char char_length character_length chr cidr circle col_description concat concat_ws convert_from convert_to corr cos
	cosd cosh cot cotd count covar_pop covar_samp cume_dist current_database current_schema current_schemas
	current_setting current_user date date_bin date_part date_trunc datemultirange daterange decode degrees dense_rank
	diagonal diameter div encode enum_first enum_last enum_range every exp extract factorial family first_value float4
	float8 floor format format_type gcd generate_series generate_subscripts get_bit get_byte getdatabaseencoding
	has_any_column_privilege has_column_privilege has_database_privilege has_foreign_data_wrapper_privilege
	has_function_privilege has_language_privilege has_parameter_privilege has_schema_privilege has_sequence_privilege
	has_server_privilege has_table_privilege has_tablespace_privilege has_type_privilege hashtext hashtextextended height
	host hostmask inet_client_addr inet_client_port inet_merge inet_same_family initcap int2 int4 int4range int8
	int8range interval is_normalized isclosed isempty isfinite ishorizontal isopen isparallel isperp isvertical json_agg
	json_array_elements json_array_elements_text json_array_length json_build_array json_build_object json_each
	json_each_text json_extract_path json_extract_path_text json_object json_object_agg json_object_keys json_strip_nulls
	json_to_record json_to_recordset json_to_tsvector json_typeof jsonb_agg jsonb_array_elements
	jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
	jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_agg jsonb_object_keys
	jsonb_path_exists jsonb_path_exists_tz jsonb_path_match jsonb_path_match_tz jsonb_path_query jsonb_path_query_array
	jsonb_path_query_array_tz jsonb_path_query_first jsonb_path_query_first_tz jsonb_path_query_tz jsonb_pretty jsonb_set
	jsonb_set_lax jsonb_strip_nulls jsonb_to_record jsonb_to_recordset jsonb_to_tsvector jsonb_typeof justify_days
	justify_hours justify_interval lag last_value lcm lead left length like like_escape line ln log log10 lower lower_inc
	lower_inf lpad lseg ltrim macaddr macaddr8 macaddr8_set7bit make_date make_interval make_time make_timestamp
	make_timestamptz masklen max md5 min min_scale mod mode money multirange mxid_age name netmask network normalize
	notlike now npoints nth_value ntile num_nonnulls num_nulls numeric nummultirange numnode numrange obj_description
	octet_length oid overlaps overlay parse_ident path percent_rank percentile_cont percentile_disc pg_backend_pid
	pg_char_to_encoding pg_client_encoding pg_collation_for pg_collation_is_visible pg_column_is_updatable pg_column_size
	pg_conf_load_time pg_describe_object pg_encoding_max_length pg_encoding_to_char pg_function_is_visible
	pg_get_constraintdef pg_get_expr pg_get_function_arg_default pg_get_function_arguments
	pg_get_function_identity_arguments pg_get_function_result pg_get_function_sqlbody pg_get_functiondef pg_get_indexdef
	pg_get_keywords pg_get_partition_constraintdef pg_get_partkeydef pg_get_publication_tables
	pg_get_replica_identity_index pg_get_ruledef pg_get_serial_sequence pg_get_statisticsobjdef
	pg_get_statisticsobjdef_columns pg_get_statisticsobjdef_expressions pg_get_triggerdef pg_get_userbyid pg_get_viewdef
	pg_has_role pg_identify_object pg_identify_object_as_address pg_index_column_has_property pg_index_has_property
	pg_lsn pg_my_temp_schema pg_opclass_is_visible pg_operator_is_visible pg_opfamily_is_visible pg_options_to_table
	pg_partition_root pg_postmaster_start_time pg_relation_filenode pg_relation_is_publishable pg_relation_is_updatable
	pg_settings_get_flags pg_size_bytes pg_size_pretty pg_statistics_obj_is_visible pg_table_is_visible
	pg_tablespace_location pg_timezone_abbrevs pg_trigger_depth pg_ts_config_is_visible pg_ts_dict_is_visible
	pg_ts_parser_is_visible pg_ts_template_is_visible pg_type_is_visible pg_typeof pg_wal_lsn_diff phraseto_tsquery pi
	plainto_tsquery point polygon position pow power quote_ident quote_literal quote_nullable radians radius range_agg
	range_intersect_agg range_merge rank regclass regexp_count regexp_instr regexp_like regexp_match regexp_matches
	regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr regr_avgx regr_avgy regr_count
	regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy repeat replace reverse right round row_number
	row_security_active row_to_json rpad rtrim scale session_user set_bit set_byte set_masklen setweight sha224 sha256
	sha384 sha512 shobj_description sign similar_to_escape sin sind sinh slope split_part sqrt starts_with
	statement_timestamp stddev stddev_pop stddev_samp string_agg string_to_array string_to_table strip strpos substr
	substring sum tan tand tanh text time timestamp timestamptz timetz timezone to_char to_date to_hex to_json to_jsonb
	to_number to_regclass to_regcollation to_regnamespace to_regoper to_regoperator to_regproc to_regprocedure to_regrole
	to_regtype to_timestamp to_tsquery to_tsvector transaction_timestamp translate trim_array trim_scale trunc ts_delete
	ts_filter ts_headline ts_rank ts_rank_cd tsmultirange tsrange tstzmultirange tstzrange tsvector_to_array unistr
	unnest upper upper_inc upper_inf var_pop var_samp varbit varchar variance version websearch_to_tsquery width
	width_bucket xid
`)

// volatileButHarmless are volatile functions of pg_catalog that are pure all
// the same, each with its reason.
var volatileButHarmless = map[string]string{
	"clock_timestamp":        "tells the time",
	"gen_random_uuid":        "makes a random number",
	"pg_database_size":       "tells a size",
	"pg_indexes_size":        "tells a size",
	"pg_is_in_recovery":      "tells whether the server is a replica",
	"pg_partition_ancestors": "tells where a partition belongs",
	"pg_partition_tree":      "tells where a partition belongs",
	"pg_relation_size":       "tells a size",
	"pg_table_size":          "tells a size",
	"pg_tablespace_size":     "tells a size",
	"pg_total_relation_size": "tells a size",
	"random":                 "makes a random number",
	"timeofday":              "tells the time",
}

// pureElsewhere are functions outside pg_catalog that initdb makes.
var pureElsewhere = map[qualified]bool{
	{"information_schema", "_pg_expandarray"}: true, // JDBC's getPrimaryKeys
}

// blindCalls are calls that read and write no table: they stay possible, as
// postgres:call, while columns of the database are masked.
var blindCalls = words(`
	currval lastval nextval setval pg_sleep pg_sleep_for pg_sleep_until setseed
	pg_advisory_lock pg_advisory_lock_shared pg_advisory_unlock pg_advisory_unlock_all pg_advisory_unlock_shared
	pg_advisory_xact_lock pg_advisory_xact_lock_shared pg_try_advisory_lock pg_try_advisory_lock_shared
	pg_try_advisory_xact_lock pg_try_advisory_xact_lock_shared
	pg_current_xact_id pg_current_xact_id_if_assigned txid_current txid_current_if_assigned
	pg_current_wal_lsn pg_last_wal_receive_lsn pg_last_wal_replay_lsn
`)

// pureOperators are the operators of pg_catalog; the functions of all of them
// are immutable or stable.
var pureOperators = words(`
	!! !~ !~* !~~ !~~* # ## #- #> #>> % & && &< &<| &> * *< *<= *<> *= *> *>= + - -> ->> -|- / < <-> << <<= <<| <= <> <@
	<^ = > >= >> >>= >^ ? ?# ?& ?- ?-| ?| ?|| @ @-@ @> @? @@ @@@ ^ ^@ | |&> |/ |>> || ||/ ~ ~* ~<=~ ~<~ ~= ~>=~ ~>~ ~~
	~~*
`)

// builtinTypes are the types of pg_catalog that a cast may name, as the grammar
// spells them. Array types are their element type with bounds, or _name.
var builtinTypes = words(`
	aclitem bit bool box bpchar bytea char cid cidr circle date datemultirange daterange float4 float8 inet int2
	int2vector int4 int4multirange int4range int8 int8multirange int8range interval json jsonb jsonpath line lseg macaddr
	macaddr8 money name numeric nummultirange numrange oid oidvector path pg_lsn pg_node_tree pg_snapshot point polygon
	record refcursor regclass regcollation regconfig regdictionary regnamespace regoper regoperator regproc regprocedure
	regrole regtype text tid time timestamp timestamptz timetz tsmultirange tsquery tsrange tstzmultirange tstzrange
	tsvector txid_snapshot uuid varbit varchar void xid xid8 xml
`)

// plainSystem are the relations of pg_catalog that tell about objects and
// settings but never about the content of a column. Statistics, large objects,
// other sessions' queries and password hashes are not among them.
var plainSystem = words(`
	pg_aggregate pg_am pg_amop pg_amproc pg_attrdef pg_attribute pg_auth_members pg_cast pg_class pg_collation
	pg_constraint pg_conversion pg_database pg_db_role_setting pg_default_acl pg_depend pg_description pg_enum
	pg_event_trigger pg_extension pg_foreign_data_wrapper pg_foreign_server pg_foreign_table pg_group pg_index pg_indexes
	pg_inherits pg_init_privs pg_language pg_largeobject_metadata pg_matviews pg_namespace pg_opclass pg_operator
	pg_opfamily pg_partitioned_table pg_policies pg_policy pg_proc pg_publication pg_publication_namespace
	pg_publication_rel pg_publication_tables pg_range pg_rewrite pg_roles pg_rules pg_seclabel pg_seclabels pg_sequence
	pg_sequences pg_settings pg_shdepend pg_shdescription pg_shseclabel pg_statistic_ext pg_tables pg_tablespace
	pg_timezone_abbrevs pg_timezone_names pg_transform pg_trigger pg_ts_config pg_ts_config_map pg_ts_dict pg_ts_parser
	pg_ts_template pg_type pg_user pg_views
`)

func words(s string) map[string]bool {
	fields := strings.Fields(s)
	m := make(map[string]bool, len(fields))
	for _, f := range fields {
		m[f] = true
	}
	return m
}

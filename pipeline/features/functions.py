"""Functions that a fleet's SQL may call: Spark built-ins that depend on their arguments alone.

Names are Spark 4.3's, as `SHOW FUNCTIONS` lists them. What is neither allowed nor refused for good
is left to the author of a fleet, who can add it with `sql.functions`.
"""

from collections.abc import Iterable

from pipeline.errors import SpecError


def words(text: str) -> frozenset[str]:
    """The words of a list that is written as a text."""
    return frozenset(text.split())


_NUMBERS = """
    abs acos acosh asin asinh atan atan2 atanh bin bit_count bit_get bround cbrt ceil ceiling conv
    cos cosh cot csc degrees div e exp expm1 factorial floor getbit greatest hypot isnan least ln
    log log10 log1p log2 mod nanvl negative pi pmod positive pow power radians rint round sec
    shiftleft shiftright shiftrightunsigned sign signum sin sinh sqrt tan tanh try_add try_divide
    try_mod try_multiply try_subtract width_bucket
"""
_CONDITIONS_AND_TYPES = """
    between bigint binary boolean case cast coalesce date decimal double equal_null float if ifnull
    int isnotnull isnull nullif nullifzero nvl nvl2 smallint string timestamp tinyint try_cast
    try_to_binary try_to_number to_binary to_number typeof when zeroifnull
"""
_TEXT = """
    ascii base64 bit_length btrim char char_length character_length chr collate concat concat_ws
    contains crc32 decode elt encode endswith find_in_set format_number format_string hash hex ilike
    initcap instr is_valid_utf8 jaro_winkler_similarity lcase left len length levenshtein like
    locate lower lpad ltrim luhn_check make_valid_utf8 mask md5 octet_length overlay parse_url
    position printf quote regexp regexp_count regexp_extract regexp_extract_all regexp_instr
    regexp_like regexp_replace regexp_substr repeat replace reverse right rlike rpad rtrim sha sha1
    sha2 soundex space split split_part startswith str_to_map substr substring substring_index
    to_char to_varchar translate trim try_parse_url try_url_decode ucase unbase64 unhex upper
    url_decode url_encode xxhash64
"""
_TIMES = """
    add_months convert_timezone date_add date_diff date_format date_from_unix_date date_part
    date_sub date_trunc dateadd datediff datepart day dayname dayofmonth dayofweek dayofyear extract
    from_unixtime from_utc_timestamp hour last_day make_date make_dt_interval make_interval
    make_time make_timestamp make_timestamp_ltz make_timestamp_ntz make_ym_interval minute month
    monthname months_between next_day quarter second session_window timestamp_micros
    timestamp_millis timestamp_seconds timestampadd timestampdiff to_date to_time to_timestamp
    to_timestamp_ltz to_timestamp_ntz to_unix_timestamp to_utc_timestamp trunc try_make_interval
    try_make_timestamp try_make_timestamp_ltz try_make_timestamp_ntz try_to_date try_to_time
    try_to_timestamp unix_date unix_micros unix_millis unix_seconds unix_timestamp weekday
    weekofyear window window_time year
"""
_NESTED = """
    aggregate array array_append array_compact array_contains array_distinct array_except
    array_insert array_intersect array_join array_max array_min array_position array_prepend
    array_remove array_repeat array_size array_sort array_union arrays_overlap arrays_zip
    cardinality element_at exists filter flatten forall from_csv from_json get get_json_object
    json_array_length json_object_keys map map_concat map_contains_key map_entries map_filter
    map_from_arrays map_from_entries map_keys map_values map_zip_with named_struct reduce sequence
    size slice sort_array struct to_csv to_json transform transform_keys transform_values
    try_element_at zip_with
"""
# Functions of one row.
SCALARS = words(f"{_NUMBERS} {_CONDITIONS_AND_TYPES} {_TEXT} {_TIMES} {_NESTED}")
# Functions of several rows; `any`, `every` and `some` are spelled like predicates.
AGGREGATES = words(
    """
    any approx_count_distinct approx_percentile avg bit_and bit_or bit_xor bool_and bool_or corr
    count count_if covar_pop covar_samp every grouping grouping_id histogram_numeric kurtosis
    max max_by mean median min min_by mode percentile percentile_approx percentile_cont
    percentile_disc regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx
    regr_sxy regr_syy skewness some std stddev stddev_pop stddev_samp sum try_avg try_sum
    var_pop var_samp variance
    """
)
WINDOWS = words(
    """
    cume_dist dense_rank lag lead nth_value ntile percent_rank rank row_number
    """
)
# What these give depends on the order of rows, which only a window with an ORDER BY fixes.
ORDERED = words("first first_value last last_value")
# Their answers, too, depend on the order of rows: a fleet has to add them.
UNORDERED_AGGREGATES = words(
    """
    any_value array_agg collect_list collect_set collect_union listagg string_agg
    """
)
# Functions that make several rows of one.
GENERATORS = words(
    """
    explode explode_outer inline inline_outer json_tuple posexplode posexplode_outer stack
    """
)
ALLOWED = SCALARS | AGGREGATES | WINDOWS | ORDERED | GENERATORS

# No fleet can add these: they run code, or read files, the environment, the session or a service.
REACHING = words(
    """
    cloud_files_state collations current_catalog current_database current_metastore current_path
    current_recipient current_schema current_timezone current_user event_log from_protobuf
    http_request identifier input_file_block_length input_file_block_start input_file_name
    is_account_group_member is_member java_method list_secrets python_worker_logs read_files
    read_kafka read_kinesis read_pubsub read_pulsar read_state_metadata read_statestore reflect
    remote_query secret session_user sql_keywords table_changes to_protobuf try_reflect
    try_secret user vector_search version
    """
)
_REACHING_PREFIXES = ("ai_", "http_")
# No fleet can add these: their answer depends on the moment, on chance, or on how rows are spread
# over tasks.
CHANGING = words(
    """
    aes_encrypt curdate current_date current_time current_timestamp localtime localtimestamp
    monotonically_increasing_id now rand randn random randstr shuffle spark_partition_id uniform
    uuid
    """
)
# Spark calls these without parentheses where no column has the name.
BARE = words(
    """
    current_date current_path current_time current_timestamp current_user grouping__id localtime
    localtimestamp session_user user
    """
)


def refuse_harmful(name: str, where: str) -> None:
    """Refuse a function that no fleet may call.

    Raises:
        SpecError: naming the function and what is wrong with it.
    """
    if name in REACHING or name.startswith(_REACHING_PREFIXES):
        raise SpecError(f"{where} calls {name}, which reaches outside the data; remove it")
    if name in CHANGING:
        raise SpecError(
            f"{where} calls {name}, which gives another answer each time; use columns of the data, "
            "and the launch's as_of for today"
        )


def allowed_functions(added: Iterable[str]) -> frozenset[str]:
    """Names that a fleet's SQL may call, lower case.

    Args:
        added: names under `sql.functions`.

    Raises:
        SpecError: if one of them is known to do harm.
    """
    names = frozenset(name.lower() for name in added)
    for name in sorted(names):
        refuse_harmful(name, "sql.functions")
    return ALLOWED | names

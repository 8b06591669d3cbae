-- Tables computed from q, k and lse of a trace (kvtrace.derived), for the views to stand on. They
-- are empty until somebody asks: the first query that names one of them, or a view over them,
-- through kvtrace sql, Trace.sql() or the viewer computes them all, keeps them under cache/ and
-- in trace.duckdb, where any DuckDB client finds them from then on. `kvtrace sql T --derive` does
-- only that. Numbers are those of docs/policies.md.

CREATE TABLE request_tokens (
    request BIGINT, position INTEGER, row BIGINT, token_id INTEGER, text VARCHAR, source VARCHAR
);
COMMENT ON TABLE request_tokens IS 'Tokens of every request as it stood at the end: crops, beams and shared prefixes (table forks) followed. Computed at the first use.';
COMMENT ON COLUMN request_tokens.request IS 'The request.';
COMMENT ON COLUMN request_tokens.position IS 'Index in the request from 0.';
COMMENT ON COLUMN request_tokens.row IS 'The row that processed it, of another request where it came by a fork.';
COMMENT ON COLUMN request_tokens.token_id IS 'Number in the vocabulary; null where unknown.';
COMMENT ON COLUMN request_tokens.text IS 'The token''s text; null where no tokenizer was found.';
COMMENT ON COLUMN request_tokens.source IS 'prompt or generated.';

CREATE TABLE head_attention (
    request BIGINT, layer INTEGER, q_head INTEGER, kv_head INTEGER, queries INTEGER,
    entropy DOUBLE, entropy_share DOUBLE, sparsity DOUBLE, local_distance INTEGER,
    local_share DOUBLE, first_token_share DOUBLE
);
COMMENT ON TABLE head_attention IS 'Per request, layer and query head: means over the queries that were kept. Computed at the first use.';
COMMENT ON COLUMN head_attention.request IS 'The request.';
COMMENT ON COLUMN head_attention.layer IS 'The layer.';
COMMENT ON COLUMN head_attention.q_head IS 'The query head, by the model''s number.';
COMMENT ON COLUMN head_attention.kv_head IS 'The KV head it reads, by the model''s number.';
COMMENT ON COLUMN head_attention.queries IS 'Queries that were kept, over which the means are taken.';
COMMENT ON COLUMN head_attention.entropy IS 'Mean entropy of a row of attention, in nats: -sum a ln a.';
COMMENT ON COLUMN head_attention.entropy_share IS 'Mean of the entropy over its largest possible value, ln(visible keys): 1 is uniform, 0 is one key; over rows with at least two visible keys.';
COMMENT ON COLUMN head_attention.sparsity IS 'Mean share of visible keys that get less than 1% of the row''s largest attention.';
COMMENT ON COLUMN head_attention.local_distance IS 'w: 64 tokens, a quarter of the request where that is less; as for sinks.';
COMMENT ON COLUMN head_attention.local_share IS 'Mean share of attention on keys at most w positions away, itself included; null in cross attention.';
COMMENT ON COLUMN head_attention.first_token_share IS 'Mean share of attention on position 0, over queries more than w later that still see it; null in cross attention and where there are none.';

CREATE TABLE key_attention (
    request BIGINT, layer INTEGER, q_head INTEGER, kv_head INTEGER, position INTEGER,
    queries INTEGER, received FLOAT, uniform FLOAT, far_queries INTEGER, far_received FLOAT,
    seen_at_end BOOLEAN
);
COMMENT ON TABLE key_attention IS 'Per request, layer, query head and key: the attention it receives from the queries that were kept. Not of cross attention. Computed at the first use.';
COMMENT ON COLUMN key_attention.request IS 'The request.';
COMMENT ON COLUMN key_attention.layer IS 'The layer.';
COMMENT ON COLUMN key_attention.q_head IS 'The query head, by the model''s number.';
COMMENT ON COLUMN key_attention.kv_head IS 'The KV head of the key, by the model''s number.';
COMMENT ON COLUMN key_attention.position IS 'Position of the key in the request.';
COMMENT ON COLUMN key_attention.queries IS 'Kept queries that see the key.';
COMMENT ON COLUMN key_attention.received IS 'Attention from them, summed.';
COMMENT ON COLUMN key_attention.uniform IS 'What that would be were every query uniform over the keys it sees: sum of 1 / visible keys.';
COMMENT ON COLUMN key_attention.far_queries IS 'Of these queries, those more than w positions later (head_attention.local_distance).';
COMMENT ON COLUMN key_attention.far_received IS 'Attention from those, summed.';
COMMENT ON COLUMN key_attention.seen_at_end IS 'Whether the request''s last query can see the key: false where a sliding window has left it behind.';

CREATE TABLE trace_database (kvtrace_version VARCHAR, definitions VARCHAR);
COMMENT ON TABLE trace_database IS 'What made trace.duckdb: one row; none while a trace is being recorded.';
COMMENT ON COLUMN trace_database.kvtrace_version IS 'Version of kvtrace that made it.';
COMMENT ON COLUMN trace_database.definitions IS 'Digest of the definitions of tables and views; another one is a reason to make it again.';

-- Views over the tables of schema.sql and derived.sql: the questions people ask, under names they
-- would guess. Plain SQL that DuckDB 1.1 and later clients read from trace.duckdb as well; what
-- they cannot bind as 2.0 stores it is lag() with a default.

CREATE VIEW sink_tokens AS
SELECT
    k.request, k.layer, k.q_head, k.kv_head, k.position, t.row, t.token_id, t.text,
    k.far_received::DOUBLE / k.far_queries AS mean_attention, k.far_queries
FROM key_attention AS k LEFT JOIN request_tokens AS t USING (request, position)
WHERE k.far_queries > 0 AND k.far_received >= 0.1 * k.far_queries AND k.seen_at_end;
COMMENT ON VIEW sink_tokens IS 'Attention sinks: keys whose mean attention over the queries more than w positions later is at least 0.1 in a query head, and that the last query still sees.';
COMMENT ON COLUMN sink_tokens.request IS 'The request.';
COMMENT ON COLUMN sink_tokens.layer IS 'The layer.';
COMMENT ON COLUMN sink_tokens.q_head IS 'The query head, by the model''s number.';
COMMENT ON COLUMN sink_tokens.kv_head IS 'The KV head, by the model''s number.';
COMMENT ON COLUMN sink_tokens.position IS 'Position of the token in the request.';
COMMENT ON COLUMN sink_tokens.row IS 'The row that processed it.';
COMMENT ON COLUMN sink_tokens.token_id IS 'Number in the vocabulary.';
COMMENT ON COLUMN sink_tokens.text IS 'The token''s text.';
COMMENT ON COLUMN sink_tokens.mean_attention IS 'Mean attention over the queries more than w later: how strong the sink is.';
COMMENT ON COLUMN sink_tokens.far_queries IS 'How many these queries are.';

CREATE VIEW heavy_hitters AS
SELECT
    k.request, k.layer, k.q_head, k.kv_head, k.position, t.row, t.token_id, t.text,
    k.received, k.received::DOUBLE / k.uniform AS times_uniform
FROM key_attention AS k LEFT JOIN request_tokens AS t USING (request, position)
WHERE k.uniform > 0 AND k.received >= 5 * k.uniform
    AND NOT (k.far_queries > 0 AND k.far_received >= 0.1 * k.far_queries AND k.seen_at_end);
COMMENT ON VIEW heavy_hitters IS 'Keys that receive at least 5 times what uniform attention would give them in a query head, sinks left out.';
COMMENT ON COLUMN heavy_hitters.request IS 'The request.';
COMMENT ON COLUMN heavy_hitters.layer IS 'The layer.';
COMMENT ON COLUMN heavy_hitters.q_head IS 'The query head, by the model''s number.';
COMMENT ON COLUMN heavy_hitters.kv_head IS 'The KV head, by the model''s number.';
COMMENT ON COLUMN heavy_hitters.position IS 'Position of the token in the request.';
COMMENT ON COLUMN heavy_hitters.row IS 'The row that processed it.';
COMMENT ON COLUMN heavy_hitters.token_id IS 'Number in the vocabulary.';
COMMENT ON COLUMN heavy_hitters.text IS 'The token''s text.';
COMMENT ON COLUMN heavy_hitters.received IS 'Attention received from all kept queries, summed.';
COMMENT ON COLUMN heavy_hitters.times_uniform IS 'That over the uniform expectation.';

CREATE VIEW head_summary AS
WITH keys AS (
    SELECT
        request, layer, q_head, sum(received) AS received,
        sum(received) FILTER (WHERE far_queries > 0 AND far_received >= 0.1 * far_queries
            AND seen_at_end) AS of_sinks,
        count(*) FILTER (WHERE far_queries > 0 AND far_received >= 0.1 * far_queries
            AND seen_at_end) AS sinks
    FROM key_attention GROUP BY request, layer, q_head
), heavy AS (
    SELECT request, layer, q_head, count(*) AS heavy_hitters, sum(received) AS of_heavy
    FROM heavy_hitters GROUP BY request, layer, q_head
)
SELECT
    h.request, h.layer, h.q_head, h.kv_head, h.queries, h.entropy, h.entropy_share, h.sparsity,
    h.local_share, h.first_token_share,
    CASE WHEN keys.received > 0 THEN coalesce(keys.of_sinks, 0) / keys.received END AS sink_share,
    keys.sinks,
    CASE WHEN keys.received > 0 THEN coalesce(heavy.of_heavy, 0) / keys.received END
        AS heavy_share,
    CASE WHEN keys.received IS NOT NULL THEN coalesce(heavy.heavy_hitters, 0) END AS heavy_hitters
FROM head_attention AS h
    LEFT JOIN keys USING (request, layer, q_head)
    LEFT JOIN heavy USING (request, layer, q_head);
COMMENT ON VIEW head_summary IS 'What each query head does in each request: how spread out, how sparse, how local, and how much it gives to sinks.';
COMMENT ON COLUMN head_summary.request IS 'The request.';
COMMENT ON COLUMN head_summary.layer IS 'The layer.';
COMMENT ON COLUMN head_summary.q_head IS 'The query head, by the model''s number.';
COMMENT ON COLUMN head_summary.kv_head IS 'The KV head it reads, by the model''s number.';
COMMENT ON COLUMN head_summary.queries IS 'Queries that were kept, over which the means are taken.';
COMMENT ON COLUMN head_summary.entropy IS 'Mean entropy of a row of attention, in nats.';
COMMENT ON COLUMN head_summary.entropy_share IS 'Mean of the entropy over ln(visible keys): 1 is uniform, 0 is one key.';
COMMENT ON COLUMN head_summary.sparsity IS 'Mean share of visible keys that get less than 1% of the row''s largest attention.';
COMMENT ON COLUMN head_summary.local_share IS 'Mean share of attention on keys at most w positions away (64, or a quarter of the request), itself included.';
COMMENT ON COLUMN head_summary.first_token_share IS 'Mean share of attention on position 0, over queries more than w later.';
COMMENT ON COLUMN head_summary.sink_share IS 'Share of all attention on keys that goes to the head''s sinks.';
COMMENT ON COLUMN head_summary.sinks IS 'How many keys are sinks.';
COMMENT ON COLUMN head_summary.heavy_share IS 'Share of all attention on keys that goes to the head''s heavy hitters.';
COMMENT ON COLUMN head_summary.heavy_hitters IS 'How many keys are heavy hitters.';

CREATE VIEW kv_memory AS
WITH step_requests AS (
    SELECT step, request, count(*) OVER (PARTITION BY step) AS batch
    FROM (SELECT DISTINCT step, request FROM rows)
), of_step AS (
    -- What happens to a layer between steps happens to those whose step filled it.
    SELECT
        *, coalesce(step, last_value(step IGNORE NULLS) OVER (
            PARTITION BY layer ORDER BY ts_ns ROWS UNBOUNDED PRECEDING
        )) AS owner
    FROM kv_events
    WHERE block IS NULL AND layer IS NOT NULL AND bytes IS NOT NULL
), cached AS (
    -- A cache of whole layers: its tensors hold every sequence of the batch in equal parts.
    SELECT
        e.ts_ns, e.step, coalesce(e.request, s.request) AS request, e.layer, e.device, e.tokens,
        e.bytes // coalesce(s.batch, 1) AS bytes
    FROM of_step AS e
        LEFT JOIN step_requests AS s ON s.step = e.owner AND e.request IS NULL
), left_behind AS (
    -- A layer that has moved is gone from where it was.
    SELECT ts_ns, step, request, layer, before AS device, 0 AS tokens, 0::BIGINT AS bytes
    FROM (
        SELECT *, lag(device) OVER (PARTITION BY request, layer ORDER BY ts_ns) AS before
        FROM cached
    )
    WHERE before <> device
), freed AS (
    SELECT e.ts_ns, e.step, e.request, c.layer, c.device, 0 AS tokens, 0::BIGINT AS bytes
    FROM kv_events AS e
        JOIN (SELECT DISTINCT request, layer, device FROM cached) AS c USING (request)
    WHERE e.event = 'free' AND e.block IS NULL AND e.layer IS NULL
), layered AS (
    SELECT
        ts_ns, step, request, layer, device, tokens,
        bytes - coalesce(lag(bytes) OVER held, 0) AS change,
        bytes - coalesce(lag(bytes) OVER held, 0) AS on_device
    FROM (FROM cached UNION ALL FROM left_behind UNION ALL FROM freed)
    WINDOW held AS (PARTITION BY request, layer, device ORDER BY ts_ns)
), blocked AS (
    SELECT
        ts_ns, step, request, NULL::INTEGER AS layer, device, tokens,
        CASE
            WHEN request IS NULL THEN 0
            WHEN event IN ('allocate', 'share', 'fork', 'offload', 'restore') THEN block_bytes
            WHEN event = 'free' THEN -block_bytes
            ELSE 0
        END AS change,
        bytes - coalesce(lag(bytes) OVER (
            PARTITION BY block, device, cache_group ORDER BY ts_ns
        ), 0) AS on_device
    FROM (
        SELECT *, max(bytes) OVER (PARTITION BY block, device, cache_group) AS block_bytes
        FROM kv_events
        WHERE block IS NOT NULL AND bytes IS NOT NULL
    )
), changes AS (
    SELECT
        step, request, layer, device, max(ts_ns) AS ts_ns, max(tokens) AS tokens,
        sum(change) AS change, sum(on_device) AS on_device
    FROM (FROM layered UNION ALL FROM blocked)
    -- Between steps every moment stands for itself.
    GROUP BY step, request, layer, device, CASE WHEN step IS NULL THEN ts_ns END
)
SELECT
    step, ts_ns, request, layer, device,
    (sum(change) OVER (PARTITION BY request, layer, device ORDER BY ts_ns))::BIGINT AS bytes,
    change::BIGINT AS change_bytes,
    (sum(on_device) OVER (PARTITION BY device ORDER BY ts_ns))::BIGINT AS device_bytes
FROM changes;
COMMENT ON VIEW kv_memory IS 'KV memory as it changes: one row per step (or moment between steps), request, layer and device.';
COMMENT ON COLUMN kv_memory.step IS 'The step of the change; null between steps, such as when a cache is let go.';
COMMENT ON COLUMN kv_memory.ts_ns IS 'When.';
COMMENT ON COLUMN kv_memory.request IS 'The request; null where memory belongs to none, such as cached blocks.';
COMMENT ON COLUMN kv_memory.layer IS 'The layer; null of blocks, which hold all layers of their group.';
COMMENT ON COLUMN kv_memory.device IS 'Where the memory is; cpu swap: the pool that blocks are offloaded to.';
COMMENT ON COLUMN kv_memory.bytes IS 'Bytes that the request holds after it, in this layer on this device. Of a batch an equal part; a block that several requests share counts for each.';
COMMENT ON COLUMN kv_memory.change_bytes IS 'By how much that changed.';
COMMENT ON COLUMN kv_memory.device_bytes IS 'Bytes held on the device after it by all requests and layers, each block once.';

CREATE VIEW request_timeline AS
WITH spans AS (
    SELECT
        r.request, r.step, any_value(s.phase) AS phase, any_value(s.started_ns) AS started_ns,
        any_value(s.duration_ns) AS duration_ns, any_value(s.batch_size) AS batch_size,
        any_value(s.num_tokens) AS step_tokens, count(*) AS tokens, max(r.position) + 1 AS context
    FROM rows AS r JOIN steps AS s USING (step)
    GROUP BY r.request, r.step
)
SELECT
    request, step, phase, batch_size, tokens, step_tokens, context AS context_tokens,
    started_ns,
    (started_ns - min(started_ns) OVER own) / 1e6 AS start_ms,
    duration_ns / 1e6 AS duration_ms,
    (started_ns - lag(started_ns + duration_ns) OVER in_order) / 1e6 AS wait_ms
FROM spans
WINDOW own AS (PARTITION BY request), in_order AS (PARTITION BY request ORDER BY started_ns);
COMMENT ON VIEW request_timeline IS 'Every step of every request: when, how long, and how many of its tokens.';
COMMENT ON COLUMN request_timeline.request IS 'The request.';
COMMENT ON COLUMN request_timeline.step IS 'The step.';
COMMENT ON COLUMN request_timeline.phase IS 'prefill, decode, mixed or train.';
COMMENT ON COLUMN request_timeline.batch_size IS 'Sequences in the step.';
COMMENT ON COLUMN request_timeline.tokens IS 'Tokens of the request that the step processed.';
COMMENT ON COLUMN request_timeline.step_tokens IS 'Tokens of all requests that it processed.';
COMMENT ON COLUMN request_timeline.context_tokens IS 'Tokens of the request so far, these included.';
COMMENT ON COLUMN request_timeline.started_ns IS 'When the step began.';
COMMENT ON COLUMN request_timeline.start_ms IS 'The same, from the request''s first step on.';
COMMENT ON COLUMN request_timeline.duration_ms IS 'Wall time of the step; on a GPU the time to enqueue it.';
COMMENT ON COLUMN request_timeline.wait_ms IS 'From the end of the request''s step before to the beginning of this one; null in the first.';

CREATE VIEW request_latency AS
WITH spans AS (
    SELECT t.*, q.prompt_tokens, t.start_ms + t.duration_ms AS end_ms
    FROM request_timeline AS t JOIN requests AS q USING (request)
), ends AS (
    SELECT
        request, any_value(prompt_tokens) AS prompt_tokens, max(context_tokens) AS tokens,
        count(*) AS steps, max(end_ms) AS total_ms, min(started_ns) AS started_ns,
        min(end_ms) FILTER (WHERE context_tokens >= prompt_tokens) AS prefill_ms,
        count(*) FILTER (WHERE context_tokens > prompt_tokens) AS decode_steps
    FROM spans GROUP BY request
)
SELECT
    request, prompt_tokens, tokens - prompt_tokens AS generated_tokens, steps, started_ns,
    prefill_ms AS time_to_first_token_ms,
    CASE WHEN decode_steps > 0 THEN (total_ms - prefill_ms) / decode_steps END
        AS time_per_output_token_ms,
    total_ms,
    CASE WHEN total_ms > prefill_ms
        THEN 1000 * (tokens - prompt_tokens) / (total_ms - prefill_ms) END AS tokens_per_second
FROM ends;
COMMENT ON VIEW request_latency IS 'One row per request: how long it took, in the words of serving.';
COMMENT ON COLUMN request_latency.request IS 'The request.';
COMMENT ON COLUMN request_latency.prompt_tokens IS 'Tokens of its prompt.';
COMMENT ON COLUMN request_latency.generated_tokens IS 'Generated tokens that were processed; the last sampled one is not.';
COMMENT ON COLUMN request_latency.steps IS 'Steps it took part in.';
COMMENT ON COLUMN request_latency.started_ns IS 'When its first step began.';
COMMENT ON COLUMN request_latency.time_to_first_token_ms IS 'From the beginning of its first step to the end of the step that processed the last of its prompt.';
COMMENT ON COLUMN request_latency.time_per_output_token_ms IS 'Mean time between generated tokens, from there on.';
COMMENT ON COLUMN request_latency.total_ms IS 'From the beginning of its first step to the end of its last.';
COMMENT ON COLUMN request_latency.tokens_per_second IS 'Generated tokens per second, after the prompt.';

CREATE VIEW replay_compare AS
WITH known AS (
    SELECT
        budget, decide_when,
        max(bound) AS head, max(bound_layer) AS layer, max(bound_model) AS model,
        max(retained_mass) FILTER (WHERE policy = 'top_k') AS read
    FROM replays GROUP BY budget, decide_when
),

bounds AS (
    UNPIVOT known ON head, layer, model, read INTO NAME bound_scope VALUE bound
)
SELECT
    r.budget, r.decide_when,
    rank() OVER (PARTITION BY r.budget, r.decide_when
        ORDER BY r.retained_mass DESC NULLS LAST) AS place,
    r.policy, r.replay, r.exactness, r.retained_mass, r.mass_p5,
    max(r.retained_mass) FILTER (WHERE r.evictions > 0)
        OVER (PARTITION BY r.budget, r.decide_when) - r.retained_mass AS behind_best,
    b.bound,
    1 - b.bound AS lost_to_capacity,
    CASE WHEN r.evictions > 0 OR r.bound_scope = 'read' THEN b.bound - r.retained_mass END
        AS lost_to_policy,
    CASE WHEN r.hits + r.misses > 0 THEN r.hits / (r.hits + r.misses) END AS hit_rate,
    r.hits, r.misses, r.evictions,
    CASE WHEN r.sinks > 0 THEN r.retained_sinks / r.sinks END AS retained_sink_share,
    r.output_error, r.ties
FROM replays AS r LEFT JOIN bounds AS b USING (budget, decide_when, bound_scope);
COMMENT ON VIEW replay_compare IS 'Replays side by side: policies of one budget and one moment of decision, ranked by retained mass.';
COMMENT ON COLUMN replay_compare.budget IS 'Tokens per KV head (N), or the share of the tokens present (P%).';
COMMENT ON COLUMN replay_compare.decide_when IS 'When the policy decided: prefill, step, every=N, stream, chunk=N or chunk (the recorded chunks).';
COMMENT ON COLUMN replay_compare.place IS 'Place among the replays of this budget and moment, 1 retains most.';
COMMENT ON COLUMN replay_compare.policy IS 'The policy as the user wrote it.';
COMMENT ON COLUMN replay_compare.replay IS 'The replay''s name.';
COMMENT ON COLUMN replay_compare.exactness IS 'E0, E1, E2, E2s or E3: see docs/policies.md.';
COMMENT ON COLUMN replay_compare.retained_mass IS 'Mean share of attention that stays on kept keys.';
COMMENT ON COLUMN replay_compare.mass_p5 IS '5th percentile of the same.';
COMMENT ON COLUMN replay_compare.behind_best IS 'How much less than the best that evicts anything; below 0 for a policy that evicts nothing.';
COMMENT ON COLUMN replay_compare.bound IS 'The most that any policy can retain under this budget that may move it as this one does (the oracle''s), or that reads as much a query (what top_k retains); null where that was not replayed, or no bound holds for the policy.';
COMMENT ON COLUMN replay_compare.lost_to_capacity IS '1 - bound: what no such policy could have kept.';
COMMENT ON COLUMN replay_compare.lost_to_policy IS 'bound - retained_mass: what at most a better policy could have kept; null where nothing was evicted, unless queries choose.';
COMMENT ON COLUMN replay_compare.hit_rate IS 'hits / (hits + misses).';
COMMENT ON COLUMN replay_compare.hits IS 'Needed and kept (query, key) pairs.';
COMMENT ON COLUMN replay_compare.misses IS 'Needed and evicted pairs.';
COMMENT ON COLUMN replay_compare.evictions IS 'Slots evicted.';
COMMENT ON COLUMN replay_compare.retained_sink_share IS 'Share of the sinks still held at the end; null where there are none.';
COMMENT ON COLUMN replay_compare.output_error IS 'Mean relative error of the attention output; null without v.';
COMMENT ON COLUMN replay_compare.ties IS 'Cuts whose margin was 0.';

CREATE VIEW evicted_but_needed AS
SELECT
    w.replay, w.request, w.layer, r.kv_head, w.q_head, w.position, t.text, r.evicted_at,
    w.query, u.text AS query_text, w.attention, r.regret, r.misses
FROM replay_wants w
JOIN replay_regrets r USING (replay, request, layer, q_head, position)
-- By row: a forked sequence has rows of other requests.
LEFT JOIN tokens t ON t.row = w.row
LEFT JOIN tokens u ON u.row = w.query_row;
COMMENT ON VIEW evicted_but_needed IS 'Per evicted token and query head, the queries that needed it most: their text, and the attention they pay in the full cache. Filled by kvtrace replay --regret.';
COMMENT ON COLUMN evicted_but_needed.replay IS 'The replay.';
COMMENT ON COLUMN evicted_but_needed.request IS 'The request.';
COMMENT ON COLUMN evicted_but_needed.layer IS 'The layer.';
COMMENT ON COLUMN evicted_but_needed.kv_head IS 'The KV head that lost the token, by the model''s number.';
COMMENT ON COLUMN evicted_but_needed.q_head IS 'The query head that wanted it, by the model''s number.';
COMMENT ON COLUMN evicted_but_needed.position IS 'Position of the evicted token.';
COMMENT ON COLUMN evicted_but_needed.text IS 'Its text.';
COMMENT ON COLUMN evicted_but_needed.evicted_at IS 'Position of the query after whose row it was evicted.';
COMMENT ON COLUMN evicted_but_needed.query IS 'Position of the query that needed it.';
COMMENT ON COLUMN evicted_but_needed.query_text IS 'That query''s text.';
COMMENT ON COLUMN evicted_but_needed.attention IS 'What the query pays to it in the full cache.';
COMMENT ON COLUMN evicted_but_needed.regret IS 'Attention that all later queries of the head pay to it, summed.';
COMMENT ON COLUMN evicted_but_needed.misses IS 'Later queries of the head that needed it.';

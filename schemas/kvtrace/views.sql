-- Views over the tables of schema.sql: answers that take a join. Part of every trace, open or closed.

CREATE VIEW evicted_but_needed AS
SELECT
    w.replay, w.request, w.layer, r.kv_head, w.q_head, w.position, t.text, r.evicted_at,
    w.query, u.text AS query_text, w.attention, r.regret, r.misses
FROM replay_wants w
JOIN replay_regrets r USING (replay, request, layer, q_head, position)
-- By row: a forked sequence has rows of other requests. Ranks number their rows alike.
LEFT JOIN tokens t ON t.row = w.row AND t.request // 1000000000 = w.request // 1000000000
LEFT JOIN tokens u ON u.row = w.query_row AND u.request // 1000000000 = w.request // 1000000000;
COMMENT ON VIEW evicted_but_needed IS 'Per evicted token and query head, the queries that needed it most: their text, and the attention they pay in the full cache. Filled by kvtrace replay --regret.';

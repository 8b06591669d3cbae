-- The tables of a trace. This file is their only definition: the Arrow schemas that writers use,
-- trace.duckdb and the reference page are all made from it. Types are DuckDB's; times are
-- nanoseconds of the recording machine's wall clock (time.time_ns) unless a comment says otherwise.

CREATE TABLE runs (
    run INTEGER, source VARCHAR, kvtrace_version VARCHAR, started_ns BIGINT, command VARCHAR,
    host VARCHAR, pid INTEGER, python VARCHAR, torch VARCHAR, transformers VARCHAR,
    detail VARCHAR, dtype VARCHAR, selection VARCHAR, merged_from VARCHAR
);
COMMENT ON TABLE runs IS 'One row per recording process.';
COMMENT ON COLUMN runs.kvtrace_version IS 'Version of kvtrace that wrote it.';
COMMENT ON COLUMN runs.started_ns IS 'When the recording began.';
COMMENT ON COLUMN runs.command IS 'The recorded command line, as a JSON list.';
COMMENT ON COLUMN runs.host IS 'Name of the machine.';
COMMENT ON COLUMN runs.pid IS 'Process id of the recorded program.';
COMMENT ON COLUMN runs.python IS 'Version of Python.';
COMMENT ON COLUMN runs.torch IS 'Version of torch; null where none was used.';
COMMENT ON COLUMN runs.transformers IS 'Version of transformers; null where none was used.';
COMMENT ON COLUMN runs.run IS 'The rank of the recording process; numbers of rows, steps, requests, models and blocks of rank r begin at r * 1,000,000,000.';
COMMENT ON COLUMN runs.source IS 'recorded: taken from real inference; imported: from an outside file; synthetic: made up, for tests.';
COMMENT ON COLUMN runs.detail IS 'What was asked for: events, summary, qk or qkv.';
COMMENT ON COLUMN runs.selection IS 'Of that, what was asked for, as JSON: layers, heads (KV heads), queries, max_bytes; null where all.';
COMMENT ON COLUMN runs.merged_from IS 'Where kvtrace merge took this rank from, as JSON: trace, rank, and the trace''s own command; null where it was recorded into this trace.';
COMMENT ON COLUMN runs.dtype IS 'Storage type of q, k and v: float16 or float32.';

CREATE TABLE models (
    model BIGINT, name VARCHAR, architecture VARCHAR, num_layers INTEGER, hidden_size INTEGER,
    vocab_size INTEGER, num_parameters BIGINT, dtype VARCHAR, device VARCHAR,
    attn_implementation VARCHAR, config VARCHAR
);
COMMENT ON TABLE models IS 'One row per model seen.';
COMMENT ON COLUMN models.model IS 'Its number.';
COMMENT ON COLUMN models.name IS 'Name or path it was loaded from.';
COMMENT ON COLUMN models.architecture IS 'Class of the model.';
COMMENT ON COLUMN models.num_layers IS 'Attention layers, by its configuration.';
COMMENT ON COLUMN models.hidden_size IS 'Width of the hidden states.';
COMMENT ON COLUMN models.vocab_size IS 'Tokens of the vocabulary.';
COMMENT ON COLUMN models.num_parameters IS 'Parameters, shared ones once.';
COMMENT ON COLUMN models.device IS 'Where its parameters were.';
COMMENT ON COLUMN models.attn_implementation IS 'The attention kernel: eager, sdpa, flash_attention_2, ...';
COMMENT ON COLUMN models.dtype IS 'Type the model computed in, before storage.';
COMMENT ON COLUMN models.config IS 'The model''s configuration as JSON.';

CREATE TABLE layers (
    model BIGINT, layer INTEGER, attention_kind VARCHAR, num_q_heads INTEGER, num_kv_heads INTEGER,
    head_dim INTEGER, value_dim INTEGER, scale DOUBLE, sliding_window INTEGER, softcap DOUBLE,
    has_sinks BOOLEAN, rope_theta DOUBLE, array_group INTEGER, array_index INTEGER,
    name VARCHAR, kv_heads INTEGER[], alibi_slopes DOUBLE[], position_bias DOUBLE[][],
    model_kv_heads INTEGER
);
COMMENT ON TABLE layers IS 'One row per attention layer.';
COMMENT ON COLUMN layers.model IS 'The model it belongs to.';
COMMENT ON COLUMN layers.layer IS 'Its number in the model, from 0.';
COMMENT ON COLUMN layers.num_q_heads IS 'Query heads that were kept.';
COMMENT ON COLUMN layers.num_kv_heads IS 'KV heads that were kept; num_q_heads / num_kv_heads query heads share one.';
COMMENT ON COLUMN layers.head_dim IS 'Width of a query and a key.';
COMMENT ON COLUMN layers.value_dim IS 'Width of a value.';
COMMENT ON COLUMN layers.softcap IS 'Scores s become softcap * tanh(s / softcap); null without.';
COMMENT ON COLUMN layers.has_sinks IS 'Whether the heads have a learned sink logit, so that attention on keys sums to less than 1.';
COMMENT ON COLUMN layers.rope_theta IS 'Base of the rotary embedding; null without.';
COMMENT ON COLUMN layers.attention_kind IS 'full, sliding, bidirectional (an encoder: every token sees every token), or cross (queries of the request, keys and values of its encoder_request).';
COMMENT ON COLUMN layers.scale IS 'Factor on q k^T before the softmax.';
COMMENT ON COLUMN layers.sliding_window IS 'Keys a query can see, itself included; null when all.';
COMMENT ON COLUMN layers.array_group IS 'Layers of one shape share arrays: group 0 is q, k, v, lse; group n is q_n, k_n, ...';
COMMENT ON COLUMN layers.array_index IS 'Index of this layer on axis 1 of its group''s arrays.';
COMMENT ON COLUMN layers.name IS 'The attention module''s name in the model; null where unknown.';
COMMENT ON COLUMN layers.kv_heads IS 'The model''s numbers of the KV heads that were kept, with their query heads; null when all.';
COMMENT ON COLUMN layers.model_kv_heads IS 'KV heads of the layer in the whole model, where this process ran only some of them, as under tensor parallelism: kv_heads says which, or is null where that is not known. Null where it ran all.';
COMMENT ON COLUMN layers.alibi_slopes IS 'Per query head, added to the scaled score times (key position - query position); null without ALiBi.';
COMMENT ON COLUMN layers.position_bias IS 'Per query head, added to the scaled score by (key position - query position), from -d to d in 2 d + 1 numbers; farther keys take the first or the last. Null without a learned bias.';

CREATE TABLE requests (
    request BIGINT, run INTEGER, model BIGINT, external_id VARCHAR, batch_index INTEGER,
    prompt_tokens INTEGER, started_ns BIGINT, encoder_request BIGINT, output_tokens INTEGER,
    block_size INTEGER, namespace VARCHAR, arrived_ns BIGINT
);
COMMENT ON TABLE requests IS 'One row per sequence: a batch of four is four requests.';
COMMENT ON COLUMN requests.request IS 'Its number.';
COMMENT ON COLUMN requests.run IS 'The process that ran it.';
COMMENT ON COLUMN requests.model IS 'The model that ran it.';
COMMENT ON COLUMN requests.batch_index IS 'Its row in the batch; null under continuous batching.';
COMMENT ON COLUMN requests.started_ns IS 'When its first step began.';
COMMENT ON COLUMN requests.external_id IS 'The serving API''s id, of imported events the session; null where there is none.';
COMMENT ON COLUMN requests.prompt_tokens IS 'Tokens of the prompt, padding not counted.';
COMMENT ON COLUMN requests.encoder_request IS 'The request whose tokens the cross attention reads; null without.';
COMMENT ON COLUMN requests.started_ns IS 'When it came; of an imported workload on the clock of its source, which often begins at 0.';
COMMENT ON COLUMN requests.output_tokens IS 'Tokens that were generated, of an imported workload; null otherwise.';
COMMENT ON COLUMN requests.block_size IS 'Tokens of a full block, of an imported workload; null otherwise.';
COMMENT ON COLUMN requests.arrived_ns IS 'When a recorded scheduler was given it, to wait for its first step; null where that is not known.';
COMMENT ON COLUMN requests.namespace IS 'Where the request''s block hashes are valid (a conversation, a model); null where everywhere.';

CREATE TABLE forks (
    row BIGINT, request BIGINT, source BIGINT, tokens INTEGER
);
COMMENT ON TABLE forks IS 'Where a sequence is not the plain list of its own rows: before row `row` was processed, `request` became the first `tokens` tokens of `source` as that stood then. A crop is a fork of itself, a beam that changes its parent a fork of the other beam, a shared prefix a fork of the request that computed it. Forks of one row happen at once: each finds its source as it stood before all of them.';
COMMENT ON COLUMN forks.row IS 'The first row processed after.';
COMMENT ON COLUMN forks.request IS 'The request that changed.';
COMMENT ON COLUMN forks.source IS 'The request it went on from; itself for a crop.';
COMMENT ON COLUMN forks.tokens IS 'Tokens taken from the source.';

CREATE TABLE tokens (
    request BIGINT, position INTEGER, token_id INTEGER, text VARCHAR, source VARCHAR, row BIGINT
);
COMMENT ON TABLE tokens IS 'Every token the model processed; the last sampled one has no key yet and is not here.';
COMMENT ON COLUMN tokens.request IS 'The request it was processed for.';
COMMENT ON COLUMN tokens.token_id IS 'Number in the vocabulary; null where unknown.';
COMMENT ON COLUMN tokens.position IS 'Index in the request from 0, padding not counted.';
COMMENT ON COLUMN tokens.text IS 'The token''s text, special tokens by name; null where no tokenizer was found.';
COMMENT ON COLUMN tokens.source IS 'prompt or generated.';
COMMENT ON COLUMN tokens.row IS 'The row that processed it.';

CREATE TABLE steps (
    step BIGINT, run INTEGER, model BIGINT, phase VARCHAR, batch_size INTEGER,
    num_tokens INTEGER, started_ns BIGINT, duration_ns BIGINT, training_step BIGINT
);
COMMENT ON TABLE steps IS 'One row per forward pass of a model.';
COMMENT ON COLUMN steps.step IS 'Its number.';
COMMENT ON COLUMN steps.run IS 'The process that ran it.';
COMMENT ON COLUMN steps.model IS 'The model that ran.';
COMMENT ON COLUMN steps.batch_size IS 'Sequences in the batch.';
COMMENT ON COLUMN steps.started_ns IS 'When the forward pass began.';
COMMENT ON COLUMN steps.phase IS 'prefill, decode, mixed (continuous batching: both in one step), or train.';
COMMENT ON COLUMN steps.training_step IS 'Optimizer steps taken before; null outside training.';
COMMENT ON COLUMN steps.num_tokens IS 'Tokens processed by the step over the whole batch, padding not counted.';
COMMENT ON COLUMN steps.duration_ns IS 'Wall time of the forward pass; on a GPU the time to enqueue it.';

CREATE TABLE rows (
    row BIGINT, step BIGINT, request BIGINT, position INTEGER, has_query BOOLEAN
);
COMMENT ON TABLE rows IS 'One row per token processed: axis 0 of every array.';
COMMENT ON COLUMN rows.row IS 'Row r * 1,000,000,000 + n is index n on axis 0 of the arrays of rank r.';
COMMENT ON COLUMN rows.step IS 'The step that processed it.';
COMMENT ON COLUMN rows.request IS 'The request it was processed for.';
COMMENT ON COLUMN rows.position IS 'Index in the request from 0, padding not counted.';
COMMENT ON COLUMN rows.has_query IS 'Whether q and lse were kept for this token; they are NaN where not.';

CREATE TABLE kv_events (
    ts_ns BIGINT, step BIGINT, request BIGINT, layer INTEGER, block BIGINT, event VARCHAR,
    tokens INTEGER, bytes BIGINT, device VARCHAR, cache_group INTEGER, block_index INTEGER
);
COMMENT ON TABLE kv_events IS 'What happened to KV memory.';
COMMENT ON COLUMN kv_events.ts_ns IS 'Of imported events the clock of their source, each a nanosecond later than the one before in its message, so that their order is kept.';
COMMENT ON COLUMN kv_events.request IS 'Null where the event concerns the whole batch.';
COMMENT ON COLUMN kv_events.step IS 'The step that the event came with, or before; null between steps.';
COMMENT ON COLUMN kv_events.layer IS 'Null where the event concerns all layers, or all of a cache group: free, and events of a block.';
COMMENT ON COLUMN kv_events.event IS 'Of a whole cache: grow, crop, reorder, offload, restore, free. Of a block: allocate, share, fork, free, evict, offload, restore, store, touch, remove. Of a pool: reset, clear; a reset with a request: its cache was given up and its tokens will be processed again; a clear with a block: it lay there.';
COMMENT ON COLUMN kv_events.block IS 'The block, for events of one block; table blocks describes it.';
COMMENT ON COLUMN kv_events.cache_group IS 'Group of layers that share block tables; null where there is one.';
COMMENT ON COLUMN kv_events.block_index IS 'Index of the block in the request''s block table; null where it stands in none.';
COMMENT ON COLUMN kv_events.tokens IS 'Token slots held after the event: by the layer, or by the block.';
COMMENT ON COLUMN kv_events.bytes IS 'Bytes held after the event by this layer, keys and values, over the whole batch, padding counted. Of a block: by all layers of its cache group; above 0 after a free where others share the block or it stays cached.';
COMMENT ON COLUMN kv_events.device IS 'Where the memory is, null where the source of imported events does not say; cpu swap: the pool that blocks are offloaded to, whose blocks have numbers of their own.';

CREATE TABLE kv_pools (
    run INTEGER, model BIGINT, cache_group INTEGER, block_size INTEGER, num_blocks BIGINT,
    bytes_per_block BIGINT, first_block BIGINT, max_batch_tokens INTEGER, max_batch_size INTEGER,
    scheduler VARCHAR, safety_margin DOUBLE, prefix_caching BOOLEAN, swap_blocks BIGINT
);
COMMENT ON TABLE kv_pools IS 'One row per paged cache and group of layers: what its pool and its scheduler were set to.';
COMMENT ON COLUMN kv_pools.run IS 'The process that ran it.';
COMMENT ON COLUMN kv_pools.model IS 'The model whose cache it is.';
COMMENT ON COLUMN kv_pools.cache_group IS 'Group of layers that share block tables; null where there is one.';
COMMENT ON COLUMN kv_pools.block_size IS 'Tokens that a full block holds.';
COMMENT ON COLUMN kv_pools.num_blocks IS 'Blocks that the group can have; groups share one pool, and each could have all of it.';
COMMENT ON COLUMN kv_pools.bytes_per_block IS 'Keys and values of a block, all layers of the group.';
COMMENT ON COLUMN kv_pools.first_block IS 'The lowest number that a block has.';
COMMENT ON COLUMN kv_pools.max_batch_tokens IS 'Tokens that a step can process.';
COMMENT ON COLUMN kv_pools.max_batch_size IS 'Requests that a step can process.';
COMMENT ON COLUMN kv_pools.scheduler IS 'Which requests go first: fifo (those that decode, then those that prefill, then those that wait) or prefill_first.';
COMMENT ON COLUMN kv_pools.safety_margin IS 'Share of the pool that must be free for more than one prompt to be begun.';
COMMENT ON COLUMN kv_pools.prefix_caching IS 'Whether requests share the blocks of a common prefix.';
COMMENT ON COLUMN kv_pools.swap_blocks IS 'Blocks that fit where preempted requests are offloaded to; 0 where they are computed again.';

CREATE TABLE blocks (
    block BIGINT, hash VARCHAR, parent BIGINT, block_size INTEGER, token_ids INTEGER[],
    details VARCHAR
);
COMMENT ON TABLE blocks IS 'One row per block that its source told apart by content.';
COMMENT ON COLUMN blocks.block IS 'Its number, as kv_events gives it.';
COMMENT ON COLUMN blocks.token_ids IS 'The tokens it holds; null where the source does not say.';
COMMENT ON COLUMN blocks.hash IS 'The source''s own hash, as hexadecimal or decimal text.';
COMMENT ON COLUMN blocks.parent IS 'The block before it in the sequence; null for the first.';
COMMENT ON COLUMN blocks.block_size IS 'Tokens that a full block holds.';
COMMENT ON COLUMN blocks.details IS 'What else the source said (LoRA, cache group, keys beside the tokens), as JSON.';

CREATE TABLE block_accesses (
    request BIGINT, block_index INTEGER, content BIGINT, tokens INTEGER, is_output BOOLEAN
);
COMMENT ON TABLE block_accesses IS 'The blocks that each request of an imported workload asks for, in the order of the requests and of the tokens in them.';
COMMENT ON COLUMN block_accesses.request IS 'The request that accesses the block.';
COMMENT ON COLUMN block_accesses.block_index IS 'Index of the block in the request''s sequence.';
COMMENT ON COLUMN block_accesses.content IS 'What the block holds: accesses of one number may share one block. The source''s own id, or 64 bits of a hash of it where that is no such number or not valid everywhere.';
COMMENT ON COLUMN block_accesses.tokens IS 'Tokens in the block; fewer than requests.block_size in a last block that is not full.';
COMMENT ON COLUMN block_accesses.is_output IS 'Whether the block holds nothing but generated tokens.';

CREATE TABLE gaps (
    ts_ns BIGINT, step BIGINT, what VARCHAR, count BIGINT, reason VARCHAR
);
COMMENT ON TABLE gaps IS 'What the trace does not hold, when, and why.';
COMMENT ON COLUMN gaps.ts_ns IS 'When it was noticed.';
COMMENT ON COLUMN gaps.step IS 'The first step concerned; null outside steps.';
COMMENT ON COLUMN gaps.what IS 'What was lost or thinned: tokens, layer rows, lse, v values, ...';
COMMENT ON COLUMN gaps.reason IS 'Why, in words.';
COMMENT ON COLUMN gaps.count IS 'How many of what were lost.';

CREATE TABLE clock_sync (
    run INTEGER, event VARCHAR, wall_ns BIGINT, monotonic_ns BIGINT, spread_ns BIGINT,
    wall_error_ns BIGINT, clock_id VARCHAR
);
COMMENT ON TABLE clock_sync IS 'Both clocks of each recording process, noted at its start, about every ten seconds, and at its end: what aligns the times of several processes.';
COMMENT ON COLUMN clock_sync.run IS 'The rank that noted them.';
COMMENT ON COLUMN clock_sync.event IS 'start, commit or close.';
COMMENT ON COLUMN clock_sync.wall_ns IS 'The wall clock, by which all other times of the rank are.';
COMMENT ON COLUMN clock_sync.monotonic_ns IS 'The monotonic clock at that moment; one for all processes of one host.';
COMMENT ON COLUMN clock_sync.spread_ns IS 'How long reading both took: the two are of one moment to within this.';
COMMENT ON COLUMN clock_sync.wall_error_ns IS 'How far the wall clock may be off by the kernel''s own bound; null where no time service disciplines it.';
COMMENT ON COLUMN clock_sync.clock_id IS 'What tells one monotonic clock from another (boot and time namespace); null where the system does not say.';

CREATE TABLE verifications (
    model BIGINT, layer INTEGER, rows INTEGER, max_error DOUBLE, mean_error DOUBLE
);
COMMENT ON TABLE verifications IS 'Recorded with verify: attention outputs recomputed from what was recorded, against the model''s own.';
COMMENT ON COLUMN verifications.model IS 'The model.';
COMMENT ON COLUMN verifications.layer IS 'The layer.';
COMMENT ON COLUMN verifications.rows IS 'Query rows compared.';
COMMENT ON COLUMN verifications.max_error IS 'Largest relative error of a head''s output vector, ||recomputed - own|| / ||own||.';
COMMENT ON COLUMN verifications.mean_error IS 'Mean of the same.';

CREATE TABLE array_catalog (
    name VARCHAR, kind VARCHAR, array_group INTEGER, dtype VARCHAR, shape VARCHAR, axes VARCHAR
);
COMMENT ON TABLE array_catalog IS 'The Zarr arrays under arrays.zarr.';
COMMENT ON COLUMN array_catalog.name IS 'Its name.';
COMMENT ON COLUMN array_catalog.kind IS 'q, k, v, lse, q_prerope, key_norm, value_norm or received.';
COMMENT ON COLUMN array_catalog.array_group IS 'The group of equally shaped layers, as layers.array_group.';
COMMENT ON COLUMN array_catalog.dtype IS 'Stored type.';
COMMENT ON COLUMN array_catalog.axes IS 'Names of all axes, comma-separated.';
COMMENT ON COLUMN array_catalog.shape IS 'Shape behind axis 0 (row), as JSON.';

CREATE TABLE replays (
    replay VARCHAR, policy VARCHAR, parameters VARCHAR, budget VARCHAR, decide_when VARCHAR,
    exactness VARCHAR, created_ns BIGINT, tokens BIGINT, measured_rows BIGINT, hits BIGINT,
    misses BIGINT, evictions BIGINT, retained_mass DOUBLE, mass_p5 DOUBLE, mass_worst DOUBLE,
    sinks BIGINT, retained_sinks BIGINT, output_error DOUBLE, ties BIGINT, bound DOUBLE,
    rerotate BOOLEAN, overlap DOUBLE, bound_layer DOUBLE, bound_model DOUBLE, bound_scope VARCHAR,
    selects BOOLEAN
);
COMMENT ON TABLE replays IS 'One row per replayed policy and budget, over all requests, layers and heads.';
COMMENT ON COLUMN replays.budget IS 'Tokens per KV head (N), or the share of the tokens present (P%).';
COMMENT ON COLUMN replays.decide_when IS 'When the policy decided: prefill, step, every=N, stream, chunk=N or chunk (the recorded chunks).';
COMMENT ON COLUMN replays.created_ns IS 'When the replay ended.';
COMMENT ON COLUMN replays.mass_p5 IS '5th percentile of retained mass over query heads, layers and measured rows.';
COMMENT ON COLUMN replays.mass_worst IS 'The least of the same.';
COMMENT ON COLUMN replays.retained_sinks IS 'Of the sinks, those still held at the end.';
COMMENT ON COLUMN replays.selects IS 'Whether every query chose what it read, so that evicted_at tells what was stored. Null in older replays.';
COMMENT ON COLUMN replays.rerotate IS 'Whether kept tokens were renumbered by their place in the cache and their keys re-rotated: output_error and overlap are then of that. Null, as false, in older replays.';
COMMENT ON COLUMN replays.overlap IS 'Re-rotated: mean of what attention has in common with the full cache''s, sum_j min(a, a''); null otherwise, where it is retained_mass.';
COMMENT ON COLUMN replays.output_error IS 'Mean relative error of the attention output, ||o_S - o|| / ||o||; null without v.';
COMMENT ON COLUMN replays.ties IS 'Cuts, over layers and KV heads, whose margin was 0.';
COMMENT ON COLUMN replays.replay IS 'Name of the folder under replays/.';
COMMENT ON COLUMN replays.policy IS 'The policy as the user wrote it, parameters included.';
COMMENT ON COLUMN replays.parameters IS 'Every parameter, defaults too, as JSON.';
COMMENT ON COLUMN replays.exactness IS 'E0, E1, E2, E2s or E3: see docs/policies.md.';
COMMENT ON COLUMN replays.tokens IS 'Tokens in the replayed requests.';
COMMENT ON COLUMN replays.measured_rows IS 'Rows after the first cut, over which mass, hits and misses are taken.';
COMMENT ON COLUMN replays.hits IS 'Needed and kept (query, key) pairs, over query heads and layers.';
COMMENT ON COLUMN replays.misses IS 'Needed and evicted pairs.';
COMMENT ON COLUMN replays.evictions IS '(token, layer, KV head) slots evicted.';
COMMENT ON COLUMN replays.retained_mass IS 'Mean share of attention that stays on kept keys; null where no row follows the first cut.';
COMMENT ON COLUMN replays.sinks IS '(query head, key) sinks of the full cache.';
COMMENT ON COLUMN replays.bound IS 'Certified upper bound on retained_mass under this budget in every KV head (oracle only).';
COMMENT ON COLUMN replays.bound_layer IS 'The same where the heads of a layer share their budgets.';
COMMENT ON COLUMN replays.bound_model IS 'The same where all heads of all layers share their budgets.';
COMMENT ON COLUMN replays.bound_scope IS 'Which bound holds for this policy, of the oracle''s: head (bound), layer (bound_layer), model (bound_model), or read: what top_k retains; null: none, or an older replay.';

CREATE TABLE replay_steps (
    replay VARCHAR, request BIGINT, position INTEGER, mass DOUBLE, mass_worst DOUBLE, hits BIGINT,
    misses BIGINT, evictions BIGINT, held BIGINT
);
COMMENT ON TABLE replay_steps IS 'Per measured row: totals over layers and heads.';
COMMENT ON COLUMN replay_steps.replay IS 'The replay.';
COMMENT ON COLUMN replay_steps.request IS 'The request.';
COMMENT ON COLUMN replay_steps.mass IS 'Mean retained mass over layers and query heads.';
COMMENT ON COLUMN replay_steps.mass_worst IS 'The least of the same.';
COMMENT ON COLUMN replay_steps.hits IS 'Needed and kept pairs.';
COMMENT ON COLUMN replay_steps.misses IS 'Needed and evicted pairs.';
COMMENT ON COLUMN replay_steps.evictions IS 'Slots evicted at this row.';
COMMENT ON COLUMN replay_steps.position IS 'Position of the query token.';
COMMENT ON COLUMN replay_steps.held IS '(token, layer, KV head) slots held after the row''s cut.';

CREATE TABLE replay_ranks (
    replay VARCHAR, rank INTEGER, first_index BIGINT, rows BIGINT
);
COMMENT ON TABLE replay_ranks IS 'Where the rows of each rank stand on axis 0 of a replay''s evicted_at: rank after rank, as many as there were when it was made.';
COMMENT ON COLUMN replay_ranks.replay IS 'Name of the folder under replays/.';
COMMENT ON COLUMN replay_ranks.rank IS 'The recording process; see runs.run.';
COMMENT ON COLUMN replay_ranks.first_index IS 'Index of the rank''s first row.';
COMMENT ON COLUMN replay_ranks.rows IS 'Rows that the rank had.';

CREATE TABLE replay_gaps (
    replay VARCHAR, request BIGINT, first_position INTEGER, last_position INTEGER, count BIGINT,
    reason VARCHAR
);
COMMENT ON TABLE replay_gaps IS 'Rows that a replay left out because of gaps in the trace: a row per stretch of positions and reason. None where nothing is missing.';
COMMENT ON COLUMN replay_gaps.replay IS 'The replay.';
COMMENT ON COLUMN replay_gaps.request IS 'The request; null where the trace does not say whose rows were lost.';
COMMENT ON COLUMN replay_gaps.first_position IS 'Position of the first row; null where the trace does not say which were lost.';
COMMENT ON COLUMN replay_gaps.last_position IS 'Position of the last row.';
COMMENT ON COLUMN replay_gaps.count IS 'How many rows.';
COMMENT ON COLUMN replay_gaps.reason IS 'Why, and what was left out: the whole row, or its measuring.';

CREATE TABLE replay_heads (
    replay VARCHAR, layer INTEGER, kv_head INTEGER, mass DOUBLE, mass_p5 DOUBLE, mass_worst DOUBLE,
    hits BIGINT, misses BIGINT, evictions BIGINT, output_error DOUBLE, ties BIGINT, bound DOUBLE,
    overlap DOUBLE, bound_layer DOUBLE
);
COMMENT ON TABLE replay_heads IS 'Per layer and KV head: totals over the measured rows.';
COMMENT ON COLUMN replay_heads.replay IS 'The replay.';
COMMENT ON COLUMN replay_heads.layer IS 'The layer.';
COMMENT ON COLUMN replay_heads.kv_head IS 'The KV head, by the model''s number.';
COMMENT ON COLUMN replay_heads.mass IS 'Mean retained mass over its query heads and the rows.';
COMMENT ON COLUMN replay_heads.mass_p5 IS '5th percentile of the same.';
COMMENT ON COLUMN replay_heads.mass_worst IS 'The least of the same.';
COMMENT ON COLUMN replay_heads.hits IS 'Needed and kept pairs.';
COMMENT ON COLUMN replay_heads.misses IS 'Needed and evicted pairs.';
COMMENT ON COLUMN replay_heads.evictions IS 'Slots evicted.';
COMMENT ON COLUMN replay_heads.output_error IS 'Mean relative error of its outputs; null without v.';
COMMENT ON COLUMN replay_heads.ties IS 'Cuts whose margin was 0.';
COMMENT ON COLUMN replay_heads.overlap IS 'As replays.overlap.';
COMMENT ON COLUMN replay_heads.bound IS 'Certified upper bound on mass under this budget (oracle only).';
COMMENT ON COLUMN replay_heads.bound_layer IS 'The same on the mean mass of the layer''s heads where they share their budgets: in each of its rows.';

CREATE TABLE replay_regrets (
    replay VARCHAR, request BIGINT, layer INTEGER, kv_head INTEGER, q_head INTEGER,
    position INTEGER, evicted_at INTEGER, regret DOUBLE, misses BIGINT
);
COMMENT ON TABLE replay_regrets IS 'Per evicted token and query head: the attention later paid to it. Sums to the lost mass. Only for replays asked with --regret, or opened on the viewer''s regret page.';
COMMENT ON COLUMN replay_regrets.replay IS 'The replay.';
COMMENT ON COLUMN replay_regrets.request IS 'The request.';
COMMENT ON COLUMN replay_regrets.layer IS 'The layer.';
COMMENT ON COLUMN replay_regrets.kv_head IS 'The KV head that evicted it, by the model''s number.';
COMMENT ON COLUMN replay_regrets.q_head IS 'The query head that wanted it, by the model''s number.';
COMMENT ON COLUMN replay_regrets.position IS 'Position of the evicted token.';
COMMENT ON COLUMN replay_regrets.evicted_at IS 'Position of the query after whose row it was evicted.';
COMMENT ON COLUMN replay_regrets.regret IS 'Attention of the full cache that later queries of the head pay to it, summed.';
COMMENT ON COLUMN replay_regrets.misses IS 'Later queries of the head that needed it: attention at or above the threshold of being needed.';

CREATE TABLE replay_wants (
    replay VARCHAR, request BIGINT, layer INTEGER, q_head INTEGER, position INTEGER,
    query INTEGER, attention DOUBLE, row BIGINT, query_row BIGINT
);
COMMENT ON TABLE replay_wants IS 'Per evicted token and query head: the queries that needed it most, at most four.';
COMMENT ON COLUMN replay_wants.replay IS 'The replay.';
COMMENT ON COLUMN replay_wants.request IS 'The request.';
COMMENT ON COLUMN replay_wants.layer IS 'The layer.';
COMMENT ON COLUMN replay_wants.q_head IS 'The query head that needed it, by the model''s number.';
COMMENT ON COLUMN replay_wants.position IS 'Position of the evicted token.';
COMMENT ON COLUMN replay_wants.query IS 'Position of the query that needed it.';
COMMENT ON COLUMN replay_wants.attention IS 'What the query pays to it in the full cache.';
COMMENT ON COLUMN replay_wants.row IS 'The row of the evicted token.';
COMMENT ON COLUMN replay_wants.query_row IS 'The row of the query.';

CREATE TABLE certificates (
    replay VARCHAR, request BIGINT, created_ns BIGINT, model VARCHAR, rows BIGINT,
    kl_mean DOUBLE, kl_p95 DOUBLE, kl_max DOUBLE, perplexity_full DOUBLE,
    perplexity_evicted DOUBLE, agreement DOUBLE, diverges_at INTEGER, key_error DOUBLE,
    generated_tokens INTEGER, generation_diverges_at INTEGER, generated_full VARCHAR,
    generated_evicted VARCHAR, live_passes INTEGER, live_settled BOOLEAN, live_kl_mean DOUBLE,
    live_jaccard DOUBLE, live_reason VARCHAR
);
COMMENT ON TABLE certificates IS 'Per replay and request that kvtrace verify has run: the real model on the same tokens with the replay''s kept sets enforced, against the model with its full cache.';
COMMENT ON COLUMN certificates.replay IS 'The replay whose kept sets were enforced.';
COMMENT ON COLUMN certificates.request IS 'The request whose tokens were run.';
COMMENT ON COLUMN certificates.created_ns IS 'When.';
COMMENT ON COLUMN certificates.model IS 'Where the model was loaded from.';
COMMENT ON COLUMN certificates.rows IS 'Rows compared: those after the first cut.';
COMMENT ON COLUMN certificates.kl_mean IS 'Mean KL divergence of the next token''s distribution, full cache from kept sets, in nats.';
COMMENT ON COLUMN certificates.kl_p95 IS '95th percentile of the same over the rows.';
COMMENT ON COLUMN certificates.kl_max IS 'The largest of the same.';
COMMENT ON COLUMN certificates.perplexity_full IS 'Of the recorded tokens that follow the compared rows, with the full cache.';
COMMENT ON COLUMN certificates.perplexity_evicted IS 'The same with the kept sets.';
COMMENT ON COLUMN certificates.agreement IS 'Share of rows whose likeliest next token is the same.';
COMMENT ON COLUMN certificates.diverges_at IS 'Position of the first row whose likeliest next token differs; null where none does.';
COMMENT ON COLUMN certificates.key_error IS 'The model''s keys against the recorded ones: the worst layer''s ||k - recorded|| / ||recorded||.';
COMMENT ON COLUMN certificates.generated_tokens IS 'Tokens generated greedily from the prompt, once with the full cache and once with the kept positions; null where none were.';
COMMENT ON COLUMN certificates.generation_diverges_at IS 'Number of the first generated token that differs, from 0; null where none does.';
COMMENT ON COLUMN certificates.generated_full IS 'Text generated with the full cache.';
COMMENT ON COLUMN certificates.generated_evicted IS 'Text generated with the kept positions.';
COMMENT ON COLUMN certificates.live_passes IS 'Runs it took to run the policy live, deciding from the evicting run''s own q, k and v; null where it was not.';
COMMENT ON COLUMN certificates.live_settled IS 'Whether the last of them gave the kept sets it was run under, which are then those of the live run.';
COMMENT ON COLUMN certificates.live_kl_mean IS 'As kl_mean, under the live kept sets.';
COMMENT ON COLUMN certificates.live_jaccard IS 'Agreement of the live kept sets with the replayed ones: Jaccard index, mean over events, layers and KV heads.';
COMMENT ON COLUMN certificates.live_reason IS 'Why the policy was not run live; null where it was.';

CREATE TABLE certificate_steps (
    replay VARCHAR, request BIGINT, position INTEGER, kl DOUBLE, nll_full DOUBLE,
    nll_evicted DOUBLE, agrees BOOLEAN
);
COMMENT ON TABLE certificate_steps IS 'Per compared row of a certificate.';
COMMENT ON COLUMN certificate_steps.replay IS 'The replay.';
COMMENT ON COLUMN certificate_steps.request IS 'The request.';
COMMENT ON COLUMN certificate_steps.position IS 'Position of the query token; the next token is what is predicted.';
COMMENT ON COLUMN certificate_steps.kl IS 'KL divergence of the next token''s distribution, in nats.';
COMMENT ON COLUMN certificate_steps.nll_full IS 'Negative log-likelihood of the recorded next token with the full cache, in nats; null after the last.';
COMMENT ON COLUMN certificate_steps.nll_evicted IS 'The same with the kept sets.';
COMMENT ON COLUMN certificate_steps.agrees IS 'Whether the likeliest next token is the same.';

CREATE TABLE certificate_events (
    replay VARCHAR, request BIGINT, position INTEGER, layer INTEGER, jaccard DOUBLE,
    jaccard_worst DOUBLE, is_exact BOOLEAN
);
COMMENT ON TABLE certificate_events IS 'Per decision and layer: the kept sets of the policy run live beside the replayed ones.';
COMMENT ON COLUMN certificate_events.replay IS 'The replay.';
COMMENT ON COLUMN certificate_events.request IS 'The request.';
COMMENT ON COLUMN certificate_events.position IS 'Position of the query after whose row was decided.';
COMMENT ON COLUMN certificate_events.layer IS 'The layer.';
COMMENT ON COLUMN certificate_events.jaccard IS 'Jaccard index of the two kept sets, mean over KV heads.';
COMMENT ON COLUMN certificate_events.jaccard_worst IS 'The least over KV heads.';
COMMENT ON COLUMN certificate_events.is_exact IS 'Whether the live set is that of a real run; false where the passes had not settled on it.';

CREATE TABLE tier_runs (
    tier_run VARCHAR, kind VARCHAR, replay VARCHAR, created_ns BIGINT, hardware VARCHAR,
    model VARCHAR, options VARCHAR, unit_bytes BIGINT, requests BIGINT, refused BIGINT,
    compute_ns BIGINT, stall_ns BIGINT, span_ns BIGINT, ttft_mean_ns DOUBLE,
    recorded_ttft_mean_ns DOUBLE, tokens_per_second DOUBLE, recorded_tokens_per_second DOUBLE,
    retained_mass DOUBLE, late_mass DOUBLE, lost_mass DOUBLE
);
COMMENT ON TABLE tier_runs IS 'One row per workload served from memory tiers by kvtrace tiers.';
COMMENT ON COLUMN tier_runs.tier_run IS 'Name of its folder under whatifs/.';
COMMENT ON COLUMN tier_runs.kind IS 'blocks: whole blocks move; tokens: what a replay kept lies in the first tier, what it evicted in the second.';
COMMENT ON COLUMN tier_runs.replay IS 'The replay that places the tokens; null for blocks.';
COMMENT ON COLUMN tier_runs.created_ns IS 'When.';
COMMENT ON COLUMN tier_runs.hardware IS 'The machine.';
COMMENT ON COLUMN tier_runs.model IS 'The model whose cache it is.';
COMMENT ON COLUMN tier_runs.options IS 'The rules, as JSON.';
COMMENT ON COLUMN tier_runs.unit_bytes IS 'Bytes of what moves: a block over all layers; null for tokens, whose slots differ by layer.';
COMMENT ON COLUMN tier_runs.requests IS 'Requests of the workload.';
COMMENT ON COLUMN tier_runs.refused IS 'Of them, those that do not fit into the first tier.';
COMMENT ON COLUMN tier_runs.compute_ns IS 'Computing, all steps.';
COMMENT ON COLUMN tier_runs.stall_ns IS 'Waiting for transfers, all steps.';
COMMENT ON COLUMN tier_runs.span_ns IS 'From the first arrival to the end of the last step; for tokens the decode steps with their stalls, waiting between them left out.';
COMMENT ON COLUMN tier_runs.ttft_mean_ns IS 'Mean time from arrival to first token; null where no prompt is served.';
COMMENT ON COLUMN tier_runs.recorded_ttft_mean_ns IS 'Mean recorded time to the first token, as view request_latency has it; null of imported workloads.';
COMMENT ON COLUMN tier_runs.tokens_per_second IS 'Tokens generated, by the span; null where none were.';
COMMENT ON COLUMN tier_runs.recorded_tokens_per_second IS 'The same of the recorded steps; null of imported workloads.';
COMMENT ON COLUMN tier_runs.retained_mass IS 'Tokens only: mean share of attention on keys in the first tier, over query heads, layers and decoded rows.';
COMMENT ON COLUMN tier_runs.late_mass IS 'Tokens only: the same on keys that were fetched for the step.';
COMMENT ON COLUMN tier_runs.lost_mass IS 'Tokens only: the same on keys in the second tier that were not fetched, none of the query heads needing them.';

CREATE TABLE tier_levels (
    tier_run VARCHAR, tier INTEGER, name VARCHAR, capacity_bytes BIGINT, read_bandwidth DOUBLE,
    write_bandwidth DOUBLE, latency_ns BIGINT, source VARCHAR, hits BIGINT, bytes_up BIGINT,
    bytes_down BIGINT, peak_bytes BIGINT, mean_bytes DOUBLE, cost_per_hour DOUBLE
);
COMMENT ON TABLE tier_levels IS 'One row per tier of a tier run: its figures, and what it came to.';
COMMENT ON COLUMN tier_levels.tier_run IS 'The run.';
COMMENT ON COLUMN tier_levels.tier IS 'Its number, 0 for the fastest.';
COMMENT ON COLUMN tier_levels.name IS 'HBM, DRAM, ...';
COMMENT ON COLUMN tier_levels.capacity_bytes IS 'Bytes that the cache has there; null where not limited.';
COMMENT ON COLUMN tier_levels.read_bandwidth IS 'Bytes per second out of it, over its link to the tier above; of tier 0 its own.';
COMMENT ON COLUMN tier_levels.write_bandwidth IS 'Bytes per second into it.';
COMMENT ON COLUMN tier_levels.latency_ns IS 'Before the first byte of a transfer.';
COMMENT ON COLUMN tier_levels.source IS 'Where the figures are from.';
COMMENT ON COLUMN tier_levels.hits IS 'Blocks of prompts that were used from it; for tokens, needed (query, key) pairs.';
COMMENT ON COLUMN tier_levels.bytes_up IS 'Bytes that crossed its link upwards.';
COMMENT ON COLUMN tier_levels.bytes_down IS 'Bytes that crossed its link downwards.';
COMMENT ON COLUMN tier_levels.peak_bytes IS 'Most bytes held after a step.';
COMMENT ON COLUMN tier_levels.mean_bytes IS 'Mean bytes held after a step.';
COMMENT ON COLUMN tier_levels.cost_per_hour IS 'Of its capacity, at the price in the hardware file; null where that gives none.';

CREATE TABLE tier_steps (
    tier_run VARCHAR, step BIGINT, recorded_step BIGINT, phase VARCHAR, request BIGINT,
    batch_size INTEGER, steps BIGINT, tokens BIGINT, started_ns BIGINT, compute_ns BIGINT,
    stall_ns BIGINT, retained_mass DOUBLE, late_mass DOUBLE, lost_mass DOUBLE
);
COMMENT ON TABLE tier_steps IS 'What each step of a tier run computed, and how long it waited for transfers.';
COMMENT ON COLUMN tier_steps.tier_run IS 'The run.';
COMMENT ON COLUMN tier_steps.step IS 'Its number in the run, from 0.';
COMMENT ON COLUMN tier_steps.recorded_step IS 'The recorded step, for tokens; null otherwise.';
COMMENT ON COLUMN tier_steps.phase IS 'prefill (one prompt) or decode.';
COMMENT ON COLUMN tier_steps.request IS 'The request whose prompt it was; null of decode steps.';
COMMENT ON COLUMN tier_steps.batch_size IS 'Requests that it computed for.';
COMMENT ON COLUMN tier_steps.steps IS 'Steps that the row stands for: decode steps of one batch follow one another.';
COMMENT ON COLUMN tier_steps.tokens IS 'Tokens that it computed.';
COMMENT ON COLUMN tier_steps.started_ns IS 'When it began, on the clock of requests.started_ns.';
COMMENT ON COLUMN tier_steps.compute_ns IS 'Computing.';
COMMENT ON COLUMN tier_steps.stall_ns IS 'Waiting for transfers that computing did not hide.';
COMMENT ON COLUMN tier_steps.retained_mass IS 'Tokens only: mean share of attention on keys in the first tier.';
COMMENT ON COLUMN tier_steps.late_mass IS 'Tokens only: the same on fetched keys.';
COMMENT ON COLUMN tier_steps.lost_mass IS 'Tokens only: the same on keys that were left in the second tier.';

CREATE TABLE tier_transfers (
    tier_run VARCHAR, step BIGINT, tier INTEGER, direction VARCHAR, units BIGINT, bytes BIGINT
);
COMMENT ON TABLE tier_transfers IS 'What crossed the links of a tier run, step by step; steps in which nothing did have no row.';
COMMENT ON COLUMN tier_transfers.tier_run IS 'The run.';
COMMENT ON COLUMN tier_transfers.step IS 'The step, as tier_steps.step.';
COMMENT ON COLUMN tier_transfers.tier IS 'The tier below the link.';
COMMENT ON COLUMN tier_transfers.direction IS 'up or down.';
COMMENT ON COLUMN tier_transfers.units IS 'Blocks; for tokens, (token, layer, KV head) slots.';
COMMENT ON COLUMN tier_transfers.bytes IS 'Their bytes.';

CREATE TABLE tier_occupancy (
    tier_run VARCHAR, step BIGINT, ts_ns BIGINT, tier INTEGER, bytes BIGINT
);
COMMENT ON TABLE tier_occupancy IS 'What each tier of a tier run held after each step.';
COMMENT ON COLUMN tier_occupancy.tier_run IS 'The run.';
COMMENT ON COLUMN tier_occupancy.step IS 'The step, as tier_steps.step.';
COMMENT ON COLUMN tier_occupancy.ts_ns IS 'When the step ended, on the clock of requests.started_ns.';
COMMENT ON COLUMN tier_occupancy.tier IS 'The tier.';
COMMENT ON COLUMN tier_occupancy.bytes IS 'Bytes held.';

CREATE TABLE tier_tokens (
    tier_run VARCHAR, request BIGINT, position INTEGER, slots INTEGER, cold_slots INTEGER,
    first_cold INTEGER, fetches BIGINT, late_mass DOUBLE
);
COMMENT ON TABLE tier_tokens IS 'Per token of a tier run of kind tokens: where it came to live, and how often it was fetched back.';
COMMENT ON COLUMN tier_tokens.tier_run IS 'The run.';
COMMENT ON COLUMN tier_tokens.request IS 'The request.';
COMMENT ON COLUMN tier_tokens.position IS 'Position of the token.';
COMMENT ON COLUMN tier_tokens.slots IS 'Its (layer, KV head) slots.';
COMMENT ON COLUMN tier_tokens.cold_slots IS 'Of them, those in the second tier at the end.';
COMMENT ON COLUMN tier_tokens.first_cold IS 'Position of the query after whose row the first of them went there; null where none did.';
COMMENT ON COLUMN tier_tokens.fetches IS 'Slots fetched for some step, each time counted.';
COMMENT ON COLUMN tier_tokens.late_mass IS 'Attention paid to it when it had been fetched, summed over query heads, layers and rows.';

CREATE TABLE tier_blocks (
    tier_run VARCHAR, block BIGINT, block_index INTEGER, tokens INTEGER, accesses BIGINT
);
COMMENT ON TABLE tier_blocks IS 'Per block of a tier run of kind blocks: what it is. Numbers are the run''s own, in the order in which blocks were first asked for.';
COMMENT ON COLUMN tier_blocks.tier_run IS 'The run.';
COMMENT ON COLUMN tier_blocks.block IS 'Its number.';
COMMENT ON COLUMN tier_blocks.block_index IS 'Index in the sequence that asked for it first: it holds tokens from block_index * tokens on.';
COMMENT ON COLUMN tier_blocks.tokens IS 'Tokens in it.';
COMMENT ON COLUMN tier_blocks.accesses IS 'How often it was asked for.';

CREATE TABLE tier_moves (
    tier_run VARCHAR, step BIGINT, block BIGINT, tier INTEGER, arrives BOOLEAN
);
COMMENT ON TABLE tier_moves IS 'Where blocks of a tier run came and went, in order; the first 16,000,000 times.';
COMMENT ON COLUMN tier_moves.tier_run IS 'The run.';
COMMENT ON COLUMN tier_moves.step IS 'The step, as tier_steps.step.';
COMMENT ON COLUMN tier_moves.block IS 'The block, as tier_blocks.block.';
COMMENT ON COLUMN tier_moves.tier IS 'The tier that it came to or left.';
COMMENT ON COLUMN tier_moves.arrives IS 'Whether it came.';

CREATE TABLE allocation_runs (
    allocation_run VARCHAR, kind VARCHAR, created_ns BIGINT, settings VARCHAR, block_size INTEGER,
    pool BIGINT, steps BIGINT, requests BIGINT, refused BIGINT, preemptions BIGINT,
    recomputed_tokens BIGINT, swapped_blocks BIGINT, cached_tokens BIGINT, evictions BIGINT,
    peak_blocks BIGINT, mean_blocks DOUBLE, mean_occupancy DOUBLE, peak_bytes BIGINT,
    mean_cached_blocks DOUBLE, peak_shared_blocks BIGINT, internal_fragmentation DOUBLE,
    wait_steps_mean DOUBLE, wait_steps_max BIGINT, wait_s_mean DOUBLE, span_s DOUBLE,
    wait_steps_p95 DOUBLE, preempted_steps_mean DOUBLE, preempted_steps_max BIGINT,
    preempted_s_mean DOUBLE, tokens_per_s DOUBLE
);
COMMENT ON TABLE allocation_runs IS 'One row per pool of blocks followed by kvtrace allocation: the recorded one, and servers with other settings for the same requests.';
COMMENT ON COLUMN allocation_runs.allocation_run IS 'Name of its folder under whatifs/.';
COMMENT ON COLUMN allocation_runs.kind IS 'recorded or what-if.';
COMMENT ON COLUMN allocation_runs.created_ns IS 'When it was followed.';
COMMENT ON COLUMN allocation_runs.settings IS 'Every setting of the server, as JSON; null of the recorded pool.';
COMMENT ON COLUMN allocation_runs.block_size IS 'Tokens of a block.';
COMMENT ON COLUMN allocation_runs.pool IS 'Blocks.';
COMMENT ON COLUMN allocation_runs.steps IS 'Forward passes.';
COMMENT ON COLUMN allocation_runs.requests IS 'Requests that were processed.';
COMMENT ON COLUMN allocation_runs.refused IS 'Requests larger than the pool.';
COMMENT ON COLUMN allocation_runs.preemptions IS 'Times that a request had to give its blocks up.';
COMMENT ON COLUMN allocation_runs.recomputed_tokens IS 'Tokens that were processed again for it; null of the recorded pool.';
COMMENT ON COLUMN allocation_runs.swapped_blocks IS 'Blocks that were copied out for it; null of the recorded pool.';
COMMENT ON COLUMN allocation_runs.cached_tokens IS 'Tokens that were found in cached blocks and not processed; null of the recorded pool.';
COMMENT ON COLUMN allocation_runs.evictions IS 'Cached blocks that gave way.';
COMMENT ON COLUMN allocation_runs.peak_blocks IS 'The most blocks that requests held at a step.';
COMMENT ON COLUMN allocation_runs.mean_blocks IS 'Mean of the same over the steps.';
COMMENT ON COLUMN allocation_runs.mean_occupancy IS 'Mean share of the pool that requests held.';
COMMENT ON COLUMN allocation_runs.peak_bytes IS 'Bytes of peak_blocks; null where the size of a block is not known.';
COMMENT ON COLUMN allocation_runs.mean_cached_blocks IS 'Mean of the blocks that nobody held and that were kept for their contents.';
COMMENT ON COLUMN allocation_runs.peak_shared_blocks IS 'The most blocks that several requests held at a step.';
COMMENT ON COLUMN allocation_runs.internal_fragmentation IS 'Mean share of the token slots of held blocks without a token.';
COMMENT ON COLUMN allocation_runs.wait_steps_mean IS 'Mean steps from a request''s arrival to its first step; null where arrivals are not known.';
COMMENT ON COLUMN allocation_runs.wait_steps_max IS 'The most of the same.';
COMMENT ON COLUMN allocation_runs.wait_s_mean IS 'Mean seconds of the same; of a what-if by the recorded steps'' mean time for their tokens.';
COMMENT ON COLUMN allocation_runs.wait_steps_p95 IS '95th percentile of the same over requests.';
COMMENT ON COLUMN allocation_runs.preempted_steps_mean IS 'Mean steps that a request missed after preemptions, from losing its blocks to being processed again; no part of wait_steps_mean.';
COMMENT ON COLUMN allocation_runs.preempted_steps_max IS 'The most that one request missed so.';
COMMENT ON COLUMN allocation_runs.preempted_s_mean IS 'Mean seconds of the same; of a what-if as wait_s_mean.';
COMMENT ON COLUMN allocation_runs.tokens_per_s IS 'Tokens processed, prompts too, over span_s.';
COMMENT ON COLUMN allocation_runs.span_s IS 'From the first step''s begin to the last one''s end, in seconds; of a what-if as wait_s_mean.';

CREATE TABLE allocation_steps (
    allocation_run VARCHAR, step BIGINT, started_ns BIGINT, duration_ns BIGINT, held BIGINT,
    cached BIGINT, free BIGINT, shared BIGINT, unused_slots BIGINT, bytes_held BIGINT,
    running BIGINT, waiting BIGINT, tokens BIGINT, preempted BIGINT
);
COMMENT ON TABLE allocation_steps IS 'The pool while each step ran.';
COMMENT ON COLUMN allocation_steps.allocation_run IS 'The run.';
COMMENT ON COLUMN allocation_steps.step IS 'Its number in the run, from 0; of KV events the message.';
COMMENT ON COLUMN allocation_steps.started_ns IS 'When it began; of a what-if by the recorded steps'' mean time for their tokens.';
COMMENT ON COLUMN allocation_steps.duration_ns IS 'How long it took.';
COMMENT ON COLUMN allocation_steps.held IS 'Blocks that requests hold.';
COMMENT ON COLUMN allocation_steps.cached IS 'Blocks that nobody holds, kept for their contents.';
COMMENT ON COLUMN allocation_steps.free IS 'All other blocks.';
COMMENT ON COLUMN allocation_steps.shared IS 'Blocks that several requests hold.';
COMMENT ON COLUMN allocation_steps.unused_slots IS 'Token slots of held blocks without a token.';
COMMENT ON COLUMN allocation_steps.bytes_held IS 'Bytes of the held blocks; 0 where the size of a block is not known.';
COMMENT ON COLUMN allocation_steps.running IS 'Requests in the batch.';
COMMENT ON COLUMN allocation_steps.preempted IS 'Requests that had lost all blocks to a preemption and had not come back.';
COMMENT ON COLUMN allocation_steps.waiting IS 'Requests that had come and had no step yet.';
COMMENT ON COLUMN allocation_steps.tokens IS 'Tokens processed.';

CREATE TABLE allocation_requests (
    allocation_run VARCHAR, request BIGINT, arrival_step BIGINT, first_step BIGINT,
    last_step BIGINT, wait_steps BIGINT, wait_ns BIGINT, preemptions BIGINT, refused VARCHAR,
    preempted_steps BIGINT, preempted_ns BIGINT
);
COMMENT ON TABLE allocation_requests IS 'How each request fared.';
COMMENT ON COLUMN allocation_requests.allocation_run IS 'The run.';
COMMENT ON COLUMN allocation_requests.request IS 'The request.';
COMMENT ON COLUMN allocation_requests.arrival_step IS 'The first step that could have processed it; null where its arrival is not known.';
COMMENT ON COLUMN allocation_requests.first_step IS 'The first that did; null where it was refused.';
COMMENT ON COLUMN allocation_requests.last_step IS 'The last that did.';
COMMENT ON COLUMN allocation_requests.wait_steps IS 'Steps between arrival and first step.';
COMMENT ON COLUMN allocation_requests.wait_ns IS 'Nanoseconds between the two.';
COMMENT ON COLUMN allocation_requests.preempted_steps IS 'Steps that it missed after preemptions, from losing its blocks to being processed again; no part of wait_steps.';
COMMENT ON COLUMN allocation_requests.preempted_ns IS 'Nanoseconds of the same.';
COMMENT ON COLUMN allocation_requests.preemptions IS 'Times that it gave its blocks up.';
COMMENT ON COLUMN allocation_requests.refused IS 'Why it was not served; null where it was.';

CREATE TABLE allocation_blocks (
    allocation_run VARCHAR, block BIGINT, request BIGINT, born_ns BIGINT, ended_ns BIGINT,
    ended_by VARCHAR, accesses BIGINT, max_references BIGINT, kv_block_lifetime_seconds DOUBLE,
    kv_block_idle_before_evict_seconds DOUBLE, kv_block_reuse_gap_seconds DOUBLE[]
);
COMMENT ON TABLE allocation_blocks IS 'Every stay of a block in the pool, from its allocation until it is free again. The quantities in seconds are those that vLLM exports under these names.';
COMMENT ON COLUMN allocation_blocks.allocation_run IS 'The run.';
COMMENT ON COLUMN allocation_blocks.block IS 'The block, as kv_events gives it; of a what-if from 0.';
COMMENT ON COLUMN allocation_blocks.request IS 'The request that it was allocated to; null where that is not known.';
COMMENT ON COLUMN allocation_blocks.born_ns IS 'When it was allocated.';
COMMENT ON COLUMN allocation_blocks.ended_ns IS 'When it was free again; null where it was not at the end.';
COMMENT ON COLUMN allocation_blocks.ended_by IS 'free: let go, and its contents not kept; evict: it was cached and gave way.';
COMMENT ON COLUMN allocation_blocks.accesses IS 'Times that it was given to a request that found it there.';
COMMENT ON COLUMN allocation_blocks.max_references IS 'The most requests that held it at once.';
COMMENT ON COLUMN allocation_blocks.kv_block_lifetime_seconds IS 'From allocation to end.';
COMMENT ON COLUMN allocation_blocks.kv_block_idle_before_evict_seconds IS 'From the last access, or the allocation, to the eviction; null where it was not evicted.';
COMMENT ON COLUMN allocation_blocks.kv_block_reuse_gap_seconds IS 'Between each access and the next.';

CREATE TABLE block_runs (
    block_run VARCHAR, created_ns BIGINT, policy VARCHAR, parameters VARCHAR, capacity BIGINT,
    block_size INTEGER, accounting VARCHAR, requests BIGINT, accesses BIGINT, hits BIGINT,
    hit_ratio DOUBLE, error DOUBLE, evictions BIGINT
);
COMMENT ON TABLE block_runs IS 'One row per block policy and capacity that kvtrace blocks ran the workload through.';
COMMENT ON COLUMN block_runs.block_run IS 'Name of its folder under whatifs/: all results of one question.';
COMMENT ON COLUMN block_runs.created_ns IS 'When.';
COMMENT ON COLUMN block_runs.policy IS 'The policy as the user wrote it, parameters included.';
COMMENT ON COLUMN block_runs.parameters IS 'Every parameter, defaults too, as JSON.';
COMMENT ON COLUMN block_runs.capacity IS 'Blocks that the cache holds.';
COMMENT ON COLUMN block_runs.block_size IS 'Tokens of a full block.';
COMMENT ON COLUMN block_runs.accounting IS 'What counts as an access and a hit, as JSON: see docs/blocks.md.';
COMMENT ON COLUMN block_runs.requests IS 'Requests of the workload.';
COMMENT ON COLUMN block_runs.accesses IS 'Accesses, in the unit of the accounting.';
COMMENT ON COLUMN block_runs.hits IS 'Those that found their block.';
COMMENT ON COLUMN block_runs.hit_ratio IS 'Hits over accesses; null without an access.';
COMMENT ON COLUMN block_runs.error IS 'Twice the standard error of the ratio, where it is of a sample; null: exact.';
COMMENT ON COLUMN block_runs.evictions IS 'Blocks evicted.';

/* The attention page: wall, map, readout, marks, exports, and the address. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const MAX_ROWS_KEPT = 64;
    const HOVER_DELAY_MS = 30;
    const TOP_KEYS = 16;
    const MAX_MARKS_LISTED = 200;
    const STATUS = "attention-status";

    /* Everything of one visit to the page; a new one when React has made a new canvas. */
    let page = null;

    function mount(config) {
        const canvas = kv.byId("attention-map");
        if (page && page.canvas === canvas && page.config === config) return page;
        const failed = (error) => kv.say(STATUS, error.message);
        page = { canvas, config, tokens: new Map(), rows: new Map(), shown: null };
        page.map = new kv.AttentionMap(
            { canvas, over: kv.byId("attention-over"), stage: kv.byId("attention-stage") },
            { viewChanged, hovered, failed, drawn },
        );
        page.wall = new kv.HeadWall(
            kv.byId("attention-wall"), kv.byId("attention-wall-note"), choose, failed);
        readout(null);
        return page;
    }

    /* Whether an answer that was waited for still has a place to go. */
    const here = (visit, query) =>
        page === visit && visit.canvas.isConnected && visit.shown.query === query;

    function choose(layer, head) {
        kv.setProps("attention-layer", { value: String(layer) });
        kv.setProps("attention-head", { value: String(head) });
    }

    async function tokensOf(trace, request) {
        if (!page.tokens.has(request)) {
            const answer = await kv.json("tokens", { trace, request });
            page.tokens.set(request, answer.tokens);
        }
        return page.tokens.get(request);
    }

    /* ---- choosing what is shown ---- */

    async function update(config, request, layerIndex, head, scale, pool) {
        const visit = mount(config);
        const info = config.requests[request];
        const layer = info.layers[Math.min(Number(layerIndex), info.layers.length - 1)];
        const headIndex = Math.min(Number(head), layer.heads - 1);
        const chosen = {
            trace: config.trace, request, layer: layer.layer, head: layer.head_numbers[headIndex],
        };
        const query = { ...chosen, scale };
        const before = visit.shown;
        visit.shown = { query, info, layer, pool };
        kv.setQuery({ ...chosen, scale, pool });
        visit.wall.show({ trace: config.trace, request, scale }, info, pool,
            { layer: info.layers.indexOf(layer), head: headIndex });
        note(info);
        listLayers(visit, request, info.layers);
        visit.map.pool = pool;
        const sameMap = before && JSON.stringify(before.query) === JSON.stringify(query);
        if (sameMap) {
            visit.map.draw();
            return;
        }
        if (!before || before.query.layer !== query.layer || before.query.head !== query.head ||
            before.query.request !== query.request) {
            visit.rows.clear();
            visit.map.setMarks([]);
            listMarks(null);
        }
        kv.say(STATUS, config.status === "recording"
            ? `This trace is still being recorded; ${kv.count(info.tokens)} tokens as of loading. Reload for more.`
            : info.missing, "info");
        try {
            const tokens = await tokensOf(config.trace, request);
            const keyTokens = await tokensOf(config.trace, String(layer.keys_of));
            if (!here(visit, query)) return;
            /* First the address's window, then the one at hand, all of it for another request. */
            const view = visit.viewed === undefined ? viewOf(config.view)
                : visit.viewed === request ? undefined : null;
            visit.viewed = request;
            visit.map.show(query, tokens, keyTokens, layer.causal, view);
            readLast(visit, query, info);
            const marks = await kv.json("marks", chosen);
            if (!here(visit, query)) return;
            visit.map.setMarks(marks);
            listMarks(marks);
        } catch (error) {
            kv.say(STATUS, error.message);
        }
    }

    /* Requests of an encoder-decoder ran through different layers. */
    function listLayers(visit, request, layers) {
        if (visit.listed === request) return;
        const first = visit.listed === undefined;
        visit.listed = request;
        if (first) return;
        kv.setProps("attention-layer", {
            data: layers.map((layer, place) => ({ value: String(place), label: String(layer.layer) })),
        });
    }

    function viewOf(saved) {
        const numbers = ["x", "y", "span"].map((name) => Number.parseFloat(saved[name]));
        if (numbers.some((number) => !Number.isFinite(number))) return null;
        return { x: numbers[0], y: numbers[1], span: numbers[2] };
    }

    function note(info) {
        const [read, covered] = info.thumb_rows;
        kv.byId("attention-wall-note").textContent = covered > read
            ? `Each thumbnail row reads ${read} of the ${covered} queries it covers, and every key.`
            : "Each thumbnail cell covers all of its queries and keys.";
    }

    function viewChanged(view) {
        const whole = view.span >= page.map.numTokens;
        const short = (number) => String(Math.round(number * 100) / 100);
        clearTimeout(page.saving);
        page.saving = setTimeout(() => {
            if (page.map !== null && page.canvas.isConnected) {
                kv.setQuery(whole
                    ? { x: null, y: null, span: null }
                    : { x: short(view.x), y: short(view.y), span: short(view.span) });
            }
        }, 120);
    }

    function drawn({ level, busy }) {
        const { x, y, span } = page.map.view;
        const cell = level === 0
            ? "one pair a cell"
            : `${2 ** level} × ${2 ** level} pairs a cell, ${page.shown.pool} shown`;
        const sampled = 2 ** level > 16 ? `, 16 of ${2 ** level} queries read` : "";
        const to = (from, count) => kv.count(Math.min(count, Math.ceil(from + span)) - 1);
        const { query, layer } = page.shown;
        const whose = String(layer.keys_of) === query.request ? "" : ` of request ${layer.keys_of} (cross attention)`;
        kv.byId("attention-caption").textContent =
            `queries ${kv.count(Math.floor(y))} to ${to(y, page.map.tokens.length)}, ` +
            `keys ${kv.count(Math.floor(x))} to ${to(x, page.map.keyTokens.length)}${whose}` +
            ` · ${cell}${sampled}`;
        page.canvas.dataset.busy = String(busy);
    }

    /* ---- what is under the pointer ---- */

    function hovered(at) {
        clearTimeout(page.hovering);
        page.pointer = at;
        if (!at) {
            page.map.setHover(null);
            kv.byId("attention-tip").style.display = "none";
            return;
        }
        page.hovering = setTimeout(() => look(at), page.rows.has(Math.floor(at.row)) ? 0 : HOVER_DELAY_MS);
    }

    async function look(at) {
        const visit = page;
        const row = Math.floor(at.row);
        try {
            const weights = await rowOf(row);
            if (page !== visit || visit.pointer !== at || !visit.canvas.isConnected) return;
            const key = strongestIn(weights, Math.floor(at.key), row);
            const pair = { row, key, weight: weights[key], weights };
            visit.map.setHover(pair);
            readout(pair);
            tip(pair, at);
        } catch (error) {
            kv.say(STATUS, error.message);
        }
    }

    /* Until the pointer moves, the last query and the key it reads most. */
    async function readLast(visit, query, info) {
        const weights = await rowOf(info.tokens - 1);
        if (!here(visit, query) || visit.pointer) return;
        const key = weights.indexOf(Math.max(...weights));
        readout({ row: info.tokens - 1, key, weight: weights[key], weights });
    }

    async function rowOf(row) {
        const { rows, shown } = page;
        if (!rows.has(row)) {
            const { trace, request, layer, head } = shown.query;
            rows.set(row, kv.bytes("row", { trace, request, layer, head, row })
                .then((buffer) => new Float32Array(buffer)));
            if (rows.size > MAX_ROWS_KEPT) rows.delete(rows.keys().next().value);
        }
        return rows.get(row);
    }

    /* A cell that covers several keys stands for the strongest of them in this query. */
    function strongestIn(weights, key, row) {
        const size = 2 ** page.map.level(page.map.measure().side);
        if (size === 1) return key;
        const start = Math.floor(key / size) * size;
        let best = key;
        for (let at = start; at < Math.min(start + size, weights.length); at += 1) {
            if (weights[at] > weights[best]) best = at;
        }
        return best;
    }

    /* Keys that a query sees, and whether this one is among them. */
    function seen(row) {
        const { causal, window: width } = page.shown.layer;
        return causal ? Math.min(row + 1, width || Infinity) : page.map.keyTokens.length;
    }
    const hidden = (pair) => page.shown.layer.causal &&
        (pair.key > pair.row || pair.key <= pair.row - seen(pair.row));
    const missing = (pair) => Number.isNaN(pair.weight);
    const weightOf = (pair) => missing(pair) ? "query not kept"
        : hidden(pair) ? "not visible" : kv.weight(pair.weight);
    const tokenAt = (position) => kv.showToken(page.map.tokens[position]);
    const keyAt = (position) => kv.showToken(page.map.keyTokens[position]);

    function tip(pair, at) {
        const box = kv.byId("attention-tip");
        box.replaceChildren(
            kv.element("span", "kv-tip-token", tokenAt(pair.row)),
            kv.element("span", "kv-tip-arrow", "reads"),
            kv.element("span", "kv-tip-token", keyAt(pair.key)),
            kv.element("strong", "", weightOf(pair)),
        );
        kv.placeTip(box, at.px, at.py);
    }

    function readout(pair) {
        const box = kv.byId("attention-readout");
        if (!pair) {
            box.replaceChildren();
            return;
        }
        box.dataset.row = pair.row;
        box.dataset.key = pair.key;
        box.dataset.weight = pair.weight;
        const list = kv.element("dl", "kv-pairs");
        const line = (name, ...values) => {
            list.append(kv.element("dt", "", name));
            const value = kv.element("dd");
            value.append(...values);
            list.append(value);
        };
        const token = (text, position) => [
            kv.element("code", "", text),
            kv.element("span", "kv-position", kv.count(position)),
        ];
        line("Query", ...token(tokenAt(pair.row), pair.row));
        line("Key", ...token(keyAt(pair.key), pair.key));
        line("Weight", kv.element("strong", "", weightOf(pair)));
        if (!hidden(pair) && !missing(pair)) line("Uniform", `${(pair.weight * seen(pair.row)).toFixed(2)}× as much`);
        box.replaceChildren(list, kv.element("h3", "", "Strongest keys of this query"), strongest(pair),
            kv.element("p", "kv-note", "The wheel zooms, dragging pans, double click shows all."));
    }

    function strongest(pair) {
        const order = Array.from(pair.weights.keys())
            .sort((a, b) => pair.weights[b] - pair.weights[a])
            .slice(0, TOP_KEYS)
            .filter((key) => pair.weights[key] > 0);
        const list = kv.element("ol", "kv-bars");
        for (const key of order) {
            const item = kv.element("li", key === pair.key ? "kv-chosen" : "");
            const bar = kv.element("span", "kv-bar");
            bar.style.width = `${100 * pair.weights[key]}%`;
            item.append(bar, kv.element("code", "", keyAt(key)),
                kv.element("span", "kv-position", kv.count(key)),
                kv.element("span", "kv-value", kv.weight(pair.weights[key])));
            list.append(item);
        }
        return list;
    }

    /* ---- sinks and heavy hitters ---- */

    function listMarks(marks) {
        const box = kv.byId("attention-marks");
        box.dataset.count = marks ? marks.length : "";
        if (!marks) {
            box.replaceChildren(kv.element("p", "kv-note", "Looking…"));
            return;
        }
        if (!marks.length) {
            const { query, layer } = page.shown;
            box.replaceChildren(kv.element("p", "kv-note", String(layer.keys_of) === query.request
                ? "None in this head."
                : "Both are about the keys of one sequence; in cross attention there are none."));
            return;
        }
        const rows = marks.slice(0, MAX_MARKS_LISTED).map((mark) => {
            const row = kv.element("button", `kv-mark kv-mark-${mark.kind}`);
            row.type = "button";
            row.title = "Zoom to this key";
            const words = mark.kind === "sink"
                ? `mean ${mark.strength.toFixed(3)}`
                : `${mark.strength.toFixed(1)}× uniform`;
            row.append(kv.element("span", "kv-glyph", mark.kind === "sink" ? "▲" : "◆"),
                kv.element("code", "", keyAt(mark.position)),
                kv.element("span", "kv-position", kv.count(mark.position)),
                kv.element("span", "kv-value", words));
            row.addEventListener("click", () => page.map.goToKey(mark.position));
            return row;
        });
        const kinds = kv.element("div", "kv-mark-legend");
        const number = (kind) => marks.filter((mark) => mark.kind === kind).length;
        kinds.append(kv.element("span", "kv-mark-sink", `▲ ${number("sink")} sink${number("sink") === 1 ? "" : "s"}`),
            kv.element("span", "kv-mark-heavy", `◆ ${number("heavy")} heavy hitter${number("heavy") === 1 ? "" : "s"}`));
        const rest = marks.length - rows.length;
        box.replaceChildren(kinds, ...rows,
            kv.element("p", "kv-note", rest > 0 ? `and ${kv.count(rest)} weaker ones, on the map` : ""));
    }

    /* ---- buttons ---- */

    function exportWindow(kind) {
        const { x, y, span } = page.map.view;
        const stop = (from) => Math.ceil(Math.round((from + span) * 1e6) / 1e6);
        const { trace, request, layer, head } = page.shown.query;
        kv.download("export", {
            trace, request, layer, head, kind,
            row_start: Math.floor(y), row_stop: stop(y),
            key_start: Math.floor(x), key_stop: stop(x),
        }, STATUS);
    }

    kv.actions["attention-fit"] = () => page.map.setView(page.map.whole());
    kv.actions["attention-in"] = () => page.map.zoom(0.5);
    kv.actions["attention-out"] = () => page.map.zoom(2);
    kv.actions["attention-csv"] = () => exportWindow("csv");
    kv.actions["attention-npz"] = () => exportWindow("npz");
    kv.actions["attention-png"] = async () => {
        const { request, layer, head } = page.shown.query;
        kv.saveBlob(await page.map.toBlob(), `attention-request${request}-layer${layer}-head${head}.png`);
    };

    kv.onScheme(() => {
        if (!page || !page.canvas.isConnected) return;
        page.map.draw();
        page.wall.draw();
    });

    kv.clientside("attention", {
        update(...values) {
            if (values[0] && values[1] !== null) update(...values);
            return kv.nothing();
        },
    });
})(window.kv);

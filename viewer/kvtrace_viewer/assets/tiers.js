/* The tiers page: a map of who lies where, figures of a run, and new runs. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const STATUS = "tiers-status";
    const MARGIN = { left: 78, bottom: 34, right: 8, top: 6 };
    const HEIGHT = 380;
    let page = null;
    let form = null;

    function mount(config) {
        const canvas = kv.byId("tiers-map");
        if (page && page.canvas === canvas && page.config === config) return;
        page = { config, canvas, map: null, run: null, asked: null, ...view(config.view) };
        canvas.addEventListener("mousemove", hover);
        canvas.addEventListener("mouseleave", () => { kv.byId("tiers-tip").style.display = "none"; });
        canvas.addEventListener("click", zoom);
        new ResizeObserver(draw).observe(kv.byId("tiers-map-box"));
    }

    function view(asked) {
        const first = Number.parseInt(asked.first, 10);
        const count = Number.parseInt(asked.count, 10);
        return count > 0 ? { first: Math.max(0, first || 0), count } : { first: 0, count: null };
    }

    /* ---- what is shown ---- */

    async function show() {
        const here = page;
        const asked = (here.asked = {});
        kv.setQuery({
            trace: here.config.trace, run: here.name, request: here.isTokens ? here.request : null,
            first: here.count === null ? null : here.first, count: here.count,
        });
        kv.byId("tiers-results").hidden = !here.name;
        if (!here.name) {
            const command = `kvtrace tiers ${here.config.trace}`;
            kv.say(STATUS, `No run yet: serve the trace from a machine above, or with ${command}`, "info");
            return;
        }
        try {
            const query = { trace: here.config.trace, run: here.name };
            const run = await kv.json("tiers/run", { ...query, scheme: kv.scheme() });
            const isTokens = run.run.kind === "tokens";
            const part = {
                ...query, first: here.first,
                ...(here.count === null ? {} : { count: here.count }),
                ...(isTokens ? { request: here.request } : {}),
            };
            const map = await kv.json("tiers/residency", part);
            if (page !== here || here.asked !== asked) return;
            const copies = !isTokens && JSON.parse(run.run.options).mode === "write-through";
            Object.assign(here, {
                run, map, isTokens, copies, counts: decode(map.counts),
            });
            kv.say(STATUS, "");
            fill(run);
            draw();
        } catch (error) {
            if (page === here && here.asked === asked) kv.say(STATUS, error.message);
        }
    }

    const decode = (text) =>
        new Int32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);

    function fill(run) {
        for (const name of ["occupancy", "traffic", "waiting"]) {
            kv.setProps(`tiers-${name}`, { figure: run[name] });
        }
        kv.setProps("tiers-grid", { rowData: run.levels });
        kv.byId("tiers-request-field").style.display = page.isTokens ? "" : "none";
        kv.byId("tiers-summary").textContent = summary(run.run);
        kv.byId("tiers-legend").replaceChildren(...run.levels.map((tier, number) => {
            const entry = kv.element("span", "kv-legend-entry", "");
            const swatch = kv.element("i");
            swatch.style.background = run.colours[number];
            entry.append(swatch, tier.name);
            return entry;
        }), kv.element("span", "kv-note", page.isTokens
            ? "split: some layers and KV heads here, some there"
            : "split: several blocks a row"));
        const { first, count, size, shape } = page.map;
        const last = Math.min(count, first + shape[0] * size);
        const what = page.isTokens ? "tokens" : "blocks";
        kv.byId("tiers-window").textContent = count
            ? `${what} ${kv.count(first)} to ${kv.count(last - 1)} of ${kv.count(count)}${size > 1 ? `, ${kv.count(size)} a row` : ""}`
            : "nothing";
    }

    const time = (ns) => {
        const [value, unit] = ns >= 1e9 ? [ns / 1e9, "s"] : ns >= 1e6 ? [ns / 1e6, "ms"] : [ns / 1e3, "µs"];
        return `${value.toLocaleString("en-US", { maximumSignificantDigits: 4 })} ${unit}`;
    };

    function summary(run) {
        const words = [`${run.model}`, `stalled ${time(run.stall_ns)} of ${time(run.span_ns)}`];
        if (run.ttft_mean_ns !== null) words.push(`time to first token ${time(run.ttft_mean_ns)}`);
        if (run.recorded_ttft_mean_ns !== null) words.push(`recorded ${time(run.recorded_ttft_mean_ns)}`);
        if (run.tokens_per_second !== null) {
            words.push(`${run.tokens_per_second.toFixed(1)} tokens/s`);
        }
        if (run.recorded_tokens_per_second !== null) {
            words.push(`recorded ${run.recorded_tokens_per_second.toFixed(1)}`);
        }
        if (run.late_mass !== null) words.push(`attention served late ${run.late_mass.toFixed(4)}`);
        return words.join(" · ");
    }

    /* ---- the map ---- */

    /* What each tier holds of a cell; of copies in several tiers the fastest counts. */
    function sharesOf(row, column) {
        const [, columns, tiers] = page.map.shape;
        const at = (row * columns + column) * tiers;
        const shares = [];
        let above = 0;
        for (let tier = 0; tier < tiers; tier++) {
            const held = page.counts[at + tier];
            shares.push(page.copies ? Math.max(0, held - above) : held);
            above = Math.max(above, held);
        }
        return shares;
    }

    /* So many whole pixels of a cell for each tier: by its share, but at least one where it holds
       any, the largest first where there are too few. Colours are never mixed. */
    function pixelsOf(shares, pixels) {
        const total = shares.reduce((sum, share) => sum + share, 0);
        const found = shares.map(() => 0);
        let left = pixels, rest = total;
        const order = shares.map((_, tier) => tier).filter((tier) => shares[tier]).sort((a, b) => shares[b] - shares[a]);
        order.forEach((tier, place) => {
            const others = order.length - 1 - place;
            const wanted = Math.round((left * shares[tier]) / rest);
            found[tier] = Math.min(left, Math.max(1, Math.min(wanted, left - others)));
            left -= found[tier];
            rest -= shares[tier];
        });
        return found;
    }

    function geometry() {
        const width = kv.byId("tiers-map-box").clientWidth;
        const [rows, columns] = page.map ? page.map.shape : [0, 0];
        const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
        return { width, inner, rows, columns, cell: { w: inner.width / columns, h: inner.height / rows } };
    }

    function draw() {
        if (!page || !page.canvas.isConnected) return;
        const { width, inner, rows, columns, cell } = geometry();
        if (!width) return;
        const context = kv.sizeCanvas(page.canvas, width, HEIGHT);
        context.clearRect(0, 0, width, HEIGHT);
        context.fillStyle = kv.token("map-empty");
        context.fillRect(MARGIN.left, MARGIN.top, inner.width, inner.height);
        if (!rows || !columns) return;
        const ratio = window.devicePixelRatio || 1;
        const pixel = (at) => Math.round(at * ratio);
        for (let row = 0; row < rows; row++) {
            for (let column = 0; column < columns; column++) {
                const shares = sharesOf(row, column);
                if (!shares.some((share) => share)) continue;
                const [left, right] = [column, column + 1].map((n) => pixel(MARGIN.left + n * cell.w));
                const [top, bottom] = [row, row + 1].map((n) => pixel(MARGIN.top + n * cell.h));
                let y = top;
                pixelsOf(shares, Math.max(1, bottom - top)).forEach((high, tier) => {
                    context.fillStyle = page.run.colours[tier];
                    context.fillRect(left / ratio, y / ratio, Math.max(1, right - left) / ratio, high / ratio);
                    y += high;
                });
            }
        }
        axes(context, inner, rows);
        page.canvas.dataset.rows = rows;
        page.canvas.dataset.columns = columns;
    }

    function axes(context, inner, rows) {
        context.clearRect(MARGIN.left + inner.width, 0, MARGIN.right, HEIGHT);
        context.clearRect(0, MARGIN.top + inner.height, page.canvas.clientWidth, MARGIN.bottom);
        context.fillStyle = kv.token("muted");
        context.font = `11px ${kv.sans}`;
        context.textBaseline = "middle";
        context.textAlign = "right";
        const { first, size, steps } = page.map;
        for (let tick = 0; tick < 5; tick++) {
            const row = Math.min(rows - 1, Math.floor((tick * rows) / 4));
            const y = MARGIN.top + ((row + 0.5) * inner.height) / rows;
            context.fillText(kv.count(first + row * size), MARGIN.left - 8, Math.max(y, 8));
        }
        context.textAlign = "center";
        const y = MARGIN.top + inner.height + 10;
        for (let tick = 0; tick < 5; tick++) {
            const at = Math.min(steps.length - 1, Math.floor((tick * steps.length) / 4));
            const x = MARGIN.left + ((at + 0.5) * inner.width) / steps.length;
            context.fillText(kv.count(steps[at]), Math.min(x, MARGIN.left + inner.width - 20), y);
        }
        context.fillText(`${page.isTokens ? "token" : "block"} over step`, MARGIN.left + inner.width / 2, y + 15);
    }

    function cellAt(event) {
        if (!page.map) return null;
        const { rows, columns, cell } = geometry();
        const column = Math.floor((event.offsetX - MARGIN.left) / cell.w);
        const row = Math.floor((event.offsetY - MARGIN.top) / cell.h);
        const inside = row >= 0 && row < rows && column >= 0 && column < columns;
        return inside ? { row, column } : null;
    }

    function hover(event) {
        const tip = kv.byId("tiers-tip");
        const at = cellAt(event);
        if (!at) {
            tip.style.display = "none";
            return;
        }
        const { map, run, counts } = page;
        const [, columns, tiers] = map.shape;
        const from = map.first + at.row * map.size;
        const to = Math.min(map.count, from + map.size) - 1;
        const begin = map.index[at.row] * map.tokens[at.row];
        const what = page.isTokens ? "Token" : "Block";
        const lines = [from === to ? `${what} ${kv.count(from)}` : `${what}s ${kv.count(from)} to ${kv.count(to)}`];
        if (!page.isTokens && from === to) {
            lines.push(`tokens ${kv.count(begin)} to ${kv.count(begin + map.tokens[at.row] - 1)} of its sequence`);
        }
        const shares = sharesOf(at.row, at.column);
        const total = shares.reduce((sum, share) => sum + share, 0);
        const split = shares.filter((share) => share).length > 1;
        const held = run.levels.map((tier, number) => {
            const count = counts[(at.row * columns + at.column) * tiers + number];
            const bytes = run.run.unit_bytes === null ? "slots" : window.dashAgGridFunctions.kvBytes(count * run.run.unit_bytes);
            const share = split ? ` (${Math.round((100 * shares[number]) / total)}% of what is shown)` : "";
            return count ? `${tier.name}: ${page.isTokens ? `${kv.count(count)} slots` : bytes}${share}` : null;
        }).filter(Boolean);
        lines.push(...(held.length ? held : ["in no tier"]));
        lines.push(`${page.isTokens ? "slots fetched" : "accesses"}: ${kv.count(map.accesses[at.row])}`);
        lines.push(`after step ${kv.count(map.steps[at.column])}`);
        const words = kv.element("div");
        words.append(...lines.map((line) => kv.element("div", "", line)));
        tip.replaceChildren(words);
        kv.placeTip(tip, event.offsetX, event.offsetY);
    }

    /* Twelve times nearer, around the row. */
    function zoom(event) {
        const at = cellAt(event);
        if (!at || page.map.size === 1) return;
        const { first, size, shape, count } = page.map;
        const span = Math.max(40, Math.floor((shape[0] * size) / 12));
        const middle = first + (at.row + 0.5) * size;
        page.first = Math.max(0, Math.min(count - span, Math.round(middle - span / 2)));
        page.count = span;
        show();
    }

    kv.actions["tiers-all"] = () => {
        Object.assign(page, { first: 0, count: null });
        show();
    };

    /* ---- other memory ---- */

    const FIGURES = [["capacity", "GB"], ["read", "read GB/s"], ["write", "write GB/s"]];

    function inputs(machine) {
        const tiers = page.config.machines[machine];
        /* The figures of a link are those of its machine. */
        const asked = page.config.form.machine === machine ? (page.config.form.figures || "").split(" ").filter(Boolean).map(Number) : [];
        let place = 0;
        kv.byId("tiers-figures").dataset.machine = machine;
        kv.byId("tiers-figures").replaceChildren(...tiers.map((tier) => {
            const group = kv.element("fieldset");
            group.append(kv.element("legend", "", tier.name));
            for (const [name, unit] of FIGURES) {
                const label = kv.element("label", "", unit);
                const input = kv.element("input");
                const value = asked[place] !== undefined && asked[place] >= 0 ? asked[place] : tier[name] / 1e9;
                place += 1;
                Object.assign(input, { type: "number", min: 0, step: "any", value });
                input.addEventListener("change", saveFigures);
                input.dataset.figure = name;
                label.append(input);
                group.append(label);
            }
            return group;
        }));
    }

    /* Figures that are not the machine's own are part of the link. */
    function saveFigures() {
        const all = [...kv.byId("tiers-figures").querySelectorAll("input")].map((input) => Number(input.value));
        const own = page.config.machines[form.machine].flatMap((tier) => FIGURES.map(([name]) => tier[name] / 1e9));
        kv.setQuery({ figures: all.some((value, n) => value !== own[n]) ? all.join(" ") : null });
    }

    const given = () => [...kv.byId("tiers-figures").children].map((group) =>
        Object.fromEntries([...group.querySelectorAll("input")].map((input) => {
            const value = Number(input.value) * 1e9;
            return [input.dataset.figure, input.dataset.figure === "capacity" ? Math.round(value) : value];
        })));

    kv.actions["tiers-start"] = function () {
        const { place, overlap, prefetch, batch, ...rest } = form;
        const body = {
            trace: page.config.trace, tiers: given(), ...rest,
            overlap: overlap === "yes", prefetch: prefetch === "yes", max_batch: Number(batch),
            replay: place === "blocks" ? null : place,
        };
        return kv.work("tiers-start", "Serving…", "tiers", body, listed);
    };

    async function listed([name]) {
        const rows = await kv.json("tiers", { trace: page.config.trace });
        const group = (kind, title) => ({
            group: title,
            items: rows.filter((row) => row.kind === kind).map((row) => ({ value: row.tier_run, label: row.tier_run })),
        });
        const data = [group("blocks", "Whole blocks"), group("tokens", "Tokens by a replay")];
        kv.setProps("tiers-run", { data: data.filter((one) => one.items.length), value: name });
        /* The same name again is the same choice: no callback comes. */
        if (page.name === name) show();
        return "Kept beside the trace.";
    }

    kv.onScheme(() => page && page.canvas.isConnected && page.name && show());

    kv.clientside("tiers", {
        update(config, run, request) {
            if (!config) return kv.nothing();
            mount(config);
            if (page.name && page.name !== run) Object.assign(page, { first: 0, count: null });
            Object.assign(page, { name: run, request });
            show();
            return kv.nothing();
        },
        form(config, machine, place, policy, mode, load, overlap, prefetch, batch) {
            if (!config) return kv.nothing();
            mount(config);
            form = { machine, place, policy, mode, load, overlap, prefetch, batch };
            const box = kv.byId("tiers-figures");
            if (!box.children.length || box.dataset.machine !== machine) {
                inputs(machine);
                saveFigures();
            }
            kv.setQuery(Object.fromEntries(Object.entries(form).map(([name, value]) =>
                [name, value === config.form.usual[name] ? null : value])));
            return kv.nothing();
        },
    });
})(window.kv);

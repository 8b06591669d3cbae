/* The replay page: one clock for all chosen policies, the mass below it, and new replays. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const STATUS = "replay-status";
    let page = null;

    /* ---- mounting ---- */

    function mount(config) {
        const cards = kv.byId("replay-cards");
        if (page && page.cards === cards && page.config === config) return page;
        if (page) pause();
        page = {
            config, cards, byId: new Map(), order: [], tokens: [], mass: {}, time: 0,
            playing: false, started: false,
        };
        cards.replaceChildren();
        page.slider = makeSlider();
        legend();
        showCurve(page);
        new ResizeObserver(() => draw()).observe(cards);
        return page;
    }

    /* The server draws it in light colours, before it knows the page's. */
    async function showCurve(here) {
        if (!document.getElementById("replay-curve")) return;
        const { figure } = await kv.json("curve", { trace: here.config.trace, scheme: kv.scheme() });
        if (page === here && here.cards.isConnected) kv.setProps("replay-curve", { figure });
    }

    function makeSlider() {
        const slider = kv.element("input");
        Object.assign(slider, { type: "range", min: 0, step: 1, value: 0 });
        slider.setAttribute("aria-label", "Position of the query token");
        slider.addEventListener("input", () => {
            pause();
            seek(Number(slider.value));
        });
        kv.byId("replay-seek").replaceChildren(slider);
        return slider;
    }

    function legend() {
        const entries = [
            ["kept", "Kept"], ["current", "This query"], ["leaving", "× Evicted now"],
            ["evicted", "· Evicted before"], ["future", "Not yet"], ["sink", "▲ Sink of this head"],
        ];
        kv.byId("replay-legend").replaceChildren(...entries.map(([name, word]) => {
            const entry = kv.element("span", `kv-legend-entry kv-legend-${name}`);
            entry.append(kv.element("i"), word);
            return entry;
        }));
    }

    /* ---- choosing what is shown ---- */

    async function update(config, request, layer, head, chosen, speed) {
        const here = mount(config);
        const info = config.requests[request];
        const asked = { request, layer, head, chosen: chosen || [] };
        const changed = JSON.stringify(asked) !== JSON.stringify(here.asked);
        here.asked = asked;
        here.info = info;
        here.speed = Number(speed);
        here.slider.max = Math.max(0, info.tokens - 1);
        if (!here.started) {
            const saved = Number.parseInt(config.time, 10);
            /* Without a time: the first decoded token, just after the first cut. */
            here.time = Number.isFinite(saved) ? saved : info.prompt_tokens;
            here.started = true;
        }
        here.time = Math.min(Math.max(0, here.time), Math.max(0, info.tokens - 1));
        kv.setQuery({ trace: config.trace, request, layer, head, replays: asked.chosen.join(" "), speed });
        if (!changed) return;
        try {
            await load(here, asked);
            if (!current(here, asked)) return;
            kv.say(STATUS, asked.chosen.length ? "" : emptyHint(config), "info");
        } catch (error) {
            kv.say(STATUS, error.message);
        }
        draw();
        saveTime();
    }

    const emptyHint = (config) => (Object.keys(config.labels).length
        ? "Choose up to six replays to compare."
        : "No replay is stored in this trace yet: run one below, or use the kvtrace replay command.");

    const current = (here, asked) =>
        page === here && here.asked === asked && here.cards.isConnected;

    async function load(here, asked) {
        const { trace } = here.config;
        const query = { trace, request: asked.request, layer: asked.layer, kv_head: asked.head };
        const [tokens, sinks, mass, ...columns] = await Promise.all([
            kv.json("tokens", { trace, request: asked.request }),
            kv.json("sinks", query),
            kv.json("mass", { trace, request: asked.request, replays: asked.chosen.join(" "), scheme: kv.scheme() }),
            ...asked.chosen.map((replay) => kv.bytes("evicted", { ...query, replay })),
        ]);
        if (!current(here, asked)) return;
        here.tokens = tokens.tokens;
        here.sinks = new Set(sinks);
        here.mass = massByPosition(mass.series);
        kv.setProps("replay-mass", { figure: mass.figure });
        here.order = asked.chosen.map((id, index) => {
            const card = here.byId.get(id) || new kv.PolicyCard(id, here.config.labels[id], pointed);
            card.setColumn(new Int32Array(columns[index]), here.sinks);
            here.byId.set(id, card);
            return card;
        });
        here.cards.replaceChildren(...here.order.map((card) => card.root));
        paintSwatches(here, mass.figure);
    }

    function massByPosition(series) {
        const found = {};
        for (const [id, steps] of Object.entries(series)) {
            found[id] = new Map(steps.position.map((position, index) => [position, steps.mass[index]]));
        }
        return found;
    }

    function paintSwatches(here, figure) {
        here.order.forEach((card, index) => {
            const line = figure.data[index] && figure.data[index].line;
            card.swatch.style.background = line ? line.color : "transparent";
        });
    }

    /* ---- the clock ---- */

    function seek(time) {
        const last = Math.max(0, page.info.tokens - 1);
        page.time = Math.min(last, Math.max(0, time));
        draw();
        saveTime();
    }

    function play() {
        if (page.time >= page.info.tokens - 1) seek(Math.max(0, page.info.prompt_tokens - 1));
        page.playing = true;
        page.from = { at: performance.now(), time: page.time, speed: page.speed };
        button();
        requestAnimationFrame(tick);
    }

    function pause() {
        if (!page || !page.playing) return;
        page.playing = false;
        button();
        saveTime();
    }

    function tick(now) {
        const here = page;
        if (!here.playing) return;
        if (!here.cards.isConnected) {
            here.playing = false;
            return;
        }
        if (here.from.speed !== here.speed) {
            here.from = { at: now, time: here.time, speed: here.speed };
        }
        const time = here.from.time + Math.floor(((now - here.from.at) / 1000) * here.speed);
        if (time !== here.time) {
            here.time = Math.min(time, here.info.tokens - 1);
            draw();
        }
        if (here.time >= here.info.tokens - 1) pause();
        else requestAnimationFrame(tick);
    }

    function button() {
        const made = kv.byId("replay-play");
        if (made) made.textContent = page.playing ? "Pause" : "Play";
    }

    function saveTime() {
        clearTimeout(page.saving);
        const here = page;
        page.saving = setTimeout(() => {
            if (here === page && here.cards.isConnected) kv.setQuery({ t: here.time });
        }, 120);
    }

    /* ---- drawing ---- */

    function colours() {
        const names = ["kept", "current", "leaving", "evicted", "future"];
        const found = Object.fromEntries(names.map((name) => [name, kv.token(`cell-${name}`)]));
        return {
            ...found, ink: kv.token("cell-ink"), dot: kv.token("cell-dot"),
            frame: kv.token("cell-frame"), sink: kv.token("cell-sink"), sinkEdge: kv.token("surface"),
        };
    }

    function draw() {
        if (!page || !page.info || page.drawing) return;
        page.drawing = true;
        requestAnimationFrame(() => {
            page.drawing = false;
            if (page.cards.isConnected) drawNow();
        });
    }

    function drawNow() {
        const palette = colours();
        for (const card of page.order) {
            const mass = page.mass[card.id] && page.mass[card.id].get(page.time);
            card.draw(page.time, palette, mass);
        }
        page.slider.value = page.time;
        page.cards.dataset.time = page.time;
        clock();
        cursor();
    }

    function clock() {
        const box = kv.byId("replay-clock");
        const phase = page.time < page.info.prompt_tokens ? "prompt" : "decode";
        box.replaceChildren(
            kv.element("b", "", kv.count(page.time)),
            kv.element("span", "kv-clock-total", `of ${kv.count(page.info.tokens - 1)}`),
            kv.element("span", `kv-chip kv-phase-${phase}`, phase),
            kv.element("code", "", kv.showToken(page.tokens[page.time])),
        );
    }

    /* A line over the plot at the clock's time: moving a div costs nothing, relayout would. */
    function cursor() {
        const line = kv.byId("replay-cursor");
        const plot = document.querySelector("#replay-mass .js-plotly-plot");
        const full = plot && plot._fullLayout;
        const axis = full && full.xaxis;
        if (!axis || !axis.l2p) {
            line.style.display = "none";
            return;
        }
        const x = axis.l2p(page.time);
        const inside = x >= 0 && x <= axis._length;
        line.style.display = inside ? "block" : "none";
        line.style.left = `${axis._offset + x}px`;
        line.style.top = `${full.yaxis._offset}px`;
        line.style.height = `${full.yaxis._length}px`;
    }

    function pointed(card, position, event) {
        const tip = kv.byId("replay-tip");
        if (position === null) {
            tip.style.display = "none";
            return;
        }
        const when = card.evictedAt[position];
        const state = kv.cellState(position, when, page.time);
        const words = {
            future: "not processed yet", kept: "kept", current: "this query's own token",
            leaving: "evicted after this query", evicted: `evicted after query ${kv.count(when)}`,
        };
        tip.replaceChildren(
            kv.element("span", "kv-tip-token", kv.showToken(page.tokens[position])),
            kv.element("span", "kv-position", kv.count(position)),
            kv.element("span", "", words[state]),
            ...(page.sinks.has(position) ? [kv.element("span", "kv-mark-sink", "▲ sink")] : []),
        );
        const box = tip.parentElement.getBoundingClientRect();
        kv.placeTip(tip, event.clientX - box.left, event.clientY - box.top);
    }

    /* ---- running new replays ---- */

    function run() {
        const { policies, budgets, when } = page.form;
        const body = {
            trace: page.config.trace, policies, budgets, when: when === "default" ? null : when,
            request: Number(page.asked.request),
        };
        kv.work("replay-run", "Replaying…", "replays", body, finished);
    }

    async function finished(results) {
        const rows = await kv.json("replays", { trace: page.config.trace });
        page.config.labels = Object.fromEntries(rows.map((row) => [row.replay, row]));
        for (const id of results) page.byId.delete(id);
        page.asked = null;
        kv.setProps("replay-grid", { rowData: rows });
        kv.setProps("replay-chosen", { data: options(rows), value: results.slice(0, 6) });
        return `Stored ${results.length} replay${results.length === 1 ? "" : "s"}.`;
    }

    function options(rows) {
        const groups = new Map();
        for (const row of rows) {
            const group = `Budget ${row.budget}`;
            if (!groups.has(group)) groups.set(group, []);
            groups.get(group).push({ value: row.replay, label: row.label });
        }
        return [...groups].map(([group, items]) => ({ group, items }));
    }

    /* ---- input ---- */

    kv.actions["replay-first"] = () => { pause(); seek(0); };
    kv.actions["replay-back"] = () => { pause(); seek(page.time - 1); };
    kv.actions["replay-play"] = () => (page.playing ? pause() : play());
    kv.actions["replay-forward"] = () => { pause(); seek(page.time + 1); };
    kv.actions["replay-last"] = () => { pause(); seek(page.info.tokens - 1); };
    kv.actions["replay-run"] = run;
    kv.actions["replay-csv"] = () => kv.download("mass.csv", {
        trace: page.config.trace, request: page.asked.request,
        replays: page.asked.chosen.join(" "),
    }, STATUS);

    const KEYS = { " ": "play", ArrowLeft: "back", ArrowRight: "forward", Home: "first", End: "last" };
    document.addEventListener("keydown", (event) => {
        const action = KEYS[event.key];
        const typing = event.target.closest("input, textarea, select, button, [role=combobox], .ag-root");
        if (!action || typing || !page || !page.cards.isConnected) return;
        event.preventDefault();
        kv.actions[`replay-${action}`]();
    });

    kv.onScheme(async () => {
        if (!page || !page.cards.isConnected || !page.asked) return;
        const here = page;
        draw();
        showCurve(here);
        const { request, chosen } = here.asked;
        const mass = await kv.json("mass", {
            trace: here.config.trace, request, replays: chosen.join(" "), scheme: kv.scheme(),
        });
        if (page !== here || !here.cards.isConnected) return;
        kv.setProps("replay-mass", { figure: mass.figure });
        paintSwatches(here, mass.figure);
    });

    kv.clientside("replay", {
        update(...values) {
            if (values[0] && values[1] !== null) update(...values);
            return kv.nothing();
        },
        form(policies, budgets, when) {
            if (page) page.form = { policies: policies || [], budgets: budgets || [], when };
            return kv.nothing();
        },
    });
})(window.kv);

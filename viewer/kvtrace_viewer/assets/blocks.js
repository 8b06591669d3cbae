/* The blocks page: one clock of steps for all chosen pools, and new what-ifs. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const STATUS = "blocks-status";
    const MAX_TEXT = 160;
    let page = null;

    function mount(config) {
        const cards = kv.byId("blocks-cards");
        if (page && page.cards === cards && page.config === config) return page;
        page = { config, cards, pools: [], time: 0, playing: false, started: false, form: (page && page.form) || {} };
        cards.replaceChildren();
        const slider = kv.element("input");
        Object.assign(slider, { type: "range", min: 0, step: 1, value: 0 });
        slider.setAttribute("aria-label", "Step");
        slider.addEventListener("input", () => {
            pause();
            seek(Number(slider.value));
        });
        kv.byId("blocks-seek").replaceChildren(slider);
        page.slider = slider;
        new ResizeObserver(() => draw()).observe(cards);
        return page;
    }

    /* By request, shapes alone say what a step does with a block. */
    const SHAPES = {
        bar: "written by a prompt", frame: "written by decoding", dot: "shared",
        cached: "cached, nobody holds it", free: "free",
    };

    function legend(colour) {
        const entries = Object.entries(colour === "use" ? kv.poolUses : SHAPES);
        kv.byId("blocks-legend").replaceChildren(...entries.map(([name, words]) => {
            const entry = kv.element("span", `kv-legend-entry kv-legend-pool-${name}`);
            entry.append(kv.element("i"), words);
            return entry;
        }));
    }

    async function update(config, chosen, colour, speed) {
        const here = mount(config);
        here.speed = Number(speed);
        here.colour = colour;
        legend(colour);
        const runs = (chosen || []).join(" ");
        kv.setQuery({ trace: config.trace, runs, colour, speed });
        if (runs !== here.runs) {
            here.runs = runs;
            try {
                await load(here, chosen || []);
            } catch (error) {
                kv.say(STATUS, error.message);
            }
        }
        if (page === here) draw();
    }

    async function load(here, chosen) {
        const { trace } = here.config;
        kv.say(STATUS, chosen.length ? "Reading the blocks…" : "No block was recorded. kvtrace record --detail events -- SCRIPT.py records them where the script serves by continuous batching (examples/record_batching.py); or simulate a pool below.", "info");
        const [rows, ...found] = await Promise.all([
            kv.json("pools", { trace }),
            ...chosen.map((run) => kv.json("pools/history", { trace, run })),
        ]);
        if (page !== here || here.runs !== chosen.join(" ")) return;
        const labels = Object.fromEntries(rows.map((row) => [row.allocation_run, row.label]));
        here.pools = found.map((data, n) => new kv.Pool(chosen[n], labels[chosen[n]] || chosen[n], data, pointed, (step) => {
            pause();
            seek(step);
        }));
        here.cards.replaceChildren(...here.pools.map((pool) => pool.root));
        here.last = Math.max(0, ...here.pools.map((pool) => pool.steps - 1));
        here.slider.max = here.last;
        if (!here.started) {
            here.time = Number.parseInt(here.config.time, 10) || 0;
            here.started = true;
        }
        here.time = Math.min(Math.max(0, here.time), here.last);
        const notes = [...new Set(found.flatMap((data) => data.notes))];
        if (chosen.length) kv.say(STATUS, notes.join(". "), "info");
    }

    /* ---- the clock ---- */

    function seek(time) {
        page.time = Math.min(page.last || 0, Math.max(0, time));
        draw();
        clearTimeout(page.saving);
        const here = page;
        here.saving = setTimeout(() => {
            if (here === page && here.cards.isConnected) kv.setQuery({ t: here.time });
        }, 120);
    }

    function play() {
        if (page.time >= page.last) seek(0);
        page.playing = true;
        page.from = { at: performance.now(), time: page.time, speed: page.speed };
        kv.byId("blocks-play").textContent = "Pause";
        requestAnimationFrame(tick);
    }

    function pause() {
        if (!page || !page.playing) return;
        page.playing = false;
        const button = kv.byId("blocks-play");
        if (button) button.textContent = "Play";
    }

    function tick(now) {
        const here = page;
        if (!here.playing) return;
        if (!here.cards.isConnected) {
            here.playing = false;
            return;
        }
        if (here.from.speed !== here.speed) here.from = { at: now, time: here.time, speed: here.speed };
        const time = here.from.time + Math.floor(((now - here.from.at) / 1000) * here.speed);
        if (time !== here.time) seek(time);
        if (here.time >= here.last) pause();
        else requestAnimationFrame(tick);
    }

    function draw() {
        if (!page || page.drawing) return;
        page.drawing = true;
        const here = page;
        requestAnimationFrame(() => {
            here.drawing = false;
            if (page !== here || !here.cards.isConnected) return;
            for (const pool of here.pools) pool.draw(here.time, here.colour);
            here.slider.value = here.time;
            here.cards.dataset.time = here.time;
            kv.byId("blocks-clock").replaceChildren(
                kv.element("b", "", kv.count(here.time)),
                kv.element("span", "kv-clock-total", `of ${kv.count(here.last || 0)} steps`),
            );
        });
    }

    /* Texts of a request's tokens, read once. */
    function texts(request) {
        page.texts = page.texts || new Map();
        if (!page.texts.has(request)) {
            const read = kv.json("tokens", { trace: page.config.trace, request });
            page.texts.set(request, read.then((found) => found.tokens, () => []));
        }
        return page.texts.get(request);
    }

    async function tellText(tip, { request, first, count }) {
        const asked = (tip.asked = {});
        const found = (await texts(request)).slice(first, first + count).join("");
        if (tip.asked !== asked || !found) return;
        const short = found.length > MAX_TEXT ? `${found.slice(0, MAX_TEXT)}…` : found;
        tip.append(kv.element("span", "kv-tip-text", short.replaceAll("\n", "↵")));
    }

    function pointed(pool, words, event) {
        const tip = kv.byId("blocks-tip");
        tip.asked = null;
        if (!words) {
            tip.style.display = "none";
            return;
        }
        tip.replaceChildren(
            kv.element("span", "kv-tip-token", words[0]),
            ...words.slice(1).map((word) => kv.element("span", "", word)),
        );
        const box = tip.parentElement.getBoundingClientRect();
        kv.placeTip(tip, event.clientX - box.left, event.clientY - box.top);
        if (words.text) tellText(tip, words.text);
    }

    /* ---- other pools ---- */

    const run = () =>
        kv.work("blocks-run", "Simulating…", "pools", { trace: page.config.trace, ...page.form }, finished);

    async function finished(results) {
        const rows = await kv.json("pools", { trace: page.config.trace });
        kv.setProps("blocks-grid", { rowData: rows });
        const kept = (page.runs || "").split(" ").filter(Boolean).slice(0, 1);
        kv.setProps("blocks-chosen", {
            data: rows.map((row) => ({ value: row.allocation_run, label: row.label })),
            value: [...new Set([...kept, ...results])].slice(0, 3),
        });
        return `Stored ${results.length} pool${results.length === 1 ? "" : "s"}.`;
    }

    const numbers = (texts) => (texts || []).map((text) => {
        if (/^[0-9]+$/.test(text)) return Number(text);
        kv.say("blocks-run-status", `"${text}" is no whole number`);
        return null;
    }).filter((number) => number !== null);

    kv.actions["blocks-first"] = () => { pause(); seek(0); };
    kv.actions["blocks-back"] = () => { pause(); seek(page.time - 1); };
    kv.actions["blocks-play"] = () => (page.playing ? pause() : play());
    kv.actions["blocks-forward"] = () => { pause(); seek(page.time + 1); };
    kv.actions["blocks-last"] = () => { pause(); seek(page.last); };
    kv.actions["blocks-run"] = run;

    const KEYS = { " ": "play", ArrowLeft: "back", ArrowRight: "forward", Home: "first", End: "last" };
    document.addEventListener("keydown", (event) => {
        const action = KEYS[event.key];
        const typing = event.target.closest("input, textarea, select, button, [role=combobox], .ag-root");
        if (!action || typing || !page || !page.cards.isConnected) return;
        event.preventDefault();
        kv.actions[`blocks-${action}`]();
    });
    kv.onScheme(() => draw());

    kv.clientside("blocks", {
        update(...values) {
            if (values[0]) update(...values);
            return kv.nothing();
        },
        form(pool, blockSize, maxBatch, admission, policy, preempt) {
            const form = {
                pool: numbers(pool), block_size: numbers(blockSize), max_batch: numbers(maxBatch),
                admission: admission || [], policy: policy || [], preempt: preempt || [],
            };
            const given = [pool, blockSize, maxBatch, ...Object.values(form).slice(3)];
            kv.setQuery(Object.fromEntries(Object.keys(form).map((name, n) => [name, (given[n] || []).join(" ")])));
            if (page) page.form = form;
            else page = { form, cards: null };
            return kv.nothing();
        },
    });
})(window.kv);

/* A pool's card: a cell a block, or a few blocks, drawn for any step; below it the requests over the steps. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const ALLOCATE = 0, SHARE = 1, KEEP = 3, EVICT = 4;
    const FREE_CELL = 0, CACHED = 1, HELD = 2;
    const MAX_CELL = 34, MIN_CELL = 4, GLYPH_CELL = 10;
    const MAX_HEIGHT = 420, LANES = 220, NAMES = 112, BARS = 54;

    const column = (text) =>
        new Int32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

    /* Colours that differ between neighbours, by the golden angle. */
    const ofRequest = (place) => {
        const light = kv.scheme() === "dark" ? 62 : 50;
        return `hsl(${(place * 137.508 + 212) % 360} 58% ${light + (place % 3) * 7 - 7}%)`;
    };

    kv.Pool = class {
        /* `pointed(pool, words or null, event)` as the pointer moves; `sought(step)` at a click. */
        constructor(id, label, data, pointed, sought) {
            this.id = id;
            Object.assign(this, data);
            for (const [name, text] of Object.entries(data.columns)) this[name] = column(text);
            this.root = kv.element("article", "kv-card kv-pool");
            this.root.dataset.run = id;
            const head = kv.element("header");
            head.append(kv.element("h3", "", label));
            this.canvas = kv.element("canvas", "kv-pool-grid");
            this.lanes = kv.element("canvas", "kv-pool-lanes");
            this.facts = kv.element("div", "kv-card-facts");
            this.root.append(head, this.canvas, this.facts, this.lanes);
            this.canvas.addEventListener("pointermove", (e) => pointed(this, this.cellAt(e), e));
            this.canvas.addEventListener("pointerleave", (e) => pointed(this, null, e));
            this.lanes.addEventListener("pointermove", (e) => pointed(this, this.laneAt(e), e));
            this.lanes.addEventListener("pointerleave", (e) => pointed(this, null, e));
            this.lanes.addEventListener("click", (e) => {
                const step = this.stepAt(e);
                if (step !== null) sought(step);
            });
            this.restart();
        }

        restart() {
            this.event = 0;
            this.part = 0;
            this.at = -1;
            this.state = new Uint8Array(this.blocks);
            this.refs = new Int32Array(this.blocks);
            this.owner = new Int32Array(this.blocks).fill(-1);
            this.place = new Int32Array(this.blocks).fill(-1);
            this.length = new Int32Array(this.requests.length);
            this.now = new Map();
        }

        /* Going back begins anew: a million events take some milliseconds. */
        seek(step) {
            if (step < this.at) this.restart();
            while (this.event < this.moment.length && this.moment[this.event] <= step) this.apply();
            if (step !== this.at) this.now = new Map();
            while (this.part < this.partStep.length && this.partStep[this.part] <= step) {
                const request = this.partRequest[this.part];
                const past = this.partPast[this.part], count = this.partCount[this.part];
                this.length[request] = past + count;
                if (this.partStep[this.part] === step) {
                    this.now.set(request, { past, count, prefill: past < this.requests[request].prompt });
                }
                this.part += 1;
            }
            this.at = step;
        }

        apply() {
            const kind = this.kind[this.event], block = this.block[this.event];
            const request = this.request[this.event];
            if (kind === EVICT) {
                this.state[block] = FREE_CELL;
                this.owner[block] = -1;
            } else if (kind === ALLOCATE || kind === SHARE) {
                this.state[block] = HELD;
                this.refs[block] += 1;
                if (kind === ALLOCATE || this.refs[block] === 1) this.owner[block] = request;
                this.place[block] = this.index[this.event];
            } else {
                this.refs[block] = Math.max(0, this.refs[block] - 1);
                if (this.refs[block] === 0) {
                    this.state[block] = kind === KEEP ? CACHED : FREE_CELL;
                    if (kind !== KEEP) this.owner[block] = -1;
                }
            }
            this.event += 1;
        }

        /* free, cached, idle, read, write or prefill, while the step runs. */
        use(block) {
            if (this.state[block] !== HELD) return this.state[block] === CACHED ? "cached" : "free";
            const now = this.now.get(this.owner[block]);
            if (!now) return this.refs[block] > 1 ? "read" : "idle";
            const from = this.place[block] * this.blockSize;
            const written = from + this.blockSize > now.past && from < now.past + now.count;
            if (!written) return "read";
            return now.prefill ? "prefill" : "write";
        }

        tokens(block) {
            if (this.state[block] === FREE_CELL) return 0;
            if (this.state[block] === CACHED || this.owner[block] < 0) return this.blockSize;
            const left = this.length[this.owner[block]] - this.place[block] * this.blockSize;
            return Math.min(this.blockSize, Math.max(0, left));
        }

        measure() {
            const width = Math.max(160, this.root.clientWidth - 26);
            let cell = MAX_CELL;
            let group = 1;
            const rows = () => Math.ceil(Math.ceil(this.blocks / group) / Math.floor(width / cell));
            while (cell > MIN_CELL && rows() * cell > MAX_HEIGHT) cell -= 1;
            while (rows() * cell > MAX_HEIGHT) group += 1;
            const columns = Math.floor(width / cell);
            return { width: columns * cell, cell, columns, group, height: rows() * cell };
        }

        draw(step, colour) {
            this.seek(Math.min(step, this.steps));
            const { width, height, cell, columns, group } = this.measure();
            const context = kv.sizeCanvas(this.canvas, width, height);
            context.clearRect(0, 0, width, height);
            const inset = cell >= GLYPH_CELL ? 1.5 : 0.5;
            for (let first = 0, n = 0; first < this.blocks; first += group, n += 1) {
                const x = (n % columns) * cell, y = Math.floor(n / columns) * cell;
                this.drawCell(context, first, group, x, y, cell - inset, colour);
            }
            this.root.dataset.group = group;
            this.tell(step);
            this.drawLanes(step);
        }

        /* Several blocks in one cell: the first that is held stands for them, its height for the share. */
        drawCell(context, first, group, x, y, side, colour) {
            let block = first, held = 0;
            const end = Math.min(first + group, this.blocks);
            for (let one = first; one < end; one += 1) {
                if (this.state[one] === HELD) {
                    if (!held) block = one;
                    held += 1;
                } else if (!held && this.state[one] === CACHED) {
                    block = one;
                }
            }
            const use = this.use(block);
            context.fillStyle = kv.token(use === "cached" ? "pool-cached" : "pool-free");
            context.fillRect(x, y, side, side);
            if (!held) return;
            const share = group > 1 ? held / (end - first) : this.tokens(block) / this.blockSize;
            const high = Math.max(1, side * share);
            const own = this.owner[block];
            context.globalAlpha = use === "idle" && colour === "request" ? 0.45 : 1;
            context.fillStyle = colour === "use" ? kv.token(`pool-${use}`) : own < 0 ? kv.token("pool-idle") : ofRequest(own);
            context.fillRect(x, y + side - high, side, high);
            context.globalAlpha = 1;
            if (group === 1 && side + 1.5 >= GLYPH_CELL) this.drawGlyph(context, use, block, x, y, side);
        }

        /* Shapes say what colours say: a frame is written by decoding, a bar by a prompt, a dot is shared. */
        drawGlyph(context, use, block, x, y, side) {
            context.strokeStyle = kv.token("cell-frame");
            context.fillStyle = kv.token("cell-frame");
            context.lineWidth = 2;
            if (use === "write") context.strokeRect(x + 1, y + 1, side - 2, side - 2);
            if (use === "prefill") context.fillRect(x, y, side, 3);
            if (this.refs[block] > 1) {
                context.beginPath();
                context.arc(x + side / 2, y + side / 2, Math.max(2, side / 7), 0, 7);
                context.fillStyle = kv.token("surface");
                context.fill();
            }
        }

        tell(step) {
            let held = 0, cached = 0, shared = 0;
            for (let block = 0; block < this.blocks; block += 1) {
                held += this.state[block] === HELD;
                cached += this.state[block] === CACHED;
                shared += this.refs[block] > 1;
            }
            const waiting = this.requests.filter((r) => r.first !== null && r.arrival <= step && r.first > step).length;
            const away = this.requests.filter((r) => isAway(r, step)).length;
            Object.assign(this.root.dataset, { held, cached, shared, step });
            const facts = [
                ["held", `${kv.count(held)} of ${kv.count(this.blocks)}`], ["cached", kv.count(cached)],
                ["shared", kv.count(shared)], ["unused slots", kv.count(this.unused[step] || 0)],
                ["in the batch", kv.count(this.now.size)], ["waiting", kv.count(waiting)], ["preempted", kv.count(away)],
                ...(this.bytesPerBlock ? [["bytes", `${kv.count(Math.round(held * this.bytesPerBlock / 1024))} KiB`]] : []),
            ];
            this.facts.replaceChildren(...facts.map(([name, value]) => {
                const fact = kv.element("span");
                fact.append(kv.element("small", "", name), kv.element("b", "", value));
                return fact;
            }));
        }

        /* ---- requests over steps, under the blocks that are held and cached ---- */

        laneShape() {
            const width = Math.max(160, this.root.clientWidth - 26);
            const row = Math.max(1, Math.min(15, LANES / Math.max(1, this.requests.length)));
            const left = row >= 11 ? NAMES : 0;
            return { width, left, row, each: (width - left) / Math.max(1, this.steps), height: BARS + 4 + row * this.requests.length };
        }

        drawLanes(step) {
            const { width, left, row, each, height } = this.laneShape();
            const context = kv.sizeCanvas(this.lanes, width, height);
            context.clearRect(0, 0, width, height);
            const bar = Math.max(1, each);
            const high = (count) => (BARS * count) / Math.max(1, this.blocks);
            for (let at = 0; at < this.steps; at += Math.max(1, Math.floor(1 / each))) {
                const x = left + at * each;
                context.fillStyle = kv.token("pool-idle");
                context.fillRect(x, BARS - high(this.held[at]), bar, high(this.held[at]));
                context.fillStyle = kv.token("pool-cached");
                const top = high(this.held[at] + this.cached[at]);
                context.fillRect(x, BARS - top, bar, high(this.cached[at]));
            }
            context.font = `11px ${kv.sans}`;
            context.textBaseline = "middle";
            this.requests.forEach((request, place) => {
                const y = BARS + 4 + place * row;
                if (left) {
                    context.fillStyle = kv.token("muted");
                    context.fillText(shorten(context, request.name, left - 10), 0, y + row / 2);
                }
                const until = request.first ?? request.arrival;
                context.fillStyle = kv.token("pool-waiting");
                for (const [begin, end] of [[request.arrival, until], ...request.away]) {
                    context.fillRect(left + begin * each, y + row * 0.4, (end - begin) * each, Math.max(1, row * 0.2));
                }
            });
            const thick = Math.max(1, row - 3);
            for (let part = 0; part < this.partStep.length; part += 1) {
                const place = this.partRequest[part];
                const prefill = this.partPast[part] < this.requests[place].prompt;
                context.fillStyle = ofRequest(place);
                const y = BARS + 4 + place * row;
                const thin = prefill ? 0 : thick * 0.28;
                context.fillRect(left + this.partStep[part] * each, y + thin, Math.max(1, each - (each > 4 ? 1 : 0)), thick - 2 * thin);
            }
            context.fillStyle = kv.token("cell-frame");
            context.fillRect(left + Math.min(step, this.steps) * each, 0, Math.max(1.5, Math.min(3, each / 3)), height);
        }

        stepAt(event) {
            const { left, each } = this.laneShape();
            const step = Math.floor((event.clientX - this.lanes.getBoundingClientRect().left - left) / each);
            return step >= 0 && step < this.steps ? step : null;
        }

        laneAt(event) {
            const { row } = this.laneShape();
            const y = event.clientY - this.lanes.getBoundingClientRect().top - BARS - 4;
            const request = this.requests[Math.floor(y / row)], step = this.stepAt(event);
            if (step === null) return null;
            if (y < 0 || !request) {
                return [`Step ${kv.count(step)}`, `${kv.count(this.held[step])} held, ${kv.count(this.cached[step])} cached`];
            }
            return [request.name, `step ${kv.count(step)}; came at ${kv.count(request.arrival)}`,
                request.first === null ? "never begun" : `begun at ${kv.count(request.first)}`,
                ...(isAway(request, step) ? ["preempted: waits to come back"] : [])];
        }

        cellAt(event) {
            const box = this.canvas.getBoundingClientRect();
            const { cell, columns, group } = this.measure();
            const x = Math.floor((event.clientX - box.left) / cell);
            const first = (Math.floor((event.clientY - box.top) / cell) * columns + x) * group;
            if (x < 0 || x >= columns || first < 0 || first >= this.blocks) return null;
            if (group > 1) return this.groupWords(first, Math.min(first + group, this.blocks));
            const words = [`Block ${kv.count(first + this.firstBlock)}`, kv.poolUses[this.use(first)]];
            if (this.owner[first] >= 0) words.push(this.requests[this.owner[first]].name);
            if (this.state[first] !== FREE_CELL) {
                words.push(`${this.tokens(first)} of ${this.blockSize} tokens`, `held by ${this.refs[first]}`);
                const begin = this.place[first] * this.blockSize;
                if (begin >= 0) words.push(`tokens from ${kv.count(begin)}`);
                if (begin >= 0 && this.owner[first] >= 0) {
                    words.text = { request: this.requests[this.owner[first]].number, first: begin, count: this.tokens(first) };
                }
            }
            return words;
        }

        groupWords(first, end) {
            let held = 0, cached = 0;
            for (let block = first; block < end; block += 1) {
                held += this.state[block] === HELD;
                cached += this.state[block] === CACHED;
            }
            return [`Blocks ${kv.count(first + this.firstBlock)} to ${kv.count(end - 1 + this.firstBlock)}`,
                `${held} held, ${cached} cached, ${end - first - held - cached} free`];
        }
    };

    kv.poolUses = {
        prefill: "written by a prompt", write: "written by decoding", read: "read by this step",
        idle: "held, not in this step", cached: "cached, nobody holds it", free: "free",
    };

    /* Whether a request had lost its blocks to a preemption and had not come back. */
    function isAway(request, step) {
        return request.away.some(([begin, end]) => begin <= step && step < end);
    }

    function shorten(context, text, width) {
        if (context.measureText(text).width <= width) return text;
        let length = text.length;
        while (length > 1 && context.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
        return `${text.slice(0, length)}…`;
    }
})(window.kv);

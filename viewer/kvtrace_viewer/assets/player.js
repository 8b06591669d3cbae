/* A policy's card: one cell a token, drawn for any time from `evicted_at` alone. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const MAX_CELL = 15;
    const MIN_CELL = 3;
    const GLYPH_CELL = 8;
    const MAX_HEIGHT = 176;

    /* State of a key after the cut of the row at `time`. `evictedAt` is the position of the query
       after whose row it was evicted, -1 = never. */
    kv.cellState = function (position, evictedAt, time) {
        if (position > time) return "future";
        const gone = evictedAt >= 0 && evictedAt <= time;
        if (gone) return evictedAt === time ? "leaving" : "evicted";
        return position === time ? "current" : "kept";
    };

    kv.PolicyCard = class {
        /* `pointed(card, position or null, event)` is called as the pointer moves. */
        constructor(id, info, pointed) {
            this.id = id;
            this.info = info;
            this.root = kv.element("article", "kv-card");
            this.root.dataset.replay = id;
            const head = kv.element("header");
            head.append(kv.element("h3", "", info.policy), kv.element("span", "kv-chip", info.budget),
                kv.element("span", "kv-chip kv-chip-quiet", info.decide_when),
                kv.element("span", "kv-chip kv-chip-quiet", info.exactness));
            head.lastChild.title = "Exactness class: see docs/policies.md";
            if (info.rerotate) head.append(kv.element("span", "kv-chip kv-chip-quiet", "re-rotated"));
            this.swatch = kv.element("span", "kv-swatch");
            head.prepend(this.swatch);
            this.canvas = kv.element("canvas");
            this.facts = kv.element("div", "kv-card-facts");
            this.root.append(head, this.canvas, this.facts);
            this.canvas.addEventListener("pointermove", (event) => {
                pointed(this, this.positionAt(event), event);
            });
            this.canvas.addEventListener("pointerleave", (event) => pointed(this, null, event));
        }

        /* Int32Array by position; sorted eviction times make the counts cheap. */
        setColumn(evictedAt, sinks) {
            this.evictedAt = evictedAt;
            this.sinks = sinks;
            this.times = evictedAt.filter((time) => time >= 0).sort();
        }

        measure() {
            const width = Math.max(80, this.root.clientWidth - 26);
            const total = this.evictedAt.length;
            let cell = MAX_CELL;
            const rows = (size) => Math.ceil(total / Math.floor(width / size));
            while (cell > MIN_CELL && rows(cell) * cell > MAX_HEIGHT) cell -= 1;
            const columns = Math.floor(width / cell);
            return { width: columns * cell, cell, columns, height: rows(cell) * cell };
        }

        positionAt(event) {
            if (!this.evictedAt) return null;
            const box = this.canvas.getBoundingClientRect();
            const { cell, columns } = this.measure();
            const column = Math.floor((event.clientX - box.left) / cell);
            const position = Math.floor((event.clientY - box.top) / cell) * columns + column;
            return column < columns && position < this.evictedAt.length ? position : null;
        }

        draw(time, colours, mass) {
            if (!this.evictedAt) return;
            const { width, height, cell, columns } = this.measure();
            const context = kv.sizeCanvas(this.canvas, width, height);
            context.clearRect(0, 0, width, height);
            const inset = cell >= GLYPH_CELL ? 1 : 0.5;
            const side = cell - inset;
            const states = { kept: [], leaving: [], evicted: [], current: [], future: [] };
            for (let position = 0; position < this.evictedAt.length; position += 1) {
                states[kv.cellState(position, this.evictedAt[position], time)].push(position);
            }
            const place = (position) =>
                [(position % columns) * cell, Math.floor(position / columns) * cell];
            /* A state at a time, since changing colours costs more than filling cells. */
            for (const [state, positions] of Object.entries(states)) {
                context.fillStyle = colours[state];
                for (const position of positions) {
                    const [x, y] = place(position);
                    context.fillRect(x, y, side, side);
                }
                if (cell >= GLYPH_CELL) {
                    this.drawGlyphs(context, state, positions.map(place), side, colours);
                }
            }
            this.drawSinks(context, time, cell, columns, side, colours);
            this.tell(time, states, mass);
        }

        /* Shapes say what colours say: a cross leaves, a dot is gone, a frame is the query. */
        drawGlyphs(context, state, places, side, colours) {
            context.beginPath();
            for (const [x, y] of places) {
                const [left, top] = [x + side / 2, y + side / 2];
                if (state === "evicted") {
                    context.rect(left - 1, top - 1, 2, 2);
                } else if (state === "leaving") {
                    const arm = side * 0.26;
                    context.moveTo(left - arm, top - arm);
                    context.lineTo(left + arm, top + arm);
                    context.moveTo(left + arm, top - arm);
                    context.lineTo(left - arm, top + arm);
                } else if (state === "current") {
                    context.rect(x + 1, y + 1, side - 2, side - 2);
                }
            }
            context.fillStyle = colours.dot;
            context.strokeStyle = state === "current" ? colours.frame : colours.ink;
            context.lineWidth = state === "current" ? 2 : 1.5;
            if (state === "evicted") context.fill();
            else context.stroke();
        }

        drawSinks(context, time, cell, columns, side, colours) {
            for (const position of this.sinks) {
                if (position > time) continue;
                const x = (position % columns) * cell + side / 2;
                const y = Math.floor(position / columns) * cell + side / 2;
                const size = Math.max(10, side);
                context.beginPath();
                context.moveTo(x, y - size / 2);
                context.lineTo(x + size / 2, y + size / 2);
                context.lineTo(x - size / 2, y + size / 2);
                context.closePath();
                context.fillStyle = colours.sink;
                context.strokeStyle = colours.sinkEdge;
                context.lineWidth = 1;
                context.fill();
                context.stroke();
            }
        }

        tell(time, states, mass) {
            const kept = states.kept.length + states.current.length;
            const present = time + 1;
            this.root.dataset.kept = kept;
            this.root.dataset.leaving = states.leaving.length;
            const facts = [
                ["kept", `${kv.count(kept)} of ${kv.count(present)}`],
                ["leaving now", kv.count(states.leaving.length)],
                ["mass here", mass === null || mass === undefined ? "–" : mass.toFixed(4)],
            ];
            this.facts.replaceChildren(...facts.map(([name, value]) => {
                const fact = kv.element("span");
                fact.append(kv.element("small", "", name), kv.element("b", "", value));
                return fact;
            }));
        }
    };
})(window.kv);

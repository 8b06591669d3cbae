/* The zoomable attention map: tiles, axes with tokens, marks along the key axis. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const MARGIN = { left: 78, top: 10, right: 64, bottom: 94 };
    const MARK_STRIP = 16;
    const MIN_SPAN = 4;
    const MIN_LABEL_PX = 12;
    const MAX_LEVELS_UP = 4;

    const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

    kv.AttentionMap = class {
        /* `listen` has viewChanged(view), hovered(pair or null), failed(error), drawn(info). */
        constructor(parts, listen) {
            this.canvas = parts.canvas;
            this.over = parts.over;
            this.stage = parts.stage;
            this.listen = listen;
            this.view = { x: 0, y: 0, span: 1 };
            this.marks = [];
            this.markAt = new Map();
            this.tokens = [];
            this.keyTokens = [];
            this.numTokens = 0;
            this.pool = "max";
            this.hover = null;
            this.bind();
            new ResizeObserver(() => this.draw()).observe(this.stage);
        }

        /* Show a head; `view` null means all of it, undefined what is shown now. */
        show(query, tokens, keyTokens, causal, view) {
            if (this.store) this.store.close();
            this.store = new kv.TileStore(
                query,
                () => this.draw(),
                (error) => this.listen.failed(error),
            );
            this.scale = query.scale;
            /* The map is square; where keys are another request's, one side of it is empty. */
            const numTokens = Math.max(tokens.length, keyTokens.length);
            const sameSize = numTokens === this.numTokens;
            this.numTokens = numTokens;
            this.tokens = tokens;
            this.keyTokens = keyTokens;
            this.causal = causal;
            this.setView(view === undefined && sameSize ? this.view : view || this.whole());
        }

        whole() {
            return { x: 0, y: 0, span: Math.max(1, this.numTokens) };
        }

        setView(view) {
            const total = Math.max(1, this.numTokens);
            const span = clamp(view.span, Math.min(MIN_SPAN, total), total);
            this.view = {
                span,
                x: clamp(view.x, 0, total - span),
                y: clamp(view.y, 0, total - span),
            };
            this.listen.viewChanged(this.view);
            this.draw();
        }

        /* Zoom by a factor about a point of the map (in tokens); the middle by default. */
        zoom(factor, at) {
            const { x, y, span } = this.view;
            const point = at || { key: x + span / 2, row: y + span / 2 };
            const next = clamp(span * factor, Math.min(MIN_SPAN, this.numTokens), this.numTokens);
            this.setView({
                span: next,
                x: point.key - ((point.key - x) * next) / span,
                y: point.row - ((point.row - y) * next) / span,
            });
        }

        pan(keys, rows) {
            this.setView({ ...this.view, x: this.view.x + keys, y: this.view.y + rows });
        }

        /* Bring a key into the middle, close enough to read the tokens around it. */
        goToKey(key) {
            const span = Math.min(this.view.span, 48);
            this.setView({ span, x: key - span / 2, y: key - span / 4 });
        }

        /* ---- geometry ---- */

        measure() {
            const width = this.stage.clientWidth;
            const height = this.stage.clientHeight;
            const side = Math.max(
                80,
                Math.min(
                    width - MARGIN.left - MARGIN.right,
                    height - MARGIN.top - MARGIN.bottom,
                ),
            );
            return { width, height, side, left: MARGIN.left, top: MARGIN.top };
        }

        /* Level whose cells are at least a CSS pixel wide, so that none is skipped in drawing. */
        level(side) {
            return Math.max(0, Math.ceil(Math.log2(this.view.span / side)));
        }

        pairAt(event) {
            const box = this.canvas.getBoundingClientRect();
            const { side, left, top } = this.measure();
            const px = event.clientX - box.left - left;
            const py = event.clientY - box.top - top;
            if (px < 0 || py < 0 || px >= side || py >= side) return null;
            const { x, y, span } = this.view;
            const row = y + (py / side) * span;
            const key = x + (px / side) * span;
            if (row >= this.tokens.length || key >= this.keyTokens.length) return null;
            return {
                key,
                row,
                px: px + left,
                py: py + top,
            };
        }

        /* ---- drawing ---- */

        draw() {
            if (!this.store || this.pending) return;
            this.pending = true;
            requestAnimationFrame(() => {
                this.pending = false;
                if (this.canvas.isConnected) this.drawNow();
            });
        }

        drawNow() {
            const box = this.measure();
            const context = kv.sizeCanvas(this.canvas, box.width, box.height);
            context.clearRect(0, 0, box.width, box.height);
            context.fillStyle = kv.token("map-empty");
            context.fillRect(box.left, box.top, box.side, box.side);
            this.drawTiles(context, box);
            context.strokeStyle = kv.token("border-strong");
            context.lineWidth = 1;
            context.strokeRect(box.left - 0.5, box.top - 0.5, box.side + 1, box.side + 1);
            this.drawMarks(context, box);
            this.drawAxes(context, box);
            this.drawColourBar(context, box);
            this.drawHover();
            this.listen.drawn({ level: this.level(box.side), busy: this.store.busy });
        }

        tilesInView(level) {
            const { x, y, span } = this.view;
            const size = kv.TILE_CELLS * 2 ** level;
            const keys = [];
            for (let row = Math.floor(y / size); row * size < y + span; row += 1) {
                for (let column = Math.floor(x / size); column * size < x + span; column += 1) {
                    if (row >= column || !this.causal) keys.push(`${level}/${row}/${column}`);
                }
            }
            return keys;
        }

        drawTiles(context, box) {
            const level = this.level(box.side);
            const keys = this.tilesInView(level);
            this.store.want(keys);
            context.save();
            context.beginPath();
            context.rect(box.left, box.top, box.side, box.side);
            context.clip();
            context.imageSmoothingEnabled = false;
            for (const key of keys) this.drawTile(context, box, key);
            context.restore();
        }

        drawTile(context, box, key) {
            const [level, row, column] = key.split("/").map(Number);
            const size = kv.TILE_CELLS * 2 ** level;
            const scale = box.side / this.view.span;
            const place = [
                box.left + (column * size - this.view.x) * scale,
                box.top + (row * size - this.view.y) * scale,
                size * scale,
                size * scale,
            ];
            const exact = this.store.get(key, this.pool);
            if (exact) {
                context.drawImage(exact, ...place);
                return;
            }
            /* Until it arrives, a coarser tile of the same place is better than a hole. */
            for (let up = 1; up <= MAX_LEVELS_UP; up += 1) {
                const part = 2 ** up;
                const parent = this.store.get(
                    `${level + up}/${Math.floor(row / part)}/${Math.floor(column / part)}`,
                    this.pool,
                );
                if (!parent) continue;
                const cells = kv.TILE_CELLS / part;
                const from = [(column % part) * cells, (row % part) * cells, cells, cells];
                context.drawImage(parent, ...from, ...place);
                return;
            }
        }

        drawMarks(context, box) {
            const { x, span } = this.view;
            const cell = box.side / span;
            for (const mark of this.marks) {
                if (mark.position + 1 <= x || mark.position >= x + span) continue;
                const at = box.left + (mark.position + 0.5 - x) * cell;
                const middle = box.top + box.side + MARK_STRIP / 2 + 1;
                kv.glyph(context, mark.kind, clamp(at, box.left + 2, box.left + box.side - 2), middle, 10);
            }
        }

        drawAxes(context, box) {
            const cell = box.side / this.view.span;
            if (cell >= MIN_LABEL_PX) this.drawTokens(context, box, cell);
            else this.drawTicks(context, box, cell);
            context.fillStyle = kv.token("muted");
            context.font = `600 12px ${kv.sans}`;
            context.textAlign = "center";
            context.textBaseline = "bottom";
            context.fillText("key", box.left + box.side / 2, box.top + box.side + MARGIN.bottom - 2);
            context.save();
            context.translate(12, box.top + box.side / 2);
            context.rotate(-Math.PI / 2);
            context.textBaseline = "middle";
            context.fillText("query", 0, 0);
            context.restore();
        }

        drawTicks(context, box, cell) {
            const rough = this.view.span / 6;
            const power = 10 ** Math.floor(Math.log10(rough));
            const step = Math.max(1, power * [1, 2, 5, 10].find((part) => part * power >= rough));
            context.font = `11px ${kv.sans}`;
            context.fillStyle = kv.token("muted");
            context.strokeStyle = kv.token("border-strong");
            const bottom = box.top + box.side;
            for (const [from, along] of [[this.view.x, "x"], [this.view.y, "y"]]) {
                for (let at = Math.ceil(from / step) * step; at < from + this.view.span; at += step) {
                    const px = (at + 0.5 - from) * cell;
                    context.beginPath();
                    if (along === "x") {
                        context.textAlign = "center";
                        context.textBaseline = "top";
                        context.fillText(kv.count(at), box.left + px, bottom + MARK_STRIP + 8);
                        context.moveTo(box.left + px, bottom + MARK_STRIP + 1);
                        context.lineTo(box.left + px, bottom + MARK_STRIP + 5);
                    } else {
                        context.textAlign = "right";
                        context.textBaseline = "middle";
                        context.fillText(kv.count(at), box.left - 9, box.top + px);
                        context.moveTo(box.left - 5, box.top + px);
                        context.lineTo(box.left - 1, box.top + px);
                    }
                    context.stroke();
                }
            }
        }

        drawTokens(context, box, cell) {
            const { x, y, span } = this.view;
            const size = clamp(cell - 3, 9, 12);
            const bottom = box.top + box.side;
            context.font = `${size}px ${kv.monospace}`;
            context.textBaseline = "middle";
            context.textAlign = "right";
            for (let at = Math.floor(y); at < Math.min(y + span, this.tokens.length); at += 1) {
                const py = box.top + (at + 0.5 - y) * cell;
                if (py < box.top || py > bottom) continue;
                this.drawToken(context, at, box.left - 6, py, 0);
            }
            for (let at = Math.floor(x); at < Math.min(x + span, this.keyTokens.length); at += 1) {
                const px = box.left + (at + 0.5 - x) * cell;
                if (px < box.left || px > box.left + box.side) continue;
                this.drawToken(context, at, px, bottom + MARK_STRIP + 4, -Math.PI / 2);
            }
        }

        drawToken(context, at, x, y, turn) {
            const mark = this.markAt.get(at);
            context.fillStyle = kv.token(turn && mark ? mark : "text");
            const word = kv.showToken((turn ? this.keyTokens : this.tokens)[at]);
            const most = 8;
            const shown = word.length > most ? `${word.slice(0, most - 1)}…` : word;
            context.save();
            context.translate(x, y);
            context.rotate(turn);
            context.fillText(shown, 0, 0);
            context.restore();
        }

        setMarks(marks) {
            this.marks = marks;
            this.markAt = new Map(marks.map((mark) => [mark.position, mark.kind]));
            this.draw();
        }

        drawColourBar(context, box) {
            const left = box.left + box.side + 16;
            const height = Math.min(220, box.side);
            for (let step = 0; step < height; step += 1) {
                const code = 1 + Math.round(254 * (1 - step / (height - 1)));
                context.fillStyle = kv.colour(code);
                context.fillRect(left, box.top + step, 10, 1.5);
            }
            const scale = kv.scales[this.scale];
            context.font = `11px ${kv.sans}`;
            context.fillStyle = kv.token("muted");
            context.textAlign = "left";
            context.textBaseline = "middle";
            for (const tick of scale.ticks) {
                const y = box.top + (1 - scale.at(tick)) * (height - 1);
                const word = tick === 1e-5 ? "≤1e-5" : tick === 1e-4 ? "1e-4" : String(tick);
                context.fillText(word, left + 15, clamp(y, box.top + 5, box.top + height - 5));
            }
        }

        drawHover() {
            const box = this.measure();
            const context = kv.sizeCanvas(this.over, box.width, box.height);
            context.clearRect(0, 0, box.width, box.height);
            if (!this.hover) return;
            const cell = box.side / this.view.span;
            const thick = Math.max(1, cell);
            const px = box.left + (this.hover.key - this.view.x) * cell;
            const py = box.top + (this.hover.row - this.view.y) * cell;
            context.save();
            context.beginPath();
            context.rect(box.left, box.top, box.side, box.side);
            context.clip();
            context.fillStyle = kv.token("crosshair");
            context.fillRect(px, box.top, thick, box.side);
            context.fillRect(box.left, py, box.side, thick);
            context.restore();
            if (cell >= 4) {
                context.strokeStyle = kv.token("focus-cell");
                context.lineWidth = 2;
                context.strokeRect(px, py, cell, cell);
            }
        }

        setHover(pair) {
            this.hover = pair;
            this.drawHover();
        }

        /* The picture as shown, on the page's ground. */
        toBlob() {
            const copy = document.createElement("canvas");
            copy.width = this.canvas.width;
            copy.height = this.canvas.height;
            const context = copy.getContext("2d");
            context.fillStyle = kv.token("surface");
            context.fillRect(0, 0, copy.width, copy.height);
            context.drawImage(this.canvas, 0, 0);
            return new Promise((done) => copy.toBlob(done, "image/png"));
        }

        /* ---- input ---- */

        bind() {
            const canvas = this.canvas;
            let drag = null;
            canvas.addEventListener(
                "wheel",
                (event) => {
                    const at = this.pairAt(event);
                    if (!at) return;
                    event.preventDefault();
                    this.zoom(Math.exp(clamp(event.deltaY, -120, 120) * 0.002), at);
                },
                { passive: false },
            );
            canvas.addEventListener("pointerdown", (event) => {
                if (event.button !== 0 || !this.pairAt(event)) return;
                drag = { x: event.clientX, y: event.clientY, view: this.view };
                canvas.setPointerCapture(event.pointerId);
            });
            canvas.addEventListener("pointermove", (event) => {
                if (drag) {
                    const scale = drag.view.span / this.measure().side;
                    this.setView({
                        span: drag.view.span,
                        x: drag.view.x - (event.clientX - drag.x) * scale,
                        y: drag.view.y - (event.clientY - drag.y) * scale,
                    });
                }
                this.listen.hovered(this.pairAt(event));
            });
            canvas.addEventListener("pointerup", () => (drag = null));
            canvas.addEventListener("pointercancel", () => (drag = null));
            canvas.addEventListener("pointerleave", () => this.listen.hovered(null));
            canvas.addEventListener("dblclick", () => this.setView(this.whole()));
            canvas.addEventListener("keydown", (event) => this.pressed(event));
        }

        pressed(event) {
            const step = this.view.span / 8;
            const moves = {
                ArrowLeft: () => this.pan(-step, 0),
                ArrowRight: () => this.pan(step, 0),
                ArrowUp: () => this.pan(0, -step),
                ArrowDown: () => this.pan(0, step),
                "+": () => this.zoom(0.5),
                "=": () => this.zoom(0.5),
                "-": () => this.zoom(2),
                0: () => this.setView(this.whole()),
            };
            if (event.ctrlKey || event.metaKey || !moves[event.key]) return;
            event.preventDefault();
            moves[event.key]();
        }
    };
})(window.kv);

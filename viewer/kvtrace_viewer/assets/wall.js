/* The wall: a thumbnail for every head, layers downwards. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const LABEL = 26;
    const GAP = 4;
    const MIN_SIDE = 14;
    const MAX_SIDE = 56;

    kv.HeadWall = class {
        /* `chosen(layer index, head)` is called for a click or an arrow key. */
        constructor(canvas, note, chosen, failed) {
            this.canvas = canvas;
            this.note = note;
            this.chosen = chosen;
            this.failed = failed;
            this.planes = new Map();
            this.key = "";
            canvas.addEventListener("click", (event) => this.clicked(event));
            canvas.addEventListener("keydown", (event) => this.pressed(event));
            canvas.addEventListener("pointermove", (event) => this.pointed(event));
            new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
        }

        /* Show a request's heads; thumbnails are fetched a layer at a time, in order. */
        show(query, request, pool, selected) {
            this.request = request;
            this.pool = pool;
            this.selected = selected;
            const key = JSON.stringify(query);
            if (key !== this.key) {
                this.key = key;
                this.planes.clear();
                this.fetch(query, key);
            }
            this.draw();
        }

        async fetch(query, key) {
            const cells = this.request.thumb_cells;
            for (const [index, layer] of this.request.layers.entries()) {
                try {
                    const buffer = await kv.bytes("thumbnails", { ...query, layer: layer.layer });
                    if (key !== this.key) return;
                    this.keep(index, new Uint8Array(buffer), cells);
                } catch (error) {
                    if (key === this.key) this.failed(error);
                    return;
                }
                this.draw();
            }
        }

        keep(index, bytes, cells) {
            const plane = cells * cells;
            for (let head = 0; head * 2 * plane < bytes.length; head += 1) {
                const start = head * 2 * plane;
                this.planes.set(`${index}/${head}/max`, kv.paint(bytes.subarray(start, start + plane), cells, cells));
                this.planes.set(`${index}/${head}/mean`, kv.paint(bytes.subarray(start + plane, start + 2 * plane), cells, cells));
            }
        }

        measure() {
            const heads = Math.max(1, ...this.request.layers.map((layer) => layer.heads));
            const room = this.canvas.parentElement.clientWidth - LABEL;
            const side = Math.min(MAX_SIDE, Math.max(MIN_SIDE, Math.floor(room / heads) - GAP));
            const numbers = this.request.layers.find((layer) => layer.heads === heads)?.head_numbers ?? [0];
            return { heads, numbers, side, step: side + GAP };
        }

        draw() {
            if (!this.request || !this.canvas.isConnected) return;
            const { heads, numbers, side, step } = this.measure();
            const layers = this.request.layers;
            const context = kv.sizeCanvas(
                this.canvas, LABEL + heads * step, LABEL + layers.length * step);
            context.clearRect(0, 0, this.canvas.width, this.canvas.height);
            context.font = `11px ${kv.sans}`;
            context.textBaseline = "middle";
            context.textAlign = "center";
            for (let head = 0; head < heads; head += side < 16 ? 4 : 1) {
                this.label(context, numbers[head], LABEL + head * step + side / 2, LABEL / 2, head === this.selected.head);
            }
            layers.forEach((layer, index) => {
                const y = LABEL + index * step;
                this.label(context, layer.layer, LABEL / 2, y + side / 2, index === this.selected.layer);
                for (let head = 0; head < layer.heads; head += 1) {
                    this.drawHead(context, index, head, LABEL + head * step, y, side);
                }
            });
            this.canvas.dataset.loaded = this.planes.size;
        }

        label(context, number, x, y, isChosen) {
            context.fillStyle = kv.token(isChosen ? "accent" : "muted");
            context.font = `${isChosen ? 700 : 400} 11px ${kv.sans}`;
            context.fillText(String(number), x, y);
        }

        drawHead(context, layer, head, x, y, side) {
            context.fillStyle = kv.token("map-empty");
            context.fillRect(x, y, side, side);
            const plane = this.planes.get(`${layer}/${head}/${this.pool}`);
            context.imageSmoothingEnabled = true;
            if (plane) context.drawImage(plane, x, y, side, side);
            if (layer === this.selected.layer && head === this.selected.head) {
                context.strokeStyle = kv.token("accent");
                context.lineWidth = 2.5;
                context.strokeRect(x - 1.25, y - 1.25, side + 2.5, side + 2.5);
            }
        }

        headAt(event) {
            const box = this.canvas.getBoundingClientRect();
            const { step } = this.measure();
            const head = Math.floor((event.clientX - box.left - LABEL) / step);
            const layer = Math.floor((event.clientY - box.top - LABEL) / step);
            const found = this.request.layers[layer];
            return found && head >= 0 && head < found.heads ? { layer, head } : null;
        }

        clicked(event) {
            const at = this.headAt(event);
            if (at) this.chosen(at.layer, at.head);
        }

        pointed(event) {
            const at = this.headAt(event);
            this.canvas.style.cursor = at ? "pointer" : "default";
            this.canvas.title = at ? this.titleOf(this.request.layers[at.layer], at.head) : "";
        }

        titleOf(layer, head) {
            const name = layer.name ? ` (${layer.name})` : "";
            return `layer ${layer.layer}${name}, head ${layer.head_numbers[head]}`;
        }

        pressed(event) {
            const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
            const move = moves[event.key];
            if (!move) return;
            event.preventDefault();
            const layers = this.request.layers;
            const layer = Math.min(layers.length - 1, Math.max(0, this.selected.layer + move[0]));
            const head = Math.min(layers[layer].heads - 1, Math.max(0, this.selected.head + move[1]));
            this.chosen(layer, head);
        }
    };
})(window.kv);

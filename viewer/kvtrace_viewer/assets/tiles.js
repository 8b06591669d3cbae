/* Fetches and keeps the tiles of attention maps. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const CELLS = 256;
    const MAX_KEPT = 160;
    const MAX_FETCHING = 4;

    /* Tiles of one head at one scale; `changed` is called when one arrives. */
    kv.TileStore = class {
        constructor(query, changed, failed) {
            this.query = query;
            this.changed = changed;
            this.failed = failed;
            this.kept = new Map();
            this.wanted = [];
            this.fetching = 0;
            this.closed = false;
        }

        close() {
            this.closed = true;
            this.wanted = [];
        }

        get busy() {
            return this.fetching > 0 || this.wanted.length > 0;
        }

        /* Ask for the tiles of a view; those not asked for any more are not fetched. */
        want(keys) {
            this.wanted = keys.filter((key) => !this.kept.has(key));
            this.fetchMore();
        }

        /* A tile as a canvas, or undefined while it is not there. */
        get(key, pool) {
            const tile = this.kept.get(key);
            if (!tile || !tile.bytes) return undefined;
            this.kept.delete(key);
            this.kept.set(key, tile);
            if (!tile[pool]) {
                const start = pool === "max" ? 0 : CELLS * CELLS;
                const codes = tile.bytes.subarray(start, start + CELLS * CELLS);
                tile[pool] = kv.paint(codes, CELLS, CELLS);
            }
            return tile[pool];
        }

        fetchMore() {
            while (this.wanted.length && this.fetching < MAX_FETCHING) {
                const key = this.wanted.shift();
                this.fetching += 1;
                this.kept.set(key, {});
                this.fetch(key);
            }
        }

        async fetch(key) {
            const [level, row, column] = key.split("/");
            try {
                const buffer = await kv.bytes("tile", { ...this.query, level, row, column });
                this.kept.set(key, { bytes: new Uint8Array(buffer) });
                for (const old of this.kept.keys()) {
                    if (this.kept.size <= MAX_KEPT) break;
                    if (this.kept.get(old).bytes) this.kept.delete(old);
                }
            } catch (error) {
                this.kept.delete(key);
                this.wanted = [];
                if (!this.closed) this.failed(error);
            } finally {
                this.fetching -= 1;
                if (!this.closed) {
                    this.fetchMore();
                    this.changed();
                }
            }
        }
    };
    kv.TILE_CELLS = CELLS;
})(window.kv);

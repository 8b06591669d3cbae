/* The runs grid: cells and their words. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const cells = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
    const words = (window.dashAgGridFunctions = window.dashAgGridFunctions || {});
    const node = (tag, props, ...children) => window.React.createElement(tag, props, ...children);

    const STATUS = {
        complete: ["✓", "Complete"],
        recording: ["●", "Recording"],
        "cut off": ["✂", "Cut off"],
        unreadable: ["!", "Unreadable"],
    };

    const link = (id) => `/attention?${new URLSearchParams({ trace: id })}`;

    /* A link that stays inside the application, and opens in a new tab where asked to. */
    function follow(event, href) {
        if (event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return;
        event.preventDefault();
        kv.setProps("_pages_location", { href });
    }

    cells.KvTraceLink = function (props) {
        if (props.data.error) {
            return node("span", { className: "kv-broken", title: props.data.error }, props.value);
        }
        const href = link(props.data.id);
        return node("a", { href, onClick: (event) => follow(event, href) }, props.value);
    };

    cells.KvStatus = function (props) {
        const [mark, word] = STATUS[props.value] || ["?", props.value];
        const name = String(props.value).replace(" ", "-");
        return node(
            "span",
            { className: `kv-badge kv-badge-${name}`, title: props.data.error || word },
            node("span", { "aria-hidden": true }, mark),
            word,
        );
    };

    words.kvCount = (value) => (value === null || value === undefined ? "–" : kv.count(value));
    /* Line ends have to be seen in a grid of single lines; nothing else is changed. */
    words.kvText = (value) => (typeof value === "string"
        ? value.replaceAll("\r", "␍").replaceAll("\n", "↵").replaceAll("\t", "⇥") : value);
    words.kvShare = (value) => (value === null || value === undefined ? "–" : value.toFixed(4));
    words.kvSinks = (row) => (row.sinks === null ? "–" : `${row.retained_sinks} / ${row.sinks}`);
    words.kvBytes = function (value) {
        if (value === null || value === undefined) return "–";
        const units = ["B", "KiB", "MiB", "GiB", "TiB"];
        let index = 0;
        let left = value;
        while (left >= 1024 && index < units.length - 1) {
            left /= 1024;
            index += 1;
        }
        return `${index ? left.toFixed(1) : left} ${units[index]}`;
    };

    kv.clientside("runs", {
        /* A click anywhere on a row opens the trace; a broken one says what is wrong with it. */
        open(clicked) {
            if (!clicked || clicked.colId === "name") return kv.nothing();
            const row = window.dash_ag_grid.getApi("runs-grid").getRowNode(clicked.rowId).data;
            if (row.error) kv.say("runs-status", `${row.name}: ${row.error}`);
            else kv.setProps("_pages_location", { href: link(row.id) });
            return kv.nothing();
        },
    });
})(window.kv);

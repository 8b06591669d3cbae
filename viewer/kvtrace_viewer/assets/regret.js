/* The regret page: its address, and the links from a query to the attention map. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const cells = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
    const SPAN = 64;

    /* The map with the query and, where both fit, the wanted key in the middle of the window. */
    function link(row) {
        const half = SPAN / 2;
        return `/attention?${new URLSearchParams({
            trace: row.trace, request: row.request, layer: row.layer, head: row.q_head,
            x: Math.max(0, row.key - half), y: Math.max(0, row.query - half), span: SPAN,
        })}`;
    }

    cells.KvRegretLink = function (props) {
        const href = link(props.data);
        return window.React.createElement("a", {
            href,
            title: "Open the attention map at this query",
            onClick(event) {
                if (event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return;
                event.preventDefault();
                kv.setProps("_pages_location", { href });
            },
        }, props.value);
    };

    kv.clientside("regret", {
        address(replay, request, config) {
            if (config) kv.setQuery({ trace: config.trace, replay, request });
            return kv.nothing();
        },
    });
})(window.kv);

/* The SQL page: ask, show, and keep the question in the address. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    const STATUS = "sql-status";
    const SLOW = "Running… The first question about sinks, heads or keys computes what attention says of them, once.";
    let config = null;
    let asking = 0;

    const text = () => kv.byId("sql-text").value;

    async function run() {
        const sql = text();
        const number = (asking += 1);
        kv.setQuery({ trace: config.trace, q: sql });
        kv.say(STATUS, "Running…", "info");
        const slow = setTimeout(() => number === asking && kv.say(STATUS, SLOW, "info"), 3000);
        try {
            const answer = await kv.post("sql", { trace: config.trace, sql }).finally(() => clearTimeout(slow));
            if (number === asking) show(answer);
        } catch (error) {
            if (number !== asking) return;
            kv.say(STATUS, error.message);
            kv.byId("sql-timing").textContent = "";
            kv.setProps("sql-grid", { columnDefs: [], rowData: [] });
        }
    }

    /* Fields are numbered, since two columns may share a name or carry a dot. */
    function show(answer) {
        kv.say(STATUS, answer.truncated
            ? `Only the first ${kv.count(answer.limit)} rows are shown; CSV saves them all.`
            : "", "info");
        const rows = answer.rows.length;
        kv.byId("sql-timing").textContent =
            `${kv.count(rows)}${answer.truncated ? "+" : ""} row${rows === 1 ? "" : "s"} in ${(1000 * answer.seconds).toFixed(0)} ms`;
        const columnDefs = answer.columns.map((column, index) => ({
            field: `c${index}`, headerName: column.name, headerTooltip: column.type,
            ...(column.numeric ? { type: "rightAligned", cellClass: "ag-right-aligned-cell kv-number" } : { cellClass: "kv-mono", valueFormatter: { function: "kvText(params.value)" } }),
        }));
        const rowData = answer.rows.map((row) =>
            Object.fromEntries(row.map((value, index) => [`c${index}`, value])));
        kv.setProps("sql-grid", { columnDefs, rowData });
        /* Once the rows are drawn, columns take the width of what they hold. */
        setTimeout(() => {
            const grid = kv.byId("sql-grid") && window.dash_ag_grid.getApi("sql-grid");
            if (!grid) return;
            grid.autoSizeAllColumns();
            const width = grid.getAllDisplayedColumns().reduce((sum, one) => sum + one.getActualWidth(), 0);
            if (width < kv.byId("sql-grid").clientWidth) grid.sizeColumnsToFit();
        }, 150);
    }

    kv.actions["sql-run"] = run;
    kv.actions["sql-csv"] = () => kv.download("sql.csv", { trace: config.trace, sql: text() }, STATUS);

    document.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
        if (event.target.id !== "sql-text") return;
        event.preventDefault();
        run();
    });

    kv.clientside("sql", {
        mount(given) {
            config = given;
            if (given && given.run) setTimeout(run);
            return kv.nothing();
        },
        example: (chosen) => chosen || kv.nothing(),
    });
})(window.kv);

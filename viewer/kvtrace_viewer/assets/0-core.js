/* What all pages use (named to load before them): requests to /api, the address, the colour scheme, token texts. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    /* Buttons call kv.actions[their id]. */
    kv.actions = kv.actions || {};

    kv.byId = (id) => document.getElementById(id);

    kv.element = function (tag, className, text) {
        const made = document.createElement(tag);
        if (className) made.className = className;
        if (text !== undefined) made.textContent = text;
        return made;
    };

    /* ---- requests ---- */

    kv.address = (path, query) => `/api/${path}?${new URLSearchParams(query)}`;

    async function ask(path, query, options) {
        const answer = await fetch(kv.address(path, query || {}), options);
        if (answer.ok) return answer;
        let message = `the viewer answered ${answer.status} ${answer.statusText}`;
        try {
            const body = await answer.json();
            if (body.error) message = body.error;
        } catch (error) {
            /* Not JSON: the status line says all there is. */
        }
        throw new Error(message);
    }

    kv.json = async (path, query, options) => (await ask(path, query, options)).json();
    kv.bytes = async (path, query, options) => (await ask(path, query, options)).arrayBuffer();
    kv.post = (path, body) =>
        kv.json(path, {}, {
            method: "POST",
            headers: { "Content-Type": "application/json" },
            body: JSON.stringify(body),
        });

    /* One clear line under a page's toolbar; empty text clears it. */
    kv.say = function (id, text, kind) {
        const line = kv.byId(id);
        if (!line) return;
        line.textContent = text || "";
        line.className = `kv-status${text ? ` kv-status-${kind || "error"}` : ""}`;
    };

    /* Follow a link that answers with a file, or say why it does not. */
    kv.download = async function (path, query, statusId) {
        try {
            const answer = await ask(path, query);
            const named = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") || "");
            kv.saveBlob(await answer.blob(), named ? named[1] : "kvtrace");
            kv.say(statusId, "");
        } catch (error) {
            kv.say(statusId, error.message);
        }
    };

    kv.saveBlob = function (blob, name) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(blob);
        link.download = name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    };

    /* ---- the address holds the view ---- */

    kv.setQuery = function (values) {
        const query = new URLSearchParams(location.search);
        for (const [name, value] of Object.entries(values)) {
            if (value === null || value === undefined || value === "") query.delete(name);
            else query.set(name, value);
        }
        const text = query.toString().replaceAll("%2F", "/");
        const next = `${location.pathname}${text ? `?${text}` : ""}`;
        if (next !== location.pathname + location.search) {
            history.replaceState(history.state, "", next);
        }
    };

    /* Where Dash's Location renders after a page has completed the address that Dash gave, it takes
       the page's for an old one and pushes its own again: the view would be gone from the address,
       and back would lead to the same page. The same for a link to what is shown already. */
    let given = location.href;
    let isRepeated = false;
    const push = history.pushState.bind(history);
    history.pushState = function (state, title, url) {
        const next = new URL(url ?? "", location.href).href;
        isRepeated = next === given && next !== location.href;
        if (isRepeated) return;
        given = next;
        push(state, title, url);
    };
    window.addEventListener("popstate", () => {
        given = location.href;
    });
    window.addEventListener("_dashprivate_pushstate", (event) => {
        if (isRepeated) event.stopImmediatePropagation();
        isRepeated = false;
    });

    /* ---- light and dark ---- */

    kv.scheme = () =>
        document.documentElement.getAttribute("data-mantine-color-scheme") === "dark"
            ? "dark"
            : "light";
    /* A design token's value; kept until the scheme changes, since drawing asks often. */
    let tokens = {};
    kv.token = function (name) {
        const scheme = kv.scheme();
        if (tokens.scheme !== scheme) tokens = { scheme };
        tokens[name] ??= getComputedStyle(document.documentElement)
            .getPropertyValue(`--${name}`).trim();
        return tokens[name];
    };

    const schemeListeners = new Set();
    kv.onScheme = (listener) => schemeListeners.add(listener);
    new MutationObserver(() => schemeListeners.forEach((listener) => listener())).observe(
        document.documentElement,
        { attributes: true, attributeFilter: ["data-mantine-color-scheme"] },
    );

    /* ---- words ---- */

    /* White space has to be seen: a newline is among the commonest heavy hitters. */
    kv.showToken = function (text) {
        if (text === undefined || text === null) return "";
        return text
            .replaceAll("\r", "␍")
            .replaceAll("\n", "↵")
            .replaceAll("\t", "⇥")
            .replaceAll(" ", "·");
    };
    kv.count = (number) => (number ?? 0).toLocaleString("en-US");
    kv.weight = (value) =>
        value === 0 ? "0" : value >= 0.001 ? value.toFixed(4) : value.toExponential(2);

    /* ---- canvases ---- */

    /* Size a canvas for the screen's pixels; returns a context in CSS pixels. */
    kv.sizeCanvas = function (canvas, width, height) {
        const ratio = window.devicePixelRatio || 1;
        const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
        if (canvas.width !== w || canvas.height !== h) {
            canvas.width = w;
            canvas.height = h;
        }
        canvas.style.width = `${width}px`;
        canvas.style.height = `${height}px`;
        const context = canvas.getContext("2d");
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        return context;
    };

    /* Place a tooltip beside a point of its positioned parent, kept inside it. */
    kv.placeTip = function (tip, x, y) {
        tip.style.display = "block";
        const box = tip.parentElement;
        const left = x + 16 + tip.offsetWidth > box.clientWidth ? x - 16 - tip.offsetWidth : x + 16;
        const top = Math.min(y + 16, box.clientHeight - tip.offsetHeight - 4);
        tip.style.left = `${Math.max(4, left)}px`;
        tip.style.top = `${Math.max(4, top)}px`;
    };

    kv.monospace =
        'ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "Liberation Mono", ' +
        '"DejaVu Sans Mono", monospace';
    kv.sans =
        'Inter, -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", ' +
        '"Liberation Sans", Arial, sans-serif';

    /* Sinks and heavy hitters: a colour and a shape each. */
    kv.glyph = function (context, kind, x, y, size) {
        context.beginPath();
        if (kind === "sink") {
            context.moveTo(x, y - size / 2);
            context.lineTo(x + size / 2, y + size / 2);
            context.lineTo(x - size / 2, y + size / 2);
        } else {
            context.moveTo(x, y - size / 2);
            context.lineTo(x + size / 2, y);
            context.lineTo(x, y + size / 2);
            context.lineTo(x - size / 2, y);
        }
        context.closePath();
        context.fillStyle = kv.token(kind === "sink" ? "sink" : "heavy");
        context.fill();
    };

    document.addEventListener("click", (event) => {
        const pressed = event.target.closest("button[id]");
        const action = pressed && kv.actions[pressed.id];
        if (action) action();
    });

    /* dash_clientside hands the functions of each page over by name. */
    kv.clientside = function (page, functions) {
        window.dash_clientside = window.dash_clientside || {};
        window.dash_clientside[page] = functions;
    };
    kv.nothing = () => window.dash_clientside.no_update;
    kv.setProps = (id, props) => window.dash_clientside.set_props(id, props);

    kv.clientside("shell", {
        /* Another trace: the same page, without the old trace's view. */
        pick(chosen, shown) {
            if (!chosen || chosen === shown) return kv.nothing();
            const page = location.pathname === "/" ? "/attention" : location.pathname;
            return `${page}?${new URLSearchParams({ trace: chosen })}`;
        },
    });
})(window.kv);

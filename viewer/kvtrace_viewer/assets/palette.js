/* The map's colours: viridis, which keeps its order under the common colour blindnesses and in
   grey, and the inverses of the scales that the server codes bytes with. */
"use strict";
window.kv = window.kv || {};

(function (kv) {
    /* Polynomial fit of matplotlib's viridis (Matt Zucker, public domain), error below 1/255. */
    const VIRIDIS = [
        [0.2777273272234177, 0.005407344544966578, 0.3340998053353061],
        [0.1050930431085774, 1.404613529898575, 1.384590162594685],
        [-0.3308618287255563, 0.214847559468213, 0.09509516302823659],
        [-4.634230498983486, -5.799100973351585, -19.33244095627987],
        [6.228269936347081, 14.17993336680509, 56.69055260068105],
        [4.776384997670288, -13.74514537774601, -65.35303263337234],
        [-5.435455855934631, 4.645852612178535, 26.3124352495832],
    ];

    function viridis(t) {
        return [0, 1, 2].map((channel) => {
            const value = VIRIDIS.reduceRight((sum, row) => sum * t + row[channel], 0);
            return Math.round(255 * Math.min(1, Math.max(0, value)));
        });
    }

    /* One entry a byte; byte 0 is "nothing here" and stays clear. */
    const LOOKUP = new Uint32Array(256);
    const lookupBytes = new Uint8Array(LOOKUP.buffer);
    for (let code = 1; code < 256; code += 1) {
        lookupBytes.set([...viridis((code - 1) / 254), 255], code * 4);
    }

    kv.colour = (code) => `rgb(${[...lookupBytes.slice(code * 4, code * 4 + 3)].join(",")})`;

    /* Paint a plane of codes on a canvas of its own. */
    kv.paint = function (codes, width, height) {
        const canvas = document.createElement("canvas");
        canvas.width = width;
        canvas.height = height;
        const image = new ImageData(width, height);
        const pixels = new Uint32Array(image.data.buffer);
        for (let index = 0; index < pixels.length; index += 1) pixels[index] = LOOKUP[codes[index]];
        canvas.getContext("2d").putImageData(image, 0, 0);
        return canvas;
    };

    const LOG_DECADES = 5;
    kv.scales = {
        linear: { ticks: [0, 0.25, 0.5, 0.75, 1], at: (weight) => weight },
        sqrt: { ticks: [0, 0.01, 0.1, 0.25, 0.5, 1], at: Math.sqrt },
        log: {
            ticks: [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1],
            at: (weight) => Math.max(0, 1 + Math.log10(weight) / LOG_DECADES),
        },
    };
})(window.kv);

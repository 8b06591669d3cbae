/* Work that the server does in the background, started from a page's button. */
(function (kv) {
    "use strict";

    const POLL_MS = 300;

    function progress(id, share) {
        kv.byId(`${id}-progress`)?.classList.toggle("kv-running", share !== null);
        const bar = kv.byId(`${id}-bar`);
        if (bar) bar.style.width = `${100 * (share || 0)}%`;
    }

    /* Start it, show how far it is, and give its results to `finished`, whose words are said then.
       `id` is the button's; its bar and its line are those of components.work_line. The page may be
       left meanwhile: the work goes on. */
    kv.work = async function (id, words, path, body, finished) {
        const button = kv.byId(id);
        button.disabled = true;
        progress(id, 0);
        kv.say(`${id}-status`, words, "info");
        try {
            let job = await kv.post(path, body);
            while (job.state === "running") {
                progress(id, job.share);
                await new Promise((done) => setTimeout(done, POLL_MS));
                job = await kv.json(`jobs/${job.id}`, {});
            }
            if (job.state === "failed") throw new Error(job.error);
            if (button.isConnected) kv.say(`${id}-status`, await finished(job.results), "good");
        } catch (error) {
            kv.say(`${id}-status`, error.message);
        } finally {
            button.disabled = false;
            progress(id, null);
        }
    };
})(window.kv);

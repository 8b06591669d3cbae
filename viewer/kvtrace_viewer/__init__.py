"""The viewer: traces in a browser, and the headless replay (`kvtrace_viewer.replay`)."""

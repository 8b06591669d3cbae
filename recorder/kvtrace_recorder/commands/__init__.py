"""The verbs of the recorder: one a file, registered in the entry-point group kvtrace.commands."""

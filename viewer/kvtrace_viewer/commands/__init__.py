"""Verbs that the viewer brings to the kvtrace command, one file each."""

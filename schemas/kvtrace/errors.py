"""What kvtrace raises for a user's mistake; printed as one line by `kvtrace.cli.main` only."""

from __future__ import annotations


class KvtraceError(Exception):
    """Base of every error meant for the user.

    The message reads "what was found; what was expected; what to do".
    """


class TraceError(KvtraceError):
    """A path that holds no trace, a trace that cannot be read, or one that would be overwritten."""


class InputError(KvtraceError, ValueError):
    """A value the user gave that cannot be used: a budget, a policy name, a file."""


class QueryError(KvtraceError):
    """SQL that was refused, failed, or ran past its limits."""

"""Certificates: the real model run under the kept sets of a replay, beside what it predicted."""

from kvtrace_recorder.certificate.certify import certify
from kvtrace_recorder.certificate.result import Certificate

__all__ = ["Certificate", "certify"]

"""Traces from outside data: one format a file."""

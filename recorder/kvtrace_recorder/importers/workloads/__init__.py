"""Workloads from outside: which blocks the requests of a server asked for, one format a file."""

"""Batch files: rows of requests in, a record of each out, whatever dies in between.

May import `planning` and `wire`, but not SGLang: a job talks to a server over HTTP.
"""

"""Callers: `sgl.function` programs run as one batch, and the report of an engine or server.

In: programs and their arguments. Out: their states, in order. It knows `sglang.lang` and the wire,
and may not know the inside of a server.
"""

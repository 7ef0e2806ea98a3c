"""What runs next, what is pinned, what waits.

In: requests as they arrive, and a view of memory at each step. Out: which requests the next prefill
step takes, and when a prefix is held or let go. It may know neither SGLang nor torch: the real
scheduler, the simulator and the tests drive the same object.
"""

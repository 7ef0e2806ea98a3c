"""What travels between processes: paths, the lines of a hand-over, ids of requests.

In: Python values of one side. Out: bytes and strings that the other side reads. It may not know who
sends or receives.
"""

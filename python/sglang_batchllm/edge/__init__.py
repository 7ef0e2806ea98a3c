"""Everything that touches SGLang: what its processes load, subclass and wrap.

In: SGLang's objects. Out: the calls that the other folders expect. `plugin.py` alone registers or
replaces, before any other module here is imported; what differs between SGLang releases stands in
`seams/`.
"""

from sglang_batchllm.edge.plugin import register

register()

"""Global prefix sharing and throughput-oriented batching for SGLang.

An overlay on SGLang's own extension points: installing the package adds ``--batchllm`` to every
SGLang entry point, and changes nothing while that flag is off.
"""

__version__ = "0.1.0"
SGLANG_VERSION = "0.5.17"
"""The SGLang release whose extension points this version was written against."""

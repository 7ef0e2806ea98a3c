"""Ray Data: batches over many hosts, each window of rows planned as a whole.

`processor.BatchLLMProcessorConfig` goes to `ray.data.llm.build_processor` where Ray's own
configuration of SGLang would; needs the extra ``ray``. Imports nothing, since each of Ray's workers
that unpickles a stage imports this package.
"""

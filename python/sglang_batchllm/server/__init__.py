"""The routes that ``--batchllm`` adds to SGLang's HTTP server, and the hand-over behind them.

In: requests over HTTP, or from an engine in this process. Out: requests to SGLang's front end, and
their answers. It knows FastAPI, and may not know SGLang: `edge` gives it SGLang's front end.
"""

"""Where an HTTP server that runs with ``--batchllm`` answers."""

REPORT_PATH = "/batchllm/report"
RUN_PATH = "/batchllm/run"

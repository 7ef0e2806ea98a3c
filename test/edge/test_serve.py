"""The other way to start a server."""

from pathlib import Path

from engines import Server


def test_sglang_serve_takes_the_flag(tiny_model: Path):
    server = Server(tiny_model, "--batchllm", command=Server.SERVE)
    try:
        server.wait()
        sampling = {"max_new_tokens": 2, "ignore_eos": True}
        prompts = [f"A beginning that both share, and {end}." for end in ("one", "another")]
        answers = server.post("/generate", {"text": prompts, "sampling_params": sampling}).json()
        assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [2, 2]
        report = server.get("/batchllm/report").json()
        (batch,) = report["batches"]
        assert batch["computed_tokens"] == batch["distinct_tokens"] < batch["prompt_tokens"]
    finally:
        server.stop()

"""What SGLang sends for a call with several samples of each prompt, one by one, goes together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_batchllm.edge.samples import Samples


def sent(rid: str) -> SimpleNamespace:
    return SimpleNamespace(rid=rid)


@pytest.mark.parametrize("prompts", [1, 3])
def test_samples_go_together_and_prompts_stay(prompts: int) -> None:
    samples = Samples(prompts, 4 * prompts)
    assert samples.gather == (prompts == 1)
    for number in range(prompts):
        assert not samples.due(sent(f"prompt-{number}"))
    rids = [f"sample-{number}" for number in range(4 * prompts)]
    due = [samples.due(sent(rid)) for rid in rids]
    assert not any(due[:-1])
    assert [request.rid for request in due[-1]] == rids
    assert samples.leaves_out("prompt-0") and not samples.leaves_out("prompt-0")
    assert not samples.leaves_out("sample-0")

"""Jobs do not wait in tests."""

import pytest

from sglang_batchllm.jobs import dispatch, hosts


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(hosts, "POLL_SECONDS", 0.01)

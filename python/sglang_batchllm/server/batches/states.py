"""The states of a batch, as OpenAI names them.

validating -> in_progress -> finalizing -> completed or expired; failed from any of the first three;
cancelling from the first two, then cancelled.
"""

from __future__ import annotations

from typing import Literal

Outcome = Literal["completed", "failed", "expired", "cancelled"]
"""How a batch ends."""

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
"""It has not ended."""

OPEN_SQL = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
"""A condition, in the words of the index on it."""

"""What many requests leave behind is let go of a few at a time."""

import asyncio
import weakref
from itertools import pairwise

from sglang_batchllm.edge.garbage import FREED_AT_ONCE, Leftovers

MANY = 3 * FREED_AT_ONCE + 1


class Request:
    pass


def left_over() -> tuple[Leftovers, "weakref.WeakSet[Request]"]:
    """And those that are not freed yet."""
    leftovers, requests = Leftovers(), [Request() for _ in range(MANY)]
    leftovers.add(requests)
    return leftovers, weakref.WeakSet(requests)


def test_a_step_frees_some_of_them():
    leftovers, alive = left_over()
    for step in (1, 2, 3):
        leftovers.free_some()
        assert len(alive) == MANY - step * FREED_AT_ONCE
    assert leftovers
    leftovers.free_some()
    assert not leftovers and not alive
    leftovers.free_some()


def test_the_event_loop_turns_while_they_are_freed():
    leftovers, alive = left_over()

    async def main() -> list[int]:
        freeing, seen = asyncio.create_task(leftovers.free()), []
        while not freeing.done():
            seen.append(len(alive))
            await asyncio.sleep(0)
        return seen

    seen = asyncio.run(main())
    assert all(before - after <= FREED_AT_ONCE for before, after in pairwise(seen))
    assert seen[0] == MANY and not alive

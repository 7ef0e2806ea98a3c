"""KV pages without Triton kernels, which need a GPU."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator with its two kernels as torch indexing.

    A request's tokens fill the rest of its last page and then whole new pages, in order. Slots
    are int64; all tensors lie on the CPU.
    """

    def alloc_extend(  # type: ignore[override]
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots int64[extend_num_tokens] for tokens prefix_lens[i]..seq_lens[i] of each request i,
        whose last slot so far is last_loc[i]; None if the free pages do not suffice."""
        first_new_page = -(-prefix_lens // self.page_size)
        new_pages = -(-seq_lens // self.page_size) - first_new_page
        taken = self._take_pages(int(new_pages.sum()))
        if taken is None:
            return None
        slots = []
        page_of_request = taken.split(new_pages.tolist())
        for i, pages in enumerate(page_of_request):
            begin, end = int(prefix_lens[i]), int(seq_lens[i])
            aligned = min(int(first_new_page[i]) * self.page_size, end)
            slots.append(last_loc[i].to(torch.int64) + torch.arange(1, aligned - begin + 1))
            offsets = torch.arange(self.page_size)
            whole = (pages[:, None] * self.page_size + offsets).reshape(-1)
            slots.append(whole[: end - aligned])
        return torch.cat(slots)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot for each request, int64[requests], or None if the free pages do not suffice."""
        starts_page = seq_lens % self.page_size == 1 % self.page_size
        taken = self._take_pages(int(starts_page.sum()))
        if taken is None:
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[starts_page] = taken * self.page_size
        return slots

    def _take_pages(self, count: int) -> torch.Tensor | None:
        if self.need_sort and count > len(self.free_pages):
            self.merge_and_sort_free()
        if count > len(self.free_pages):
            return None
        taken, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return taken

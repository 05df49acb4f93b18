"""The page pool: which pages of the KV cache are free, and which are promised to requests already admitted."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers 0 .. num_pages - 1 and takes them back.

    A request is admitted only when the pages of its whole life (prompt and every token it may generate) can be
    *promised*; the pages themselves are taken one by one as it grows. So an admitted request never runs dry, and the
    engine needs no preemption. The price is that pages stay idle when answers end early; an engine that admits more
    than it can promise must be ready to throw a request out and prefill it again.

    num_pages, page_size: pages, and tokens per page. peak_used: most pages ever in use at once.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}.")
        self.num_pages = num_pages
        self.page_size = page_size
        self.peak_used = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._promised = 0

    @property
    def num_used(self) -> int:
        """Pages that hold tokens now."""
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def promise(self, num_tokens: int) -> bool:
        """Set pages for `num_tokens` tokens aside; False if too few are left."""
        pages = self.pages_for(num_tokens)
        if self._promised + pages > self.num_pages:
            return False
        self._promised += pages
        return True

    def grow(self, page_table: list[int], num_tokens: int) -> None:
        """Append pages to `page_table` until it covers `num_tokens` tokens."""
        while len(page_table) < self.pages_for(num_tokens):
            page_table.append(self._free.pop())
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, page_table: list[int], num_tokens: int) -> None:
        """Take back the pages of `page_table` and the promise of `num_tokens` tokens."""
        self._free.extend(reversed(page_table))
        page_table.clear()
        self._promised -= self.pages_for(num_tokens)

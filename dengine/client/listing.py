"""Listings: as many pages as it takes, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from dengine.client.results import Item, Page
from dengine.errors import InvalidRequest

PAGE_ITEMS = 1000  # what a node gives at once, unless its limits.page is smaller


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys of a range, in order: iterate over it, over its `pages()`, or await `all()`.

    Each page is consistent in itself and names its revision. The whole is not one snapshot: a key
    that changes while the pages are read shows the state that its page had.

    Example:
        async for item in client.list(prefix="config/"):
            print(item.key, item.value)
        assert [i.key for i in await client.list(prefix="config/").all()] == []
    """

    _fetch: Callable[[int | None, str | None], Awaitable[Page]]
    _limit: int | None

    async def __aiter__(self) -> AsyncIterator[Item]:
        async for page in self.pages():
            for item in page.items:
                yield item

    async def pages(self) -> AsyncIterator[Page]:
        """The pages as they come; there is always at least one. Errors are those of `list`."""
        left, most = self._limit, PAGE_ITEMS
        after: str | None = None
        while True:
            try:
                page = await self._fetch(None if left is None else min(left, most), after)
            except InvalidRequest as error:
                maximum = error.details.get("maximum")  # limits.page is smaller there
                asked = None if left is None else min(left, most)
                if asked is None or not isinstance(maximum, int) or not 0 < maximum < asked:
                    raise
                most = maximum
                continue
            yield page
            after = page.next
            left = None if left is None else left - len(page.items)
            if after is None or (left is not None and left <= 0):
                return

    async def all(self) -> list[Item]:
        """All items. As large as the range: iterate instead where that may be much."""
        return [item async for item in self]

"""Which KV pages are in use, and which hold a prefix that a later request can reuse. No JAX here.

A page holds the keys and values of `page_size` consecutive tokens. A full page may become a node of the prefix tree:
its key is (parent node, its tokens), so that two requests share a page exactly when all their tokens up to its end are
equal. A page is in one of three states: referenced by requests, evictable (a node nobody refers to, kept until its room
is needed, least recently used first), or free.
"""

import collections
import dataclasses

ROOT = 0  # the node before every first page


@dataclasses.dataclass(eq=False)
class Node:
    """A full page of the prefix tree.

    Attributes:
        ready: the program that fills the page has been dispatched; programs run in order, so the next may read it.
    """

    node_id: int
    key: tuple[int, bytes]
    page: int
    ready: bool


class PagePool:
    """Reference-counted pages with a prefix tree over the full ones.

    Args:
        num_pages: pages are numbered from 1; page 0 is scratch that nobody owns.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, 0, -1))
        self._references = [0] * (num_pages + 1)
        self._node_of: list[Node | None] = [None] * (num_pages + 1)
        self._nodes: dict[tuple[int, bytes], Node] = {}
        self._evictable: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._next_node_id = ROOT + 1

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._evictable)

    @property
    def cached(self) -> int:
        """Pages that no request refers to but that may be reused."""
        return len(self._evictable)

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` pages, evicting as needed; None, and nothing changed, if there are fewer."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                page, _ = self._evictable.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            page = self._free.pop()
            self._references[page] = 1
            pages.append(page)
        return pages

    def retain(self, page: int) -> None:
        """One more request refers to the page."""
        if self._references[page] == 0:
            del self._evictable[page]
        self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One request lets go of its pages, given in the order of its tokens."""
        for page in reversed(pages):  # the end of a prefix is evicted before its beginning
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._node_of[page] is not None:
                    self._evictable[page] = None
                else:
                    self._free.append(page)

    def lookup(self, parent_id: int, tokens: bytes) -> Node | None:
        """The node of the page that continues `parent_id` with these tokens."""
        return self._nodes.get((parent_id, tokens))

    def insert(self, parent_id: int, tokens: bytes, page: int, *, ready: bool) -> Node:
        """Makes a referenced page a node of the tree; if there is such a node already, that one is returned."""
        key = (parent_id, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = Node(self._next_node_id, key, page, ready)
            self._next_node_id += 1
            self._nodes[key] = node
            self._node_of[page] = node
        return node

    def discard(self, node: Node) -> None:
        """Takes a referenced page out of the tree (its content will never be written)."""
        if self._nodes.get(node.key) is node:
            self._forget(node.page)

    def flush(self) -> None:
        """Forgets every prefix; requests keep the pages they refer to."""
        for page in list(self._evictable):
            self._free.append(page)
        self._evictable.clear()
        self._nodes.clear()
        self._node_of = [None] * (self.num_pages + 1)

    def _forget(self, page: int) -> None:
        node = self._node_of[page]
        self._node_of[page] = None
        del self._nodes[node.key]

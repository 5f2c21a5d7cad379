"""The page pool against a plain model of what it should do."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lightning_jax.sampler.pages import ROOT, PagePool

NUM_PAGES, PAGE_SIZE = 12, 4


class PoolMachine(RuleBasedStateMachine):
    """Requests take chains of pages, partly from the tree, and give them back."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.holders: list[list[int]] = []  # pages of each request
        self.content: dict[int, tuple[bytes, ...]] = {}  # what each tree page was filled with, and what came before

    @rule(texts=st.lists(st.sampled_from([b"aaaa", b"bbbb"]), max_size=4), private=st.integers(0, 2))
    def take(self, texts, private):
        pages, parent = [], ROOT
        for depth, text in enumerate(texts):
            node = self.pool.lookup(parent, text)
            if node is None:
                break
            assert self.content[node.page] == tuple(texts[: depth + 1]), "a page is found only under its own prefix"
            self.pool.retain(node.page)
            pages.append(node.page)
            parent = node.node_id
        before = self.pool.available
        new = self.pool.allocate(len(texts) - len(pages) + private)
        if new is None:
            assert len(texts) - len(pages) + private > before
            assert self.pool.available == before
            self.pool.release(pages)
            return
        assert not set(new) & {page for held in self.holders for page in held} and not set(new) & set(pages)
        assert 0 not in new
        for depth in range(len(pages), len(texts)):
            page = new[depth - len(pages)]
            node = self.pool.insert(parent, texts[depth], page, ready=True)
            assert node.page == page
            self.content[page] = tuple(texts[: depth + 1])
            parent = node.node_id
        self.holders.append(pages + new)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_back(self, data):
        self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule()
    def flush(self):
        self.pool.flush()
        assert self.pool.lookup(ROOT, b"aaaa") is None and self.pool.cached == 0

    @invariant()
    def no_page_leaks(self):
        held = {page for pages in self.holders for page in pages}
        assert self.pool.available == NUM_PAGES - len(held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_eviction_takes_the_least_recently_used_and_the_end_of_a_prefix_first():
    pool = PagePool(4, 4)
    old = pool.allocate(2)
    first = pool.insert(ROOT, b"old1", old[0], ready=True)
    pool.insert(first.node_id, b"old2", old[1], ready=True)
    new = pool.allocate(1)
    pool.insert(ROOT, b"new1", new[0], ready=True)
    pool.release(old)
    pool.release(new)
    assert pool.cached == 3

    pool.allocate(2)  # one page is free, so one prefix page goes
    assert pool.lookup(first.node_id, b"old2") is None
    assert pool.lookup(ROOT, b"old1") is first and pool.lookup(ROOT, b"new1") is not None

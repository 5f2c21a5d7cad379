"""What tests of costs share: they count, and never time."""

import pytest


class Comparisons:
    """How often values of `of` types were compared."""

    def __init__(self):
        self.count = 0

    def of(self, kind: type) -> type:
        """A type of `kind` whose comparisons count."""
        counted = self

        class Counted(kind):
            __hash__ = kind.__hash__

            def __eq__(self, other):
                counted.count += 1
                return kind(self) == other

        return Counted


@pytest.fixture
def comparisons() -> Comparisons:
    return Comparisons()

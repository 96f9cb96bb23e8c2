"""Two halves of a text: which blocks of query rows choose a setting, and which check it.

Whole documents as halves measure above all how documents differ: on text of several kinds their
means are points apart whatever is predicted. So each document gives every other stretch of about
a page to either half: what differs between the halves is what a choice can be wrong about.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Blocks: rows next to each other ask for much the same, so single blocks would be no other text.
STRETCH = 4
CHOOSE, CHECK = 0, 1


@dataclass(frozen=True, kw_only=True)
class Half:
    """One half of one document, and the blocks of it that are tried.

    Attributes:
        part: ``CHOOSE`` or ``CHECK``.
        number: Place of the document among all.
        documents: How many there are.
        first: Blocks before this one are exact and belong to neither half.
        end: Blocks of the document.
        count: About how many blocks to try.
        seed: Chooses them.
    """

    part: int
    number: int
    documents: int
    first: int
    end: int
    count: int
    seed: int

    def blocks(self) -> list[int]:
        """All blocks of this half.

        Stretches go A B B A, and B A A B in the next document: what a head keeps falls with the
        position, which must not tell one half from the other.
        """
        return [
            index
            for index in range(self.first, self.end)
            if ((index - self.first) // STRETCH % 4 in (1, 2)) ^ (self.number % 2) == self.part
        ]

    def tried(self, layer: int) -> list[int]:
        """Evenly spaced blocks of this half, at another phase in every layer and document."""
        own = self.blocks()
        share = min(1.0, self.count / max(1, len(own)))
        # Phases at i / n of the distance fill each other's gaps, where n random ones would not.
        phase = random.Random(f"{self.seed} {self.part} {layer}").random()
        phase = (phase + self.number / self.documents) % 1.0
        return [
            index
            for rank, index in enumerate(own)
            if int(rank * share + phase + share) > int(rank * share + phase)
        ]

"""What every head returns for one bag."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """One bag of N tiles as a head sees it; C classes, K attention maps, H numbers in an embedding.

    Attributes:
        logits: (C,), before softmax or sigmoid.
        attention: (N, K) raw scores: a softmax over the tiles gives the weights, see :meth:`weights`.
        embedding: (K, H), the bag as the classifier sees it: one row per attention map.
        instance_logits: what the head says of single tiles, None for heads that say nothing of them.
            CLAM: (C, 2k, 2), for each class its instance classifier on the k most, then the k least attended tiles.
            DSMIL: (N, C), each tile's logit for each class.
    """

    logits: Tensor
    attention: Tensor
    embedding: Tensor
    instance_logits: Tensor | None = None

    def weights(self) -> Tensor:
        """(N, K): the share of each tile in the bag; every column sums to 1."""
        return self.attention.float().softmax(dim=0)

"""Attention pooling: the mean of the tiles' embeddings, weighted by a softmax over the bag, chunk by chunk.

The softmax runs over all tiles however they are cut: each chunk is pooled by its own softmax, and two chunks are
joined in proportion to their sums of exponentials, each kept relative to the highest score so that nothing overflows
(the online softmax of Milakov & Gimelshein 2018).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wsi_engine.models.heads.base import Head
from wsi_engine.models.heads.output import HeadOutput


class SoftmaxPool:
    """Running weighted mean of values (n, H) under scores (n, K) that arrive in chunks."""

    def __init__(self) -> None:
        self._mean: Tensor | None = None
        self._top: Tensor | None = None
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in a chunk: scores (n, K), values (n, H)."""
        mean = scores.softmax(dim=0).T @ values  # (K, n) @ (n, H)
        with torch.no_grad():  # several chunks are pooled in inference only
            scores = scores.float()
            top = scores.amax(dim=0)  # (K,)
            total = (scores - top).exp().sum(dim=0)
        if self._mean is None or self._top is None or self._total is None:
            self._mean, self._top, self._total, self._dtype = mean, top, total, mean.dtype
            return
        highest = torch.maximum(self._top, top)
        old, new = self._total * (self._top - highest).exp(), total * (top - highest).exp()
        self._top, self._total = highest, old + new
        self._mean = self._mean * (old / self._total)[:, None] + mean * (new / self._total)[:, None]

    def mean(self) -> Tensor:
        """(K, H): for each of the K maps, the mean of the values under the softmax of its scores."""
        assert self._mean is not None, "a pool needs at least one chunk"
        return self._mean.to(self._dtype)


@dataclass(frozen=True, eq=False)
class PooledBag:
    """A bag after attention pooling.

    Attributes:
        scores: (N, K) raw attention.
        embedding: (K, H).
        rows: gives the hidden rows (n, H) of the tiles whose numbers (n,) it is asked for.
    """

    scores: Tensor
    embedding: Tensor
    rows: Callable[[Tensor], Tensor]


class PoolingHead(Head):
    """A head that looks at each tile by itself, then pools: CLAM, ABMIL, and the plain mean."""

    @abstractmethod
    def score_tiles(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, D) to hidden rows (n, H) and raw attention (n, K)."""

    @abstractmethod
    def finish(self, bag: PooledBag) -> HeadOutput:
        """From the pooled bag to the output."""

    def forward(self, features: Tensor) -> HeadOutput:
        """(N, D) floating to :class:`HeadOutput`; HeadError where the bag is empty or of another width."""
        self.check_features(features)
        chunks = self.chunks(features)
        if len(chunks) == 1:
            return self._pool_whole(*self.score_tiles(self.cast(features)))
        pool, scores = SoftmaxPool(), []
        for chunk in chunks:
            hidden, chunk_scores = self.score_tiles(self.cast(chunk))
            pool.add(chunk_scores, hidden)
            scores.append(chunk_scores)
        # hidden rows of all tiles would be the memory that chunks save: the few asked for are made again
        again = lambda tiles: self.score_tiles(self.cast(features[tiles]))[0]  # noqa: E731
        return self.finish(PooledBag(torch.cat(scores), pool.mean(), again))

    def forward_bags(self, features: Tensor, lengths: Sequence[int]) -> list[HeadOutput]:
        """As in :class:`Head`; the tiles of all bags pass the layers at once, and each bag is pooled by itself."""
        self.check_features(features)
        self.check_lengths(features, lengths)
        if len(self.chunks(features)) > 1:
            return [self(bag) for bag in torch.split(features, list(lengths))]
        hidden, scores = self.score_tiles(self.cast(features))
        sizes = list(lengths)
        return [
            self._pool_whole(*bag) for bag in zip(torch.split(hidden, sizes), torch.split(scores, sizes), strict=True)
        ]

    def _pool_whole(self, hidden: Tensor, scores: Tensor) -> HeadOutput:
        pool = SoftmaxPool()
        pool.add(scores, hidden)
        return self.finish(PooledBag(scores, pool.mean(), hidden.__getitem__))

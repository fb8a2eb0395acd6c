"""Self-attention approximated through landmarks, in memory linear in the tokens.

Source: Y. Xiong et al., "Nyströmformer: a Nyström-based algorithm for approximating self-attention", AAAI 2021. With
landmarks q̃, k̃ (means of runs of queries and keys), softmax(q kᵀ) v is approximated by
softmax(q k̃ᵀ) · pinv(softmax(q̃ k̃ᵀ)) · softmax(q̃ kᵀ) v (eq. 13), the pseudo-inverse by a fixed number of steps (eq. 14);
a depthwise convolution of the values along the tokens is added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

PINV_STEPS = 6
RESIDUAL_KERNEL = 33
WATCH_CHUNK = 8192


class NystromAttention(nn.Module):
    """Multi-head attention over T tokens.

    T is filled up to a multiple of ``landmarks`` with zeros in front, and these take part, as in the published
    networks: no bias moves them, so their keys and values are zero too.

    Args:
        dim: numbers per token.
        heads: attention heads, of dim / heads numbers each.
        landmarks: runs of tokens whose means stand for all.
        dropout: share of the outputs dropped, in training.
    """

    def __init__(self, dim: int, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.scale = (dim // heads) ** -0.5
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.res_conv = nn.Conv2d(
            heads, heads, (RESIDUAL_KERNEL, 1), padding=(RESIDUAL_KERNEL // 2, 0), groups=heads, bias=False
        )

    def forward(self, tokens: Tensor, watched: int | None = None) -> tuple[Tensor, Tensor]:
        """(T, dim) to the same.

        Args:
            tokens: (T, dim).
            watched: a token whose attention is wanted too, by its number.

        Returns:
            The mixed tokens (T, dim), and the attention (T,) that token ``watched`` pays to all, mean over heads and
            without gradient; empty where none is watched. It may be slightly negative, as approximations are.
        """
        filled = -len(tokens) % self.landmarks
        qkv = self.to_qkv(pad(tokens, (0, 0, filled, 0)))  # (P, 3 dim), P a multiple of the landmarks
        q, k, v = qkv.reshape(len(qkv), 3, self.heads, -1).permute(1, 2, 0, 3)  # each (heads, P, d)
        residual = self.res_conv(v[None])[0]
        with torch.autocast(tokens.device.type, enabled=False):  # the pseudo-inverse amplifies rounding
            mixed, attention = self._mix(q, k, v, None if watched is None else filled + watched)
        out = self.to_out((mixed + residual).transpose(0, 1).flatten(1))  # (P, dim)
        return out[filled:], attention[filled:]

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, watched: int | None) -> tuple[Tensor, Tensor]:
        """Queries, keys and values (heads, P, d) to mixed values (heads, P, d) and the watched token's attention."""
        q = q * self.scale
        runs = (self.heads, self.landmarks, -1, q.shape[-1])
        q_marks = q.reshape(runs).mean(dim=2)  # (heads, m, d)
        k_marks = k.reshape(runs).mean(dim=2)
        inverse = pseudo_inverse(_softmax_of_products(q_marks, k_marks))  # (heads, m, m)
        gathered = inverse @ _attend(q_marks, k, v).float()  # (heads, m, d)
        mixed = _attend(q, k_marks, gathered.to(v.dtype))
        if watched is None:
            return mixed, q.new_zeros(0)
        with torch.no_grad():
            row = _softmax_of_products(q[:, watched, None], k_marks) @ inverse  # (heads, 1, m)
            return mixed, _spread_over_keys(row, q_marks, k)


def pseudo_inverse(matrices: Tensor, steps: int = PINV_STEPS) -> Tensor:
    """Moore-Penrose inverse of softmax matrices (…, m, m) by iteration (Nyströmformer, eq. 14).

    The start is the transpose over the largest sum of a row times that of a column, one number for all matrices given.
    """
    sizes = matrices.abs()
    guess = matrices.mT / (sizes.sum(-1).max() * sizes.sum(-2).max())
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    for _ in range(steps):
        product = matrices @ guess
        guess = 0.25 * guess @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return guess


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention softmax(q kᵀ) v per head, (heads, …, d), without keeping the matrix."""
    return scaled_dot_product_attention(queries[None], keys[None], values[None], scale=1.0)[0]


def _softmax_of_products(queries: Tensor, keys: Tensor) -> Tensor:
    """(heads, a, d) and (heads, b, d) to (heads, a, b), each row summing to 1, in float32."""
    return (queries @ keys.mT).float().softmax(dim=-1)


def _spread_over_keys(row: Tensor, q_marks: Tensor, keys: Tensor) -> Tensor:
    """The product row · softmax(q̃ kᵀ), mean over heads: (heads, 1, m) to (P,), by chunks of the keys.

    The softmax runs over all keys, so its denominators are summed up in a first pass.
    """
    pieces = torch.split(keys, WATCH_CHUNK, dim=1)
    sums = [(q_marks @ piece.mT).float().logsumexp(dim=-1) for piece in pieces]
    totals = torch.stack(sums).logsumexp(dim=0)  # (heads, m)
    spread = []
    for piece in pieces:
        shares = ((q_marks @ piece.mT).float() - totals[..., None]).exp()  # (heads, m, n)
        spread.append((row @ shares).mean(dim=0)[0])
    return torch.cat(spread)

"""Head counts and widths, one token and many, with and without norms, queries that meet no key, NaN."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import DTYPES, Case, random

EPS = 1e-5


def weights(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q_weight, k_weight = (1 + random(seed, width, scale=0.3) for seed in (11, 12))
    return q_weight.to(dtype), k_weight.to(dtype)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for heads, head_dim in ((1, 1), (1, 8), (3, 5), (7, 32), (2, 64)):
            width = heads * head_dim
            qkv = random(1, 2, 35, 3 * width, dtype=dtype)
            name = f"{heads} heads of {head_dim}"
            yield Case(name, (qkv, *weights(width, dtype), heads, EPS))
            yield Case(f"{name}, no norms", (qkv, None, None, heads, EPS))
        norms = weights(64, dtype)
        for tokens in (1, 2, 33, 1024):
            yield Case(f"{tokens} tokens", (random(2, 1, tokens, 192, dtype=dtype), *norms, 2, EPS))
        many = random(8, 1, 4200, 48, dtype=dtype)
        yield Case("4200 tokens", (many, *weights(16, dtype), 1, EPS))
        yield Case("eps shows", (random(3, 2, 9, 192, dtype=dtype, scale=3e-3), *norms, 2, EPS))
        deaf = random(4, 2, 9, 192, dtype=dtype)
        deaf[:, :4, :64] = -deaf[:, :4, :64].abs()  # queries of which the ReLU leaves nothing
        yield Case("queries that meet no key", (deaf, *norms, 2, EPS))
        unseen = random(5, 2, 9, 192, dtype=dtype)
        unseen[..., 64:96] = -unseen[..., 64:96].abs()  # no token has a key for the first head
        yield Case("a head without keys", (unseen, *norms, 2, EPS))
        broken = random(9, 2, 9, 192, dtype=dtype)
        broken[0, 4, 64 + 3] = torch.nan  # a key of the first picture's first head: all of that head
        broken[1, 2, 32 + 5] = torch.nan  # a query of the second picture's second head: that token of it
        yield Case("not a number", (broken, None, None, 2, EPS))
        out = random(6, 2, 9, 64, dtype=dtype)
        given = random(7, 2, 9, 192, dtype=dtype)
        yield Case("given out", (given, *norms, 2, EPS), {"out": out}, written=("out",))

"""Head counts and widths, one key and many, keys that stand for many, logits that let one key win."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, random

EPS = 1e-5


def case(
    label: str,
    dtype: torch.dtype,
    tokens: int = 33,
    keys: int = 9,
    heads: int = 3,
    head_dim: int = 16,
    *,
    norm: bool = True,
    counts: tuple[int, ...] = (),
    query_scale: float = 1.0,
    key_scale: float = 1.0,
) -> Case:
    query = random(1, tokens, heads * head_dim, dtype=dtype, scale=query_scale)
    key = random(2, heads, keys, head_dim, dtype=dtype, scale=key_scale)
    value = random(3, heads, keys, head_dim, dtype=dtype)
    weight = (1 + random(4, heads * head_dim, scale=0.3)).to(dtype) if norm else None
    options = {"log_multiplicity": torch.tensor(counts).log()} if counts else {}
    return Case(label, (query, key, value, weight, EPS), options)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for heads, head_dim in ((1, 1), (1, 8), (5, 7), (2, 112), (3, 64)):
            yield case(f"{heads} heads of {head_dim}", dtype, heads=heads, head_dim=head_dim)
        for keys in (1, 2, 16, 17, 384, 385, 730, 3001):
            yield case(f"{keys} keys", dtype, keys=keys)
        for tokens in (1, 15, 130):
            yield case(f"{tokens} tokens", dtype, tokens=tokens)
        yield case("no norm", dtype, norm=False)
        yield case("two keys for 730 and 1024", dtype, keys=2, counts=(730, 1024))
        yield case("four counts, no norm", dtype, keys=4, counts=(1, 10**6, 3, 1), norm=False)
        yield case("counts of 500 keys", dtype, keys=500, counts=tuple(range(1, 501)))
        yield case("keys that do not count", dtype, keys=140, counts=(0,) * 70 + (1,) * 70)
        yield case("eps shows", dtype, query_scale=3e-3)
        yield case("one key wins", dtype, key_scale=30.0)
        given = case("given out", dtype)
        out = random(5, 33, 48, dtype=dtype)
        yield Case("given out", given.arguments, {"out": out}, written=("out",))
        key, value = (random(seed, 9, 3, 16, dtype=dtype).transpose(0, 1) for seed in (6, 7))
        query, weight = random(8, 33, 48, dtype=dtype), random(9, 48, dtype=dtype)
        yield Case("keys token by token in memory", (query, key, value, weight, EPS))

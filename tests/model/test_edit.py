"""Changes of low rank: summed exactly, taken back bit for bit with a small residue."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracle_models import same_bits
from torch import Tensor

from lmrepair.model import SPREAD, LowRank, Product, grown, patched, written_out
from lmrepair.model.edit.products import AT_ONCE, LARGEST
from lmrepair.model.edit.sparse_integers import pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WHOLE = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def arrays(numbers: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    places = sorted(numbers)
    return np.array(places, np.int64), np.array([numbers[place] for place in places], np.int64)


def read_bit_by_bit(raw: bytes) -> dict[int, int]:
    """What the bytes say, by the words of ``pack``."""
    count, low = int.from_bytes(raw[:8], "little"), raw[8]
    bits = iter([byte >> at & 1 for byte in raw[9:] for at in range(8)])

    def unary() -> int:
        number = 0
        while not next(bits):
            number += 1
        return number

    def whole(length: int) -> int:
        return sum(next(bits) << at for at in range(length))

    high = [unary() for _ in range(count)]
    gaps = [(number << low) + whole(low) for number in high]
    lengths = [unary() for _ in range(count)]
    sizes = [(1 << length) + whole(length) for length in lengths]
    signs = [next(bits) for _ in range(count)]
    assert not any(bits)
    found, place = {}, -1
    for gap, size, sign in zip(gaps, sizes, signs, strict=True):
        place += gap + 1
        found[place] = -size if sign else size
    return found


numbers = st.dictionaries(
    st.integers(0, 10_000_000), st.integers(-(2**33) + 1, 2**33 - 1).filter(lambda number: number != 0), max_size=40
)


@settings(deadline=None, max_examples=100)
@given(numbers)
def test_sparse_integers_come_back(wanted: dict[int, int]) -> None:
    raw = pack(*arrays(wanted))
    assert read_bit_by_bit(raw) == wanted
    places, values = unpack(raw)
    assert dict(zip(places.tolist(), values.tolist(), strict=True)) == wanted


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64) | st.binary(max_size=40).map(lambda raw: (3).to_bytes(8, "little") + b"\x02" + raw))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        places, values = unpack(raw)
    except ValueError:
        return
    assert len(places) == len(values) <= 8 * len(raw)
    assert (np.diff(places, prepend=-1) > 0).all()
    assert (values != 0).all()
    assert dict(zip(places.tolist(), values.tolist(), strict=True)) == read_bit_by_bit(raw)


def test_few_numbers_take_few_bits() -> None:
    generator = np.random.default_rng(0)
    places = np.flatnonzero(generator.random(1_000_000) < 0.01)
    values = np.where(generator.random(len(places)) < 0.5, -1, 1)
    entropy = 1_000_000 * -(0.01 * np.log2(0.01) + 0.99 * np.log2(0.99)) + len(places)
    assert len(pack(places, values)) * 8 < 1.15 * entropy + len(places)


def product(generator: torch.Generator, rank: int, neurons: int, width: int) -> Product:
    shapes = (rank, neurons), (rank, width)
    left, right = (torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator).to(torch.int16) for shape in shapes)
    exponents = -40 + torch.randint(0, SPREAD + 1, (rank,), generator=generator).to(torch.int16)
    return Product(left, right, exponents)


@pytest.mark.parametrize("seed", range(3))
def test_a_product_is_summed_exactly_in_any_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = AT_ONCE if seed == 0 else 5
    made = product(generator, rank, 4, 3)
    dense = made.dense()
    for j in range(4):
        for i in range(3):
            exact = sum(
                Fraction(2) ** e * a * b
                for e, a, b in zip(
                    made.exponents.tolist(), made.left[:, j].tolist(), made.right[:, i].tolist(), strict=True
                )
            )
            assert Fraction(float(dense[j, i])) == exact
    order = list(range(rank))
    random.Random(seed).shuffle(order)
    assert torch.equal(Product(made.left[order], made.right[order], made.exponents[order]).dense(), dense)
    left, right = made.factors()
    assert left.dtype == right.dtype == torch.float32
    assert torch.equal((right.double() @ left.double()).T, dense)


def test_factors_are_rounded_to_sixteen_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(6, 50, generator=generator) * torch.logspace(-3, 2, 6)[:, None]
    right = torch.randn(6, 30, generator=generator)
    made = Product.of(left, right)
    assert int(made.left.abs().max()) > LARGEST // 2
    wanted = left.double().T @ right.double()
    assert float((made.dense() - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())
    for row in range(6):  # each pair for itself
        alone = Product.of(left[row : row + 1], right[row : row + 1]).dense()
        outer = left[row].double()[:, None] * right[row].double()
        assert float((alone - outer).abs().max()) < 1e-4 * float(outer.abs().max())
    assert int(made.exponents.max()) - int(made.exponents.min()) <= SPREAD
    half = made.times(0.5).dense()
    assert float((half - made.dense() / 2).abs().max()) < 1e-4 * float(half.abs().max())
    both = made.plus(Product.of(-left, right))
    assert both.rank == 12
    assert float(both.dense().abs().max()) < 1e-4 * float(wanted.abs().max())


def test_fine_factors_have_twice_the_bits_on_one_side() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(5, 40, generator=generator), torch.randn(5, 24, generator=generator)
    right = right.sign()  # rounded without an error
    coarse, fine = Product.of(left, right), Product.fine(left, right)
    assert fine.rank == 2 * coarse.rank == 10
    wanted = left.double().T @ right.double()
    lost = [float((made.dense() - wanted).abs().max()) for made in (coarse, fine)]
    assert lost[0] > 1e-5
    assert lost[1] < 1e-8


def test_a_change_grows_as_factors_while_these_are_smaller() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second, wide = (
        Product.of(torch.randn(rank, 12, generator=generator), torch.randn(rank, 8, generator=generator))
        for rank in (1, 2, 3)
    )
    nothing = torch.full((1, 1), -0.0).expand(12, 8)
    assert grown(nothing, first) is first
    both = grown(first, second)
    assert isinstance(both, Product)
    assert both.rank == 3
    wanted = first.dense() + second.dense()
    assert torch.allclose(both.dense(), wanted, atol=1e-3)
    more = grown(both, wide)  # six pairs of 20 numbers, for 96
    assert isinstance(more, torch.Tensor)
    assert torch.allclose(more.double(), wanted + wide.dense(), atol=1e-3)
    assert torch.allclose(written_out(grown(more, first)), more + written_out(first))


def test_what_is_far_below_the_rest_is_left_out() -> None:
    left, right = torch.ones(2, 3), torch.tensor([[1.0, 2.0], [1e-12, 1e-12]])
    made = Product.of(left, right)
    assert made.rank == 1
    assert Product.of(torch.zeros(2, 3), right).rank == 0
    assert not Product.of(torch.zeros(2, 3), right).dense().any()


def weights(dtype: torch.dtype, seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "usual":
        return (0.05 * torch.randn(40, 24, generator=generator)).to(dtype)
    whole = WHOLE[dtype]
    limits = torch.iinfo(whole)
    bits = torch.randint(limits.min, limits.max, (40, 24), generator=generator).to(whole)
    found = bits.view(dtype)
    return torch.where(found.isfinite(), found, torch.zeros_like(found)).neg()  # with zeros, −0 and subnormal numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["usual", "any bits"])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-6, 1e-3, 0.1, 10.0]), rank=st.integers(1, 3))
def test_a_layer_comes_back_bit_for_bit(dtype: torch.dtype, kind: str, seed: int, size: float, rank: int) -> None:
    original = weights(dtype, seed, kind)
    generator = torch.Generator().manual_seed(seed + 1)
    made = Product.of(size * torch.randn(rank, 40, generator=generator), torch.randn(rank, 24, generator=generator))
    change = LowRank.of(made, original)
    now = patched(original, change.delta)
    exact = (original.double() + made.dense()).float().to(dtype)
    assert same_bits(now, exact)
    assert same_bits(change.original(now), original)
    places, _ = change.missed()
    assert len(places) <= original.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residue_of_a_small_change_is_small(dtype: torch.dtype) -> None:
    """Only entries whose exponent grows lose bits: about as large a share of them as the change is of the weights."""
    generator = torch.Generator().manual_seed(0)
    original = (0.05 * torch.randn(400, 300, generator=generator)).to(dtype)
    left, right = torch.randn(4, 400, generator=generator), torch.randn(4, 300, generator=generator)
    change = LowRank.of(Product.of(left, 2.5e-4 * right), original)
    places, _ = change.missed()
    grown = original.double().abs().frexp().exponent < patched(original, change.delta).double().abs().frexp().exponent
    share = float(grown.double().mean())
    assert 0 < len(places) / original.numel() < 1.2 * share + 1e-3
    assert len(change.residue) < 0.02 * original.numel() * original.element_size()

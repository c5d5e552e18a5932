"""Semantic bases, steers and priors against pseudo-inverses and least squares."""

from __future__ import annotations

import numpy as np
import oracle
import oracle_models
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from lmrepair.methods.maths.basis import Bases, by_spread
from lmrepair.methods.maths.closed_form import Constraints


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest entry of what is wanted."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def every_basis(head: Tensor, gain: Tensor | None = None) -> tuple[Tensor, Bases]:
    made = Bases(head, torch.ones(head.shape[1], dtype=torch.float64) if gain is None else gain.double())
    return made[torch.arange(len(head))], made


# --- bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(640, 32), (40, 32), (2000, 17), (9000, 8)])
def test_bases_are_columns_of_the_pseudo_inverse(vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    # 9000 rows are more than are read at once.
    head = noise(vocabulary, hidden).to(dtype)
    found, made = every_basis(head)
    assert made.exact
    assert found.dtype == torch.float64
    assert off(found, oracle.bases(head)) < 1e-6


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12), st.integers(0, 60), st.integers(0, 10**6), st.floats(0.0, 3.0), st.booleans()
)  # fmt: skip
def test_bases_agree_for_any_well_conditioned_head(
    hidden: int, more: int, seed: int, decades: float, with_gain: bool
) -> None:
    """Up to three decades between the columns' sizes; the Gram matrix squares them to six."""
    scale = torch.logspace(0, -decades, hidden, dtype=torch.float64)
    head = noise(2 * hidden + more, hidden, seed=seed) * scale
    gain = torch.linspace(0.5, 2.0, hidden) if with_gain else None
    found, _ = every_basis(head, gain)
    assert off(found, oracle.bases(head, gain)) < 1e-6


def test_a_basis_gives_logits_as_near_as_can_be_to_one_token() -> None:
    """Any other state has logits further from the one-hot row: the definition itself."""
    head = noise(60, 8)
    found, _ = every_basis(head)
    for token in (0, 31, 59):
        hot = torch.zeros(60, dtype=torch.float64)
        hot[token] = 1.0
        least = (head @ found[token] - hot).norm()
        for seed in range(20):
            assert (head @ (found[token] + 1e-3 * noise(8, seed=seed)) - hot).norm() > least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_a_head_without_full_rank_uses_the_pseudo_inverse(rank: int, dtype: torch.dtype) -> None:
    head = (noise(300, rank) @ noise(rank, 16, seed=1)).to(dtype)
    found, made = every_basis(head)
    assert not made.exact
    # Storage in float32 leaves singular values of 1e-7 behind; both sides are to leave them out.
    assert off(found, oracle.bases(head, rtol=1e-6)) < 1e-5


def test_a_head_with_fewer_tokens_than_width() -> None:
    head = noise(6, 16)
    found, made = every_basis(head)
    assert not made.exact
    assert off(found, oracle.bases(head)) < 1e-6
    assert off(head @ found.T, torch.eye(6)) < 1e-6


def test_rows_of_zeros_have_a_basis_of_zero() -> None:
    head = noise(50, 8)
    head[40:] = 0.0
    found, made = every_basis(head)
    assert made.exact
    assert off(found, oracle.bases(head)) < 1e-6
    assert not found[40:].any()


def test_gain_scales_the_head() -> None:
    head, gain = noise(200, 16), torch.linspace(-2.0, 2.0, 16)
    found, made = every_basis(head, gain)
    assert made.exact
    assert off(found, oracle.bases(head, gain)) < 1e-6
    assert off(found, oracle.bases(head)) > 0.1


def test_where_the_gain_is_zero_no_basis_moves() -> None:
    head, gain = noise(200, 16), torch.linspace(0.5, 2.0, 16)
    gain[[0, 7]] = 0.0
    found, made = every_basis(head, gain)
    assert not made.exact
    assert off(found, oracle.bases(head, gain)) < 1e-6
    assert float(found[:, [0, 7]].abs().max()) < 1e-15


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("gain", [False, True])
def test_bases_of_a_net_use_its_head_and_final_gain(kind: str, gain: bool) -> None:
    net = oracle_models.net(kind)
    norm = net.model.transformer.ln_f if kind == "gpt2" else net.model.model.norm
    found = Bases.of(net, gain)[torch.arange(net.anatomy.vocabulary)]
    wanted = oracle.bases(net.model.lm_head.weight, norm.weight if gain else None)
    assert off(found, wanted) < 1e-6


def test_bases_keep_the_head_as_it_is_stored() -> None:
    net = oracle_models.net(dtype=torch.bfloat16)
    made = Bases.of(net)
    assert made.head.data_ptr() == net.model.lm_head.weight.data_ptr()
    assert off(made[torch.arange(100)], oracle.bases(net.model.lm_head.weight)[:100]) < 1e-6


def test_steers_lead_from_said_to_wanted() -> None:
    head = noise(300, 12)
    made = Bases(head, torch.ones(12, dtype=torch.float64))
    wanted, said = torch.tensor([5, 5, 9, 250]), torch.tensor([9, 7, 5, 250])
    found = made.steers(wanted, said)
    assert off(found, oracle.steers(head, wanted.tolist(), said.tolist())) < 1e-6
    assert torch.equal(found[0], -found[2])
    assert not found[3].any()


# --- spread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [4, 5, 6, 7, 32])
def test_by_spread_divides_by_the_inter_quartile_range(hidden: int) -> None:
    rows = noise(9, hidden) * torch.logspace(-6, 3, 9, dtype=torch.float64)[:, None]
    found = by_spread(rows)
    for row, scaled in zip(rows.numpy(), found.numpy(), strict=True):
        low, high = np.percentile(row, [25, 75])
        np.testing.assert_allclose(scaled, row / (high - low), rtol=1e-12)
    assert off(found, oracle.by_spread(rows)) < 1e-12


def test_by_spread_ignores_a_row_of_zeros() -> None:
    assert not by_spread(torch.zeros(2, 8, dtype=torch.float64)).any()


def test_by_spread_takes_thousands_of_steers() -> None:
    rows = noise(4200, 1).expand(4200, 4096) * torch.linspace(-1, 1, 4096, dtype=torch.float64)
    assert by_spread(rows).shape == rows.shape


# --- priors ---------------------------------------------------------------------------------------


def prior(z: Tensor, s: Tensor) -> Tensor:
    return z.double().T @ Constraints.of({0: z}).weights(s)


@pytest.mark.parametrize(("positions", "neurons"), [(1, 48), (7, 48), (48, 48), (90, 48), (400, 48), (5, 1)])
def test_the_prior_is_the_minimum_norm_least_squares_solution(positions: int, neurons: int) -> None:
    # A square matrix of noise has a condition number in the hundreds, which the Gram matrix squares.
    z, s = noise(positions, neurons).float(), noise(positions, 16, seed=1)
    found = prior(z, s)
    assert off(found, oracle.prior(z, s)) < 1e-6
    assert off(found, oracle.prior_by_lstsq(z, s)) < 1e-6


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_the_prior_of_any_rank(positions: int, neurons: int, rank: int, seed: int) -> None:
    left = torch.linalg.qr(noise(positions, min(rank, positions, neurons), seed=seed)).Q
    right = torch.linalg.qr(noise(neurons, min(rank, positions, neurons), seed=seed + 1)).Q
    z = left * torch.linspace(1.0, 0.01, left.shape[1], dtype=torch.float64) @ right.T
    s = noise(positions, 5, seed=seed + 2)
    assert off(prior(z, s), oracle.prior(z, s)) < 1e-6


def test_with_fewer_positions_than_neurons_every_steer_is_met() -> None:
    z, s = noise(9, 48), noise(9, 16, seed=1)
    s[[2, 5]] = 0.0
    found = z @ prior(z, s)
    assert off(found, s) < 1e-9
    assert float(found[[2, 5]].abs().max()) < 1e-9  # asked to stay, and stays


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_no_other_solution_has_a_smaller_norm(positions: int, seed: int, size: float) -> None:
    z, s = noise(positions, 24, seed=seed), noise(positions, 6, seed=seed + 1)
    found = prior(z, s)
    aside = torch.eye(24, dtype=torch.float64) - torch.linalg.pinv(z) @ z
    other = found + size * aside @ noise(24, 6, seed=seed + 2)
    assert off(z @ other, s) < 1e-6
    assert other.norm() > found.norm()


def test_with_more_positions_than_neurons_the_residual_is_least() -> None:
    z, s = noise(80, 10), noise(80, 4, seed=1)
    found = prior(z, s)
    least = (z @ found - s).norm()
    assert float((z.T @ (z @ found - s)).abs().max()) < 1e-9  # normal equations
    for seed in range(20):
        assert (z @ (found + 1e-3 * noise(10, 4, seed=seed)) - s).norm() > least


def test_the_same_position_twice_with_one_steer_is_one_position() -> None:
    z, s = noise(4, 20), noise(4, 6, seed=1)
    twice = prior(torch.cat([z, z[:2]]), torch.cat([s, s[:2]]))
    assert off(twice, prior(z, s)) < 1e-9
    assert off(twice, oracle.prior(torch.cat([z, z[:2]]), torch.cat([s, s[:2]]))) < 1e-6


def test_the_same_position_with_two_steers_gets_their_mean() -> None:
    z, s = noise(3, 20), noise(3, 6, seed=1)
    rows, asked = torch.cat([z, z[:1]]), torch.cat([s, noise(1, 6, seed=2)])
    found = prior(rows, asked)
    assert off(found, oracle.prior_by_lstsq(rows, asked)) < 1e-6
    assert off(z[0] @ found, (asked[0] + asked[3]) / 2) < 1e-9


def test_nearly_the_same_position_counts_as_the_same() -> None:
    """Rounding between two batches must not be amplified into a huge prior."""
    z, s = noise(3, 20).float(), noise(3, 6, seed=1)
    rows = torch.cat([z, z[:1] * (1 + 1e-7)])
    found = prior(rows, torch.cat([s, noise(1, 6, seed=2)]))
    assert float(found.norm()) < 10 * float(prior(z, s).norm())


def test_restricted_columns_are_solved_on_their_own() -> None:
    z, s = noise(6, 48), noise(6, 16, seed=1)
    columns = torch.tensor([0, 3, 4, 17, 20, 31, 40, 47])
    found = prior(z[:, columns], s)
    assert off(found, oracle.prior(z[:, columns], s)) < 1e-6
    assert off(found, prior(z, s)[columns]) > 0.1


def test_no_coefficients_and_no_steers_ask_for_nothing() -> None:
    assert not prior(torch.zeros(3, 8), noise(3, 4)).any()
    assert not prior(noise(3, 8), torch.zeros(3, 4)).any()

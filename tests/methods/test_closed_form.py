"""The kernel of the closed forms against dense float64 oracles, for every (R, M, ε) of the family."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

from lmrepair import UsageError
from lmrepair.methods.maths.closed_form import Constraints, inverse_metric, null_space
from lmrepair.methods.maths.direct_path import scaled
from lmrepair.model.statistics.moments import Moment

NEURONS, WIDTH, REFERENCE, DAMPING = 24, 6, 16, 0.01


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def reference(count: int = REFERENCE) -> Tensor:
    """Coefficients of reference text that favour some directions by far."""
    return (noise(count, NEURONS, seed=5) * torch.logspace(0.5, -0.5, NEURONS, dtype=torch.float64)).float()


def moment(kind: str, rows: Tensor) -> Moment:
    if kind == "sampled":
        return Moment(kind, rows)
    return Moment(kind, rows.T @ rows / len(rows) if kind == "full" else rows.square().mean(dim=0))


@pytest.mark.parametrize("count", [1, 5, NEURONS, 60], ids=lambda n: f"{n} keys")
@pytest.mark.parametrize("kind", ["full", "sampled", "diagonal"])
@pytest.mark.parametrize(("scale", "ridge"), [(1.0, 0.0), (1.0, 1e-2), (1 / 40, 1.0)], ids=["rome", "emmet", "memit"])
def test_the_kernel_is_the_dense_formula_with_the_inverse_moment(
    kind: str, count: int, scale: float, ridge: float
) -> None:
    z, r, rows = noise(count, NEURONS, seed=1).float(), noise(count, WIDTH, seed=2), reference()
    metric = inverse_metric(moment(kind, rows).inverse(DAMPING), scale)
    found = Constraints.of({3: z}, {3: metric}).solve(r, ridge)
    c = oracle.damped(rows, DAMPING, kind == "diagonal")
    assert list(found) == [3]
    assert off(found[3], oracle.closed_form(z, r, scale * torch.linalg.inv(c), ridge)) < 1e-3


@pytest.mark.parametrize("count", [1, 5, 60], ids=lambda n: f"{n} keys")
@pytest.mark.parametrize(("kind", "samples"), [("sampled", 16), ("sampled", 40), ("full", 16), ("full", 40)])
def test_alphaedit_stays_in_the_sampled_null_space(kind: str, samples: int, count: int) -> None:
    z, r, rows = noise(count, NEURONS, seed=1).float(), noise(count, WIDTH, seed=2), reference(samples)
    threshold = 1e-4 if samples < NEURONS else 0.2
    metric = null_space(moment(kind, rows), threshold)
    p = oracle.null_space(rows, threshold)
    assert off(metric(z.double()), z.double() @ p) < 1e-5
    found = Constraints.of({0: z}, {0: metric}).solve(r, 0.5)[0]
    assert off(found, oracle.closed_form(z, r, p, 0.5)) < 1e-4
    if samples < NEURONS:  # nothing happens on any of the sampled coefficients
        assert float((rows @ found).abs().max()) < 1e-4 * float((z @ found).abs().max())


def test_a_null_space_with_nothing_in_it_is_refused() -> None:
    with pytest.raises(UsageError, match="all 24 directions"):
        null_space(moment("full", reference(60)), 1e-6)
    with pytest.raises(UsageError, match="diagonal moment has no null space"):
        null_space(moment("diagonal", reference()), 0.1)


def test_samples_that_stand_twice_leave_no_direction_of_rounding_noise() -> None:
    z, rows = noise(5, NEURONS, seed=1), reference(6)
    metric = null_space(moment("sampled", torch.cat([rows, rows, rows[:2]])), 0.0)
    basis = torch.linalg.qr(rows.double().T).Q
    assert off(metric(z), z - (z @ basis) @ basis.T) < 1e-9


def test_keys_that_stand_twice_are_weighed_by_the_pseudo_inverse() -> None:
    z, wanted = noise(4, NEURONS, seed=1), noise(6, WIDTH, seed=2)
    found = Constraints.of({0: torch.cat([z, z[:2]])}).weights(wanted)
    twice = torch.cat([z, z[:2]])
    assert off(found, torch.linalg.pinv(twice @ twice.T, rtol=1e-12) @ wanted) < 1e-9


def test_no_other_change_that_meets_the_values_costs_less() -> None:
    z, r, rows = noise(5, NEURONS, seed=1), noise(5, WIDTH, seed=2), reference()
    c = oracle.damped(rows, DAMPING)
    metric = inverse_metric(moment("sampled", rows).inverse(DAMPING))
    found = Constraints.of({0: z}, {0: metric}).solve(r)[0].double()
    assert off(z @ found, r) < 1e-4
    aside = torch.eye(NEURONS, dtype=torch.float64) - torch.linalg.pinv(z) @ z
    for seed in range(20):
        other = found + 0.1 * aside @ noise(NEURONS, WIDTH, seed=seed)
        assert torch.trace(other.T @ c @ other) > torch.trace(found.T @ c @ found)


def test_with_more_keys_than_neurons_the_residual_is_least() -> None:
    z, r, rows = noise(60, NEURONS, seed=1), noise(60, WIDTH, seed=2), reference()
    found = Constraints.of({0: z}, {0: inverse_metric(moment("full", rows).inverse(DAMPING))}).solve(r)[0].double()
    assert off(found, torch.linalg.lstsq(z, r).solution) < 1e-3


def test_the_metric_of_star_is_the_least_cost_and_not_the_least_norm() -> None:
    z, r, rows = noise(4, NEURONS, seed=1), noise(4, WIDTH, seed=2), reference()
    plain = Constraints.of({0: z}).solve(r)[0].double()
    weighed = Constraints.of({0: z}, {0: inverse_metric(moment("full", rows).inverse(DAMPING))}).solve(r)[0].double()
    c = oracle.damped(rows, DAMPING)
    assert off(plain, oracle.prior(z, r)) < 1e-5
    assert weighed.norm() > plain.norm()
    assert torch.trace(weighed.T @ c @ weighed) < 0.9 * torch.trace(plain.T @ c @ plain)


def test_layers_together_meet_the_values_in_sum() -> None:
    """One system of two layers is one of their neurons side by side, under a metric of two blocks."""
    z = {0: noise(4, NEURONS, seed=1).float(), 2: noise(4, 9, seed=2).float()}
    r, narrow = noise(4, WIDTH, seed=3), noise(30, 9, seed=4).float()
    moments = {0: moment("sampled", reference()), 2: moment("full", narrow)}
    metrics = {layer: inverse_metric(moments[layer].inverse(DAMPING)) for layer in z}
    found = Constraints.of(z, metrics).solve(r, 0.1)
    c = torch.block_diag(oracle.damped(reference(), DAMPING), oracle.damped(narrow, DAMPING))
    wanted = oracle.closed_form(torch.cat([z[0], z[2]], dim=1), r, torch.linalg.inv(c), 0.1)
    assert off(torch.cat([found[0], found[2]]), wanted) < 1e-4


def test_changes_along_a_direction_raise_by_what_is_asked() -> None:
    directions, slopes, rises = noise(5, WIDTH, seed=1), noise(5, WIDTH, seed=2), torch.linspace(0.5, 4.0, 5)
    directions = directions * (directions * slopes).sum(dim=1, keepdim=True).sign()
    directions[2] = -slopes[2]  # leads down: the slope takes its place
    slopes[4] = 0.0
    found = scaled(directions, slopes, rises)
    raised = (found * slopes).sum(dim=1)
    assert off(raised[:4], rises[:4].double()) < 1e-9
    assert not found[4].any()
    assert off(found[0] / found[0].norm(), directions[0] / directions[0].norm()) < 1e-9
    assert off(found[2] / found[2].norm(), slopes[2] / slopes[2].norm()) < 1e-9

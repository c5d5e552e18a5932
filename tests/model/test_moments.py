"""Moments and their damped inverses against dense float64 matrices."""

from __future__ import annotations

from dataclasses import replace

import oracle_minkl as oracle
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from lmrepair import UsageError
from lmrepair.model.statistics.moments import KINDS, Metric, Moment, OnDemand, Statistics

WIDTH = 12


def moment(kind: str, seed: int = 0, rows: int = 40, width: int = WIDTH, spread: float = 1.0) -> Moment:
    """A random moment whose directions differ in size by up to ``10**spread``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 10 ** (spread * torch.rand(width, generator=generator))
    full = x.T @ x / rows
    if kind == "blocks":
        parts = [slice(0, width // 3), slice(width // 3, width)] if width >= 3 else [slice(0, width)]
        return Moment.of_blocks([full[part, part] for part in parts])
    return Moment(kind, {"full": full, "sampled": x, "diagonal": full.diagonal().clone()}[kind])


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found.double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def dense_inverse(one: Moment, damping: float) -> Tensor:
    return torch.linalg.inv(oracle.damped(oracle.dense(one.kind, one.values, one.widths), damping))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, WIDTH, 40])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_inverse_is_that_of_the_damped_dense_matrix(kind: str, rows: int, damping: float) -> None:
    """Sampled: fewer rows than entries, as many, and more."""
    one = moment(kind, rows=rows)
    wanted = dense_inverse(one, damping)
    inverse = one.inverse(damping)
    assert near(inverse.apply(torch.eye(WIDTH)), wanted, 1e-4)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    assert near(inverse.apply(x), x.double() @ wanted, 1e-4)


@pytest.mark.parametrize(("rows", "damping"), [(1, 1e-2), (60, 1e-2), (900, 1e-2), (900, 1e-4)])
def test_a_wide_moment_is_inverted_as_finely_as_it_is_used(rows: int, damping: float) -> None:
    """Wide ones are factored in float32 where that is fine enough, and in float64 where little damping asks for it."""
    one = moment("full", rows=rows, width=300)
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    assert near(one.inverse(damping).apply(x), x.double() @ dense_inverse(one, damping), 2e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 30),
    st.integers(1, 20),
    st.floats(1e-3, 10.0),
    st.floats(0.0, 1.5),
    st.integers(0, 2**20),
)
def test_any_inverse_undoes_the_damped_moment(
    kind: str, rows: int, width: int, damping: float, spread: float, seed: int
) -> None:
    one = moment(kind, seed, rows, width, spread)
    matrix = oracle.damped(oracle.dense(one.kind, one.values, one.widths), damping)
    found = one.inverse(damping).apply(torch.eye(width)).double()
    assert near(found, torch.linalg.inv(matrix), 1e-3)
    assert torch.allclose(found, found.T, atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_moment_itself_is_applied_and_has_a_diagonal(kind: str) -> None:
    one = moment(kind)
    matrix = oracle.dense(one.kind, one.values, one.widths)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    assert near(one.apply(x), x.double() @ matrix, 1e-5)
    assert near(one.diagonal, matrix.diagonal(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [[3], [0, 2, 7, 11], list(range(WIDTH))])
def test_a_part_is_the_part_of_the_dense_matrix(kind: str, columns: list[int]) -> None:
    """C restricted and then inverted, not the inverse restricted: neurons that stay take no part."""
    one = moment(kind)
    part = one.at(torch.tensor(columns))
    matrix = oracle.dense(one.kind, one.values, one.widths)[columns][:, columns]
    assert near(oracle.dense(part.kind, part.values, part.widths), matrix, 1e-6)
    assert near(part.inverse(0.01).apply(torch.eye(len(columns))), torch.linalg.inv(oracle.damped(matrix, 0.01)), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_read_means_no_direction_is_preferred(kind: str) -> None:
    one = moment(kind)
    zero = replace(one, values=torch.zeros_like(one.values))
    assert torch.equal(zero.inverse(0.01).apply(torch.eye(WIDTH)), torch.eye(WIDTH))


@pytest.mark.parametrize("kind", KINDS)
def test_the_damping_follows_the_scale(kind: str) -> None:
    one = moment(kind)
    times = 9.0 if kind == "sampled" else 3.0  # of E[x xᵀ], where x or E[x xᵀ] is tripled
    scaled = replace(one, values=one.values * 3)
    eye = torch.eye(WIDTH)
    assert near(scaled.inverse(0.05).apply(eye) * times, dense_inverse(one, 0.05), 1e-4)


def test_identity_has_the_scale_it_is_given() -> None:
    eye = torch.eye(WIDTH)
    assert torch.equal(Moment.identity(WIDTH, 4.0).apply(eye), 4 * eye)
    assert torch.allclose(Moment.identity(WIDTH, 4.0).inverse(0.25).apply(eye), eye / 5)


def test_values_that_do_not_fit_the_kind_are_refused() -> None:
    for kind, shape in (
        ("full", (3,)),
        ("sampled", (3,)),
        ("diagonal", (3, 3)),
        ("half", (3, 3)),
        ("blocks", (3, 3)),
        ("none", (3,)),
    ):
        with pytest.raises(UsageError, match="known: full, blocks, sampled, diagonal"):
            Moment(kind, torch.zeros(shape))


@pytest.mark.parametrize("inputs", KINDS)
@pytest.mark.parametrize("outputs", KINDS)
def test_the_cost_is_half_the_trace(inputs: str, outputs: str) -> None:
    """½ Σ tr(F Δ C Δᵀ) over the layers, with some neurons of one and all of the other."""
    hidden = 5
    c = {layer: moment(inputs, layer) for layer in (0, 2)}
    f = {layer: moment(outputs, 10 + layer, width=hidden) for layer in (0, 2)}
    columns = {0: torch.tensor([1, 4, 9]), 2: torch.arange(WIDTH)}
    generator = torch.Generator().manual_seed(3)
    deltas = {layer: torch.randn(len(part), hidden, generator=generator) for layer, part in columns.items()}
    wanted = 0.0
    for layer, part in columns.items():
        whole = torch.zeros(hidden, WIDTH, dtype=torch.float64)
        whole[:, part] = deltas[layer].double().T
        across = oracle.dense(outputs, f[layer].values, f[layer].widths)
        wanted += oracle.cost(across, whole, oracle.dense(inputs, c[layer].values, c[layer].widths))
    assert Statistics(c, f, "test", 1).cost(deltas, columns) == pytest.approx(wanted, rel=1e-4)


def test_the_metric_holds_the_inverses_and_restricts_them_to_neurons() -> None:
    c, f = {0: moment("full", 0), 1: moment("sampled", 1)}, {0: moment("full", 2), 1: moment("diagonal", 3)}
    metric = Metric.of(Statistics(c, f, "test", 1), 0.02)
    eye = torch.eye(WIDTH)
    columns = torch.tensor([0, 5, 6])
    for layer in (0, 1):
        assert near(metric.inputs[layer].apply(eye), dense_inverse(c[layer], 0.02), 1e-4)
        assert near(metric.outputs[layer].apply(eye), dense_inverse(f[layer], 0.02), 1e-4)
        part = oracle.dense(c[layer].kind, c[layer].values)[columns][:, columns]
        assert near(
            metric.restricted(layer, columns).apply(torch.eye(3)), torch.linalg.inv(oracle.damped(part, 0.02)), 1e-4
        )
        assert near(metric.restricted(layer, torch.arange(WIDTH)).apply(eye), dense_inverse(c[layer], 0.02), 1e-4)


def test_inverses_are_made_when_they_are_asked_for_and_once() -> None:
    asked: list[int] = []

    def make(layer: int) -> Moment:
        asked.append(layer)
        return moment("full", layer)

    found = OnDemand(range(3), make)
    assert (len(found), list(found), asked) == (3, [0, 1, 2], [])
    assert found[1] is found[1]
    assert asked == [1]
    assert found.known(1) is found[1]
    assert found.known(2) is None
    with pytest.raises(KeyError):
        found[3]
    statistics = Statistics(OnDemand(range(3), make, keep=False), found, "test", 1)
    del asked[:]
    metric = Metric.of(statistics, 0.02)
    assert not asked
    whole = metric.restricted(2, torch.arange(WIDTH))
    assert metric.restricted(2, torch.arange(WIDTH)) is whole is metric.inputs[2]
    assert set(asked) == {2}


def test_a_moment_that_rounding_left_short_of_positive_is_damped_more() -> None:
    values = torch.eye(WIDTH)
    values[0, 1] = values[1, 0] = 1.005
    found = Moment("full", values).inverse(1e-3).apply(torch.eye(WIDTH)).double()
    assert bool(found.isfinite().all())
    assert near(found, torch.linalg.inv(values.double() + 1e-2 * torch.eye(WIDTH)), 1e-3)

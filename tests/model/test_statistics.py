"""Statistics of reference text: C and the true Fisher by enumeration, what the cost means, and the cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import oracle_minkl
import oracle_models
import pytest
import safetensors
import safetensors.torch
import torch
from oracle_models import HIDDEN, LAYERS, WIDTH, State
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lmrepair import ModelError, Net, Reference
from lmrepair.errors import UsageError
from lmrepair.failures import Failure, Tokens
from lmrepair.model.statistics import (
    beginnings,
    cache as cache_module,
    cache_folder,
    gather,
    gathering as module,
    statistics_of,
    sums,
    texts as texts_module,
    windows,
)
from lmrepair.model.statistics.joining import joined
from lmrepair.model.statistics.moments import Asked, Moment, Statistics
from lmrepair.model.statistics.packing import pack, unpack

FULL = Asked("full", "full", 64, 0.01)
WORDS = 5  # the vocabulary that is small enough to enumerate
TEXT = (0, 3, 1, 4)
LONG = (0, 3, 1, 4, 2, 2, 1, 0, 4, 3)


def small(kind: str) -> Net:
    """Two layers of width 12 and hidden size 8, in float64, over five tokens."""
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(
            vocab_size=WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False, bos_token_id=0,
            eos_token_id=1,
        ))  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=WORDS, n_embd=8, n_inner=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=0,
            eos_token_id=1,
        ))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            bias = 0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise
            parameter.copy_(0.5 * noise if parameter.dim() == 2 else bias)
    return Net(model.double().eval().requires_grad_(False), oracle_models.tokenizer(), f"small-{kind}")


def text(ids: Sequence[int], prompt: int = 1) -> Tokens:
    return Tokens("text", tuple(ids[:prompt]), tuple(ids[prompt:]))


def largest(values: Tensor) -> float:
    return float(values.abs().max())


# --- what the moments are -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_c_is_the_mean_outer_product_over_what_a_token_follows(kind: str) -> None:
    """In one batch or several, padded or not, with prompts of any length."""
    net = oracle_models.net(kind, dtype=torch.float64)
    texts = [[0, 5, 9, 17], [0, 3], list(range(40, 60)), [0, *range(80, 87)]]
    wanted = oracle_minkl.inputs(net.model, texts)
    tokens = [text(ids, min(at + 1, len(ids) - 1)) for at, ids in enumerate(texts)]
    for at_once in (10_000, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sums, "READ_AT_ONCE", at_once)
            found = gather(net, tokens, FULL, "test")
        assert found.tokens == sum(len(ids) - 1 for ids in texts)
        for layer in range(LAYERS):
            values = found.inputs[layer].values
            assert largest(values - wanted[layer]) < 1e-5 * largest(wanted[layer])
    diagonal = gather(net, tokens, Asked("diagonal", "none", 64, 0.01), "test")
    for layer in range(LAYERS):
        assert torch.allclose(diagonal.inputs[layer].values.double(), wanted[layer].diagonal(), rtol=1e-4)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_f_is_the_true_fisher_of_the_summed_loss(kind: str) -> None:
    """Every way to draw the next tokens, by enumeration, against the mean of many draws.

    δ at a position is the gradient of all losses of the text with respect to the FFN output there: it
    holds the effect on later positions. The bound is five standard errors of each entry, which are
    known from the enumeration; the Fisher of the text's own tokens (the empirical one), that of a
    position's own loss alone, and a mean that counts the last position too are all beyond it.
    """
    net, draws = small(kind), 6000
    means, variances = oracle_minkl.fisher(net.model, TEXT)
    found = gather(net, [text(TEXT)] * draws, FULL, "test", seed=1)
    assert found.tokens == draws * (len(TEXT) - 1)
    logs = oracle.logits(net.model, TEXT)[:-1].log_softmax(1)
    for layer, table in enumerate(oracle_minkl.slopes(net.model, TEXT)):
        error = (variances[layer] / draws).sqrt() * 5 + 1e-6 * largest(means[layer])
        off = (found.outputs[layer].values.double() - means[layer]).abs()
        assert bool((off < error).all())
        own = sum(table[t, v].T @ table[t, v] for t, v in enumerate(TEXT[1:])) / len(logs)
        alone = torch.zeros_like(own)
        for t, row in enumerate(logs.exp()):
            for v, chance in enumerate(row):
                alone += chance * torch.outer(table[t, v, t], table[t, v, t]) / len(logs)
        others = {"empirical": own, "all positions": means[layer] * len(logs) / len(TEXT)}
        if layer == 0:  # nothing but the head follows the last layer: there a position's own loss is all
            others["own loss alone"] = alone
        else:
            assert largest(alone - means[layer]) < 1e-9
        for name, other in others.items():
            assert bool(((other - means[layer]).abs() > 2 * error).any()), name


def test_draws_follow_the_seed_and_leave_torchs_own_alone() -> None:
    net = oracle_models.net()
    before, random = State.of(net), torch.random.get_rng_state()
    tokens = [text(range(20)), text(range(30, 44))]
    first, again, other = (gather(net, tokens, FULL, "test", seed) for seed in (0, 0, 1))
    for layer in range(LAYERS):
        assert torch.equal(first.inputs[layer].values, again.inputs[layer].values)
        assert torch.equal(first.outputs[layer].values, again.outputs[layer].values)
        assert torch.equal(first.inputs[layer].values, other.inputs[layer].values)
        assert not torch.equal(first.outputs[layer].values, other.outputs[layer].values)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not before.changed(net)


# --- sampled moments ------------------------------------------------------------------------------


def positions(net: Net, texts: Sequence[Sequence[int]]) -> Tensor:
    """z of the first layer at every position that a token follows, [n, m], text after text."""
    return torch.cat([oracle_minkl.read(net.model, ids)[1][0][:-1] for ids in texts])


def test_sampled_rows_are_positions_drawn_without_replacement() -> None:
    """Every position can be drawn, none twice, and padding and last positions never are."""
    net = oracle_models.net(dtype=torch.float64)
    texts = [[0, 5, 9, 17], list(range(40, 60)), [1, *range(80, 87)]]
    every = positions(net, texts)
    tokens = [text(ids) for ids in texts]
    seen = torch.zeros(len(every))
    for seed in range(30):
        found = gather(net, tokens, Asked("sampled", "sampled", 9, 0.01), "test", seed)
        rows = found.inputs[0].values
        assert rows.shape == (9, WIDTH)
        assert found.outputs[0].values.shape == (9, HIDDEN)
        far = torch.cdist(rows.double(), every)
        places = far.argmin(dim=1)
        assert float(far.min(dim=1).values.max()) < 1e-4
        assert len(places.unique()) == len(places)
        seen[places] += 1
    # 30 draws of 9 of 29: each is drawn 9.3 times on average, standard deviation 2.5.
    assert len(every) == 29
    assert 1 <= int(seen.min()) <= int(seen.max()) <= 20
    more = gather(net, tokens, Asked("sampled", "sampled", 1000, 0.01), "test").inputs[0].values
    assert torch.allclose(more.double(), every, atol=1e-4)


def test_a_sample_of_every_position_is_the_full_moment() -> None:
    """Rows of C and of F come from the same positions."""
    net = oracle_models.net()
    tokens = [text(range(20)), text(range(30, 64))]
    full = gather(net, tokens, FULL, "test")
    sampled = gather(net, tokens, Asked("sampled", "sampled", 1000, 0.01), "test")
    for layer in range(LAYERS):
        for one, other, width in (
            (full.inputs, sampled.inputs, WIDTH),
            (full.outputs, sampled.outputs, HIDDEN),
        ):
            eye = torch.eye(width)
            wanted = one[layer].apply(eye)
            assert largest(other[layer].apply(eye) - wanted) < 1e-4 * largest(wanted)


@pytest.mark.parametrize("kind", ["full", "sampled", "diagonal"])
def test_weighted_positions_count_by_the_other_vector(kind: str) -> None:
    """C = Σ‖δ‖²zzᵀ / Σ‖δ‖², F in proportion to Σ‖z‖²δδᵀ, and tr C · tr F the mean of ‖z‖²‖δ‖²."""
    net, tokens = oracle_models.net(), [text(range(20)), text(range(30, 44))]
    rows = gather(net, tokens, Asked("sampled", "sampled", 10**6, 0.01), "test")
    found = gather(net, tokens, Asked(kind, kind, 10**6, 0.01, weighted=True), "test")
    for layer in range(LAYERS):
        z, slopes = (part[layer].values.double() for part in (rows.inputs, rows.outputs))
        sizes, steep = z.square().sum(dim=1), slopes.square().sum(dim=1)
        inputs, outputs = (z.T * steep) @ z / steep.sum(), (slopes.T * sizes) @ slopes
        outputs *= float((sizes * steep).mean() / inputs.trace() / outputs.trace())
        for one, wanted in ((found.inputs[layer], inputs), (found.outputs[layer], outputs)):
            got = one.values.double()
            got = got.T @ got / len(got) if kind == "sampled" else got
            wanted = wanted.diagonal() if kind == "diagonal" else wanted
            assert largest(got - wanted) < 1e-5 * largest(wanted)


def test_weighting_sees_a_position_that_little_reaches_and_much_depends_on() -> None:
    """As attention's resting place is: without, the cost of a change there is a hundredth of what it is."""
    rest, others = torch.zeros(4), torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    rest[0] = 0.01
    z = torch.cat([rest.expand(4, 4), others * torch.tensor([0.0, 1, 1, 1])])
    steep = torch.cat([torch.tensor([[1000.0, 0.0]]).expand(4, 2), others[:, 2:] @ torch.tensor([[0.0, 1], [0, 1]])])
    delta = torch.tensor([[1.0, 0.0], [0, 0], [0, 0], [0, 0]])
    true = float(((z @ delta) * steep).sum(dim=1).square().mean())

    def cost(weighted: bool) -> float:
        read = sums.Sums(None, [], {0: sums.Sum("full")}, {0: sums.Sum("full")}, None, None, None, weighted)  # type: ignore[arg-type]
        pair = read._weighted(0, z, steep) if weighted else (z, steep)
        kept = torch.zeros(len(z), dtype=torch.bool)
        read.inputs[0].add(pair[0], kept)
        read.outputs[0].add(pair[1], kept)
        read.at = len(z)
        found = read.statistics("test")
        return 2 * found.cost({0: delta}, {0: torch.arange(4)})

    assert cost(False) < true / 50
    assert true / 20 < cost(True) < 2 * true


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["full", "diagonal", "blocks", "sampled"])
def test_two_texts_joined_are_both_read_at_once(kind: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    z, steep = torch.randn(90, 6, generator=generator), torch.randn(90, 4, generator=generator)
    z[60:], steep[60:] = 3 * z[60:].exp(), 0.1 * steep[60:]

    def read(rows: slice) -> Statistics:
        widths = (2, 4) if kind == "blocks" else ()
        parts = {0: sums.Sum(kind, widths)}, {0: sums.Sum("full" if kind == "blocks" else kind)}
        made = sums.Sums(None, [], *parts, None, None, None, weighted)  # type: ignore[arg-type]
        pair = made._weighted(0, z[rows], steep[rows]) if weighted else (z[rows], steep[rows])
        kept = torch.ones(len(z[rows]), dtype=torch.bool)
        made.inputs[0].add(pair[0], kept)
        made.outputs[0].add(pair[1], kept)
        made.at = len(z[rows])
        return made.statistics("text")

    whole, both = read(slice(90)), joined(read(slice(60)), read(slice(60, 90)), weighted)
    assert both.tokens == 90
    for one, other in ((whole.inputs[0], both.inputs[0]), (whole.outputs[0], both.outputs[0])):
        wide = torch.eye(one.values.shape[-1])
        assert one.kind == other.kind
        assert torch.allclose(
            other.apply(wide), one.apply(wide), rtol=1e-4, atol=1e-4 * float(one.apply(wide).abs().max())
        )


def test_joined_texts_of_which_nothing_is_known_count_by_their_length() -> None:
    """Where no position has a gradient, weights would be nothing by nothing."""
    parts = [
        Statistics(
            {0: Moment("diagonal", torch.full((2,), value))}, {0: Moment("diagonal", torch.zeros(2))}, "text", count
        )
        for value, count in ((1.0, 30), (4.0, 10))
    ]
    both = joined(*parts, weighted=True)
    assert torch.allclose(both.inputs[0].values, torch.full((2,), 1.75))
    assert both.name == "text, text"


def test_none_keeps_the_scale_and_prefers_no_direction() -> None:
    net = oracle_models.net()
    tokens = [text(range(20))]
    full, none = (gather(net, tokens, Asked(kind, kind, 64, 0.01, True), "test") for kind in ("full", "none"))
    for one, other in ((full.inputs[1], none.inputs[1]), (full.outputs[1], none.outputs[1])):
        values = other.apply(torch.eye(len(other.values)))
        assert torch.equal(values, values[0, 0] * torch.eye(len(values)))
        assert float(values.trace()) == pytest.approx(float(one.values.trace()), rel=1e-5)


def test_where_no_gradient_counts_none_is_read_and_the_coefficients_are_the_same() -> None:
    net = oracle_models.net()
    tokens = [text(range(20)), text(range(5, 18))]
    both, alone = (gather(net, tokens, Asked("full", kind, 64, 0.01), "test") for kind in ("full", "none"))
    for layer, moment in both.inputs.items():
        assert torch.allclose(moment.values, alone.inputs[layer].values, rtol=1e-5)
        assert torch.equal(alone.outputs[layer].values, torch.ones(HIDDEN))
    asked = Asked("full", "none", 64, 0.01)
    began, after = (sums.Sums.of(net, tokens * 9, asked, 0) for _ in range(2))
    reading = began.read()
    next(reading)
    after.resume(began.state())
    assert 0 < after.done < len(after.batches)
    for one in (began, after):
        assert list(one.read())
    for layer, moment in began.statistics("").inputs.items():
        assert torch.equal(moment.values, after.statistics("").inputs[layer].values)


def test_auto_is_full_up_to_a_width_and_sampled_above(monkeypatch: pytest.MonkeyPatch) -> None:
    net = oracle_models.net()
    monkeypatch.setattr(sums, "FULL_WIDTH", HIDDEN)
    found = gather(net, [text(range(20))], Asked("auto", "auto", 7, 0.01), "test")
    assert {moment.kind for moment in found.inputs.values()} == {"sampled"}
    assert {moment.kind for moment in found.outputs.values()} == {"full"}


# --- what the cost means --------------------------------------------------------------------------


def drifted(net: Net, deltas: dict[int, Tensor], ids: Sequence[int]) -> float:
    """The KL on one text of changes layer → [m, d], nats per token."""
    twin = copy.deepcopy(net.model)
    for layer, delta in deltas.items():
        matrix = oracle._matrices(twin)[layer]
        matrix.weight += delta if type(matrix).__name__ == "Conv1D" else delta.T
    return oracle.drift(net.model, twin, [ids])[0]


def random_deltas(layers: Sequence[int], seed: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: 1e-3 * torch.randn(12, 8, generator=generator, dtype=torch.float64) for layer in layers}


def exact(net: Net, ids: Sequence[int]) -> Statistics:
    """C and F of one text with the expectation over all next tokens taken exactly."""
    chances = oracle.logits(net.model, ids)[:-1].softmax(1)
    outputs = [
        torch.einsum("tv,tvia,tvib->ab", chances, table, table) / len(chances)
        for table in oracle_minkl.slopes(net.model, ids)
    ]
    kept = [
        {layer: Moment("full", part.float()) for layer, part in enumerate(parts)}
        for parts in (oracle_minkl.inputs(net.model, [ids]), outputs)
    ]
    return Statistics(kept[0], kept[1], "exact", len(chances))


COLUMNS = {0: torch.arange(12), 1: torch.arange(12)}


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_cost_is_the_kl_where_nothing_is_approximated(kind: str, layer: int) -> None:
    """One layer and one prediction: C and F are then independent for certain; what is left is of third order."""
    net = small(kind)
    statistics = exact(net, TEXT[:2])
    for seed in range(20):
        deltas = random_deltas([layer], seed)
        expected = statistics.cost({layer: deltas[layer].float()}, COLUMNS)
        assert drifted(net, deltas, TEXT[:2]) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_the_fisher_before_it_is_factored_is_the_kl(kind: str) -> None:
    """½ E[(Σ_i δ_iᵀ Δ z_i)²] a token, over layers and positions: that the δ of a text's whole loss is the right one."""
    net = small(kind)
    chances = oracle.logits(net.model, LONG)[:-1].softmax(1)
    tables = oracle_minkl.slopes(net.model, LONG)
    _, z, _ = oracle_minkl.read(net.model, LONG)
    for seed in range(10):
        deltas = random_deltas([0, 1], seed)
        moved = sum(torch.einsum("tvid,id->tv", tables[layer], z[layer][:-1] @ deltas[layer]) for layer in (0, 1))
        expected = float((chances * moved**2).sum()) / len(chances) / 2
        assert drifted(net, deltas, LONG) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_the_cost_predicts_the_mean_kl_of_random_changes(kind: str, layers: tuple[int, ...]) -> None:
    """Within a factor of two for random changes on nine predictions, factored and layer by layer."""
    net = small(kind)
    statistics = exact(net, LONG)
    measured, expected = 0.0, 0.0
    for seed in range(20):
        deltas = random_deltas(layers, seed)
        measured += drifted(net, deltas, LONG)
        expected += statistics.cost({layer: delta.float() for layer, delta in deltas.items()}, COLUMNS)
    assert 0.5 < measured / expected < 2


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_gathered_statistics_predict_as_the_exact_ones(kind: str) -> None:
    net = small(kind)
    found, wanted = gather(net, [text(LONG)] * 1000, FULL, "test"), exact(net, LONG)
    for seed in range(10):
        deltas = {layer: delta.float() for layer, delta in random_deltas([0, 1], seed).items()}
        assert found.cost(deltas, COLUMNS) == pytest.approx(wanted.cost(deltas, COLUMNS), rel=0.1)


# --- text that the model writes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_sampled_text_follows_the_seed_and_touches_nothing(kind: str) -> None:
    net = oracle_models.net(kind)
    before, random = State.of(net), torch.random.get_rng_state()
    first, again, other = net.sample(5, 12), net.sample(5, 12), net.sample(5, 12, seed=1)
    assert first == again
    assert [item.target for item in first] != [item.target for item in other]
    assert len({item.target for item in first}) == 5
    for item in first:
        assert item.prompt == (net.tokenizer.bos_token_id,)
        assert len(item.target) == 12
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not before.changed(net)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
def test_half_of_the_text_goes_on_from_what_is_begun(kind: str) -> None:
    net = oracle_models.net(kind)
    begun = beginnings(net, 20)
    assert len({len(row) for row in begun}) == 1
    assert 1 < len(begun[0]) <= 8
    made, again = (net.sample(5, 20, begun=begun) for _ in range(2))
    assert made == again
    assert {len(item.target) for item in made} == {20}
    rows = [(*item.prompt, *item.target) for item in made]
    width = len(begun[0])
    assert [row[:width] for row in rows[3:]] == begun[:2]
    assert {row[0] for row in rows[:3]} == {net.tokenizer.bos_token_id}
    assert len({row[:width] for row in rows[:3]}) == 3
    assert len({row[width:] for row in rows}) == 5


def test_what_goes_on_from_a_beginning_is_drawn_from_the_models_own_distribution() -> None:
    net, count = small("llama"), 6000
    begun = (2, 0, 3)
    made = net.sample(count, 3, begun=[begun])[count // 2 :]
    chances = oracle.logits(net.model, begun)[-1].softmax(0)
    last = torch.bincount(torch.tensor([item.target[-1] for item in made]), minlength=WORDS).double() / len(made)
    assert bool(((last - chances).abs() < 5 * (chances * (1 - chances) / len(made)).sqrt()).all())


def test_beginnings_that_a_model_cannot_take_are_left_out() -> None:
    net = oracle_models.net()
    whole = beginnings(net, 200)
    assert beginnings(net, 3) == []
    assert {len(row) for row in beginnings(net, 6)} == {3}
    table = net.model.get_input_embeddings()
    most = max(max(row) for row in whole)
    table.weight = torch.nn.Parameter(table.weight[:most].clone())
    assert [row for row in whole if most not in row] == beginnings(net, 200) != whole


def test_sampled_text_ignores_the_models_own_settings() -> None:
    net = oracle_models.net()
    plain = net.sample(6, 20)
    net.model.generation_config = GenerationConfig(
        do_sample=False, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=5.0, max_length=3, num_beams=2,
        eos_token_id=list(range(60)), no_repeat_ngram_size=1, min_p=0.9, suppress_tokens=[5, 6, 7],
    )  # fmt: skip
    kept = net.model.generation_config
    assert net.sample(6, 20) == plain
    assert net.model.generation_config is kept


def test_sampled_text_is_drawn_from_the_models_own_distribution() -> None:
    """First tokens of 3000 texts against the chances; five standard errors. The end of a text does not stop it."""
    net, count = small("llama"), 3000
    made = net.sample(count, 6)
    assert {len(item.target) for item in made} == {6}
    assert any(net.tokenizer.eos_token_id in item.target[:-1] for item in made)
    chances = oracle.logits(net.model, made[0].prompt)[0].softmax(0)
    firsts = torch.bincount(torch.tensor([item.target[0] for item in made]), minlength=WORDS).double() / count
    assert bool(((firsts - chances).abs() < 5 * (chances * (1 - chances) / count).sqrt()).all())
    assert largest(chances - 1 / WORDS) > 0.05


def test_sampled_text_keeps_the_unlikely_tokens() -> None:
    """Beyond the fifty most likely ones, where a default of the library would cut."""
    net, count = oracle_models.net(), 3000
    made = net.sample(count, 1)
    chances = oracle.logits(net.model, made[0].prompt)[0].softmax(0)
    rare = chances.argsort(descending=True)[50:]
    share, firsts = float(chances[rare].sum()), torch.tensor([item.target[0] for item in made])
    assert share * count > 100
    assert abs(float(torch.isin(firsts, rare).double().mean()) - share) < 5 * (share * (1 - share) / count) ** 0.5


# --- the cache ------------------------------------------------------------------------------------

REFERENCE = Reference("mine", ("for i in range(10):\n    print(i)\n", "x = 1\n"))


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time that statistics are really gathered."""
    calls: list[str] = []
    real = module._gathered
    monkeypatch.setattr(module, "_gathered", lambda *given: calls.append("gathered") or real(*given))
    monkeypatch.setattr(module, "TEXTS", 3)
    monkeypatch.setattr(module, "LENGTH", 16)
    return calls


def packed(moment: Moment) -> Moment:
    """As it comes back from the disk."""
    return unpack(pack(moment))


def same(one: Statistics, other: Statistics, kept: Callable[[Moment], Moment] = lambda moment: moment) -> bool:
    """Bit for bit; ``kept``: what the other's moments are compared as."""
    parts = [(one.inputs, other.inputs), (one.outputs, other.outputs)]
    return (one.name, one.tokens) == (other.name, other.tokens) and all(
        a.keys() == b.keys() and all(a[layer].kind == b[layer].kind for layer in a)
        and all(torch.equal(a[layer].values, kept(b[layer]).values) for layer in a)
        for a, b in parts
    )  # fmt: skip


ASKED = Asked("sampled", "full", 20, 0.01)
ROWS = [Failure(f"def f{at}(x):\n", f"    return x + {at}\n", str(at)) for at in range(4)]


def test_what_is_kept_is_what_was_gathered(gathered: list[str], tmp_path: Path) -> None:
    net = oracle_models.net()
    for asked in (ASKED, FULL, Asked("none", "diagonal", 20, 0.01), Asked("auto", "none", 20, 0.01)):
        del gathered[:]
        first = statistics_of(net, asked, REFERENCE, cache=tmp_path)
        again = statistics_of(oracle_models.net(), asked, REFERENCE, cache=tmp_path)
        assert len(gathered) == 2, "the model's own text, and the reference"
        assert same(first, again)
    assert len(list(tmp_path.iterdir())) == 8
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


@pytest.mark.parametrize("happens", ["removed", "replaced"])
def test_what_is_read_later_is_what_was_there_when_it_was_checked(happens: str, tmp_path: Path) -> None:
    net = oracle_models.net()
    first = statistics_of(net, FULL, cache=tmp_path)
    known = {layer: (first.inputs[layer].values, first.outputs[layer].values) for layer in first.inputs}
    (path,) = tmp_path.iterdir()
    if happens == "removed":
        path.unlink()
    else:
        statistics_of(net, ASKED, cache=tmp_path)
        (other,) = set(tmp_path.iterdir()) - {path}
        other.replace(path)
    for layer, (inputs, outputs) in known.items():
        assert torch.equal(first.inputs[layer].values, inputs)
        assert torch.equal(first.outputs[layer].values, outputs)


def test_the_text_is_the_models_own_and_the_reference(gathered: list[str], tmp_path: Path) -> None:
    net = oracle_models.net()
    alone, more = statistics_of(net, FULL, cache=tmp_path), statistics_of(net, FULL, REFERENCE, cache=tmp_path)
    begun = beginnings(net, 16)
    own = net.sample(3, 16, begun=begun)
    assert len(begun) > 1
    assert alone.tokens == 3 * 16
    assert more.tokens == 3 * 16 + sum(len(item.target) for item in windows(net, REFERENCE.texts))
    assert "mine" in more.name
    assert same(alone, gather(net, own, FULL, alone.name), packed)
    given = statistics_of(net, FULL, REFERENCE, cache=tmp_path, own=0)
    assert given.name == "mine"
    assert same(given, gather(net, windows(net, REFERENCE.texts), FULL, "mine"), packed)
    assert same(more, joined(alone, given, False))
    fewer = statistics_of(net, FULL, REFERENCE, cache=tmp_path, own=1)
    one = gather(net, net.sample(1, 16, begun=begun), FULL, fewer.name.removesuffix(", mine"))
    assert same(fewer, joined(statistics_of(net, FULL, cache=tmp_path, own=1), given, False))
    assert same(statistics_of(net, FULL, cache=tmp_path, own=1), one, packed)
    assert len({item.name for item in (alone, more, fewer, given)}) == 4
    with pytest.raises(UsageError, match="expected 1 or more, or 0 beside other reference text"):
        statistics_of(net, FULL, cache=tmp_path, own=0)
    assert len(gathered) == 3, "own texts, fewer of them, and what is given: each once"


def test_rows_are_read_with_their_answers_as_far_as_there_is_room(
    gathered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = oracle_models.net()
    texts = [net.tokenizer(row.prompt + row.target)["input_ids"] for row in ROWS]
    tokens = [Tokens(str(at), tuple(ids[:1]), tuple(ids[1:])) for at, ids in enumerate(texts)]
    whole = statistics_of(net, FULL, ROWS, cache=tmp_path, own=0)
    assert whole.name == "4 of 4 rows"
    assert same(whole, gather(net, tokens, FULL, whole.name), packed)
    beside = statistics_of(net, FULL, ROWS, cache=tmp_path, own=1)
    assert beside.tokens == 16 + whole.tokens
    monkeypatch.setattr(texts_module, "ROOM", len(texts[0]) + len(texts[1]) - 2)
    first = statistics_of(net, FULL, ROWS, cache=tmp_path, own=0)
    assert first.name == "2 of 4 rows"
    assert same(first, gather(net, tokens[:2], FULL, first.name), packed)
    monkeypatch.setattr(texts_module, "WINDOW", 5)
    cut = statistics_of(net, FULL, ROWS[:1], cache=tmp_path, own=0)
    assert same(cut, gather(net, [Tokens("0", tokens[0].prompt, tokens[0].target[:4])], FULL, cut.name), packed)
    with pytest.raises(UsageError, match="0 texts of the model's own"):
        statistics_of(net, FULL, [], cache=tmp_path, own=0)


def test_prompts_alone_are_read_to_their_last_position(gathered: list[str], tmp_path: Path) -> None:
    """At which the answer begins: a token behind it is read for that, whichever it is."""
    net = oracle_models.net()
    rows = [replace(row, target="") for row in ROWS]
    ids = [net.tokenizer(row.prompt)["input_ids"] for row in rows]
    found = statistics_of(net, FULL, rows, cache=tmp_path, own=0)
    assert found.name == "4 of 4 requests in the failures' form"
    assert found.tokens == sum(map(len, ids))
    by_hand = [Tokens(str(at), (one[0],), (*one[1:], 5)) for at, one in enumerate(ids)]
    assert torch.equal(found.inputs[1].values, unpack(pack(gather(net, by_hand, FULL, "").inputs[1])).values)


def test_prompts_that_cannot_be_asked_are_left_out(gathered: list[str], tmp_path: Path) -> None:
    net = oracle_models.net()
    chat, long = Failure("", "", "chat", messages=({"role": "user", "content": "x"},)), Failure("x = 1; " * 3000, "")
    assert statistics_of(net, FULL, [chat, ROWS[0], long], cache=tmp_path).name.endswith("1 of 3 rows")
    assert same(statistics_of(net, FULL, [chat, long], cache=tmp_path), statistics_of(net, FULL, cache=tmp_path))


def test_anything_else_is_gathered_anew(gathered: list[str], tmp_path: Path) -> None:
    net = oracle_models.net()
    statistics_of(net, ASKED, REFERENCE, cache=tmp_path)
    other, patched = oracle_models.net(seed=1), oracle_models.net()
    patched.columns(2)[0, 0] += 1
    statistics_of(other, ASKED, REFERENCE, cache=tmp_path)
    statistics_of(patched, ASKED, REFERENCE, cache=tmp_path)
    statistics_of(oracle_models.net(dtype=torch.bfloat16), ASKED, REFERENCE, cache=tmp_path)
    statistics_of(net, ASKED, cache=tmp_path)
    statistics_of(net, ASKED, Reference("mine", ("another text\n",)), cache=tmp_path)  # of the same name
    statistics_of(net, ASKED, REFERENCE, seed=1, cache=tmp_path)
    statistics_of(net, Asked("sampled", "full", 21, 0.01), REFERENCE, cache=tmp_path)
    statistics_of(net, Asked("full", "full", 20, 0.01), REFERENCE, cache=tmp_path)
    statistics_of(net, Asked("sampled", "diagonal", 20, 0.01), REFERENCE, cache=tmp_path)
    # One of these ten asks for nothing new, one for a new text alone, eight for both.
    assert len(gathered) == len(list(tmp_path.iterdir())) == 17
    # Damping is added afterwards: no reason to read again.
    statistics_of(net, Asked("sampled", "full", 20, 0.5), REFERENCE, cache=tmp_path)
    assert len(gathered) == 17


def flip(at: float) -> Any:
    def change(data: bytes) -> bytes:
        place = min(len(data) - 1, int(len(data) * at))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return change


def forge(change: Any) -> Any:
    """A file whose digest fits: the record [dict] and tensors as ``change`` leaves them."""

    def made(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lmrepair"])
        change(record, tensors)
        if all(tensor.dim() for tensor in tensors.values()):
            record["digest"] = cache_module._digest(tensors)
        return safetensors.torch.save(tensors, {"lmrepair": json.dumps(record)})

    return made


def nan(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["inputs.1.rows"][0, 0] = torch.nan


DAMAGE: dict[str, Any] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut in the tensors": lambda data: data[:-40],
    "more bytes": lambda data: data + b"more",
    **{f"a bit at {at}": flip(at) for at in (0.0, 0.02, 0.05, 0.2, 0.5, 0.9, 1.0)},
    "text": lambda data: b"no statistics at all",
    "no metadata": lambda data: safetensors.torch.save(safetensors.torch.load(data)),
    "metadata of another kind": lambda data: safetensors.torch.save({}, {"lmrepair": "[1]"}),
    "metadata too deep": lambda data: safetensors.torch.save({}, {"lmrepair": "[" * 100_000}),
    "not a number": forge(nan),
    "infinite": forge(lambda _, tensors: tensors["outputs.0.diagonal"].fill_(torch.inf)),
    "of another width": forge(
        lambda _, tensors: tensors.update({"inputs.0.rows": torch.ones(20, WIDTH + 1).bfloat16()})
    ),
    "of another kind": forge(lambda _, tensors: tensors.update({"outputs.0.rows": torch.ones(3, HIDDEN).bfloat16()})),
    "of no dimension": forge(lambda _, tensors: tensors.update({"outputs.0.diagonal": torch.tensor(1.0)})),
    "of another type": forge(lambda _, tensors: tensors.update({"outputs.0.diagonal": torch.ones(HIDDEN).half()})),
    "a layer less": forge(
        lambda _, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("outputs.2.")]
    ),
    "a tensor more": forge(lambda _, tensors: tensors.update({"outputs.9.diagonal": torch.ones(3)})),
    "for something else": forge(lambda record, _: record.update(key="0" * 64)),
    "tokens that are no number": forge(lambda record, _: record.update(tokens="many")),
    "no tokens": forge(lambda record, _: record.pop("tokens")),
    "other numbers": lambda data: safetensors.torch.save(
        {**safetensors.torch.load(data), "outputs.0.diagonal": torch.ones(HIDDEN)}, dict(_metadata(data))
    ),
}


def _metadata(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes, Statistics]:
    """The name and the bytes of a file of statistics, and what it holds."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TEXTS", 3)
        patch.setattr(module, "LENGTH", 16)
        held = statistics_of(oracle_models.net(), ASKED, cache=folder)
    (path,) = folder.iterdir()
    return path.name, path.read_bytes(), held


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_right_is_made_anew(
    damage: str, sound: tuple[str, bytes, Statistics], gathered: list[str], tmp_path: Path
) -> None:
    net, (name, content, wanted) = oracle_models.net(), sound
    path = tmp_path / name
    path.write_bytes(DAMAGE[damage](content))
    assert path.read_bytes() != content
    assert same(statistics_of(net, ASKED, cache=tmp_path), wanted)
    assert len(gathered) == 1
    assert same(statistics_of(net, ASKED, cache=tmp_path), wanted)
    assert len(gathered) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["a file in the way", "a folder in the file's place"])
def test_statistics_that_cannot_be_kept_are_gathered_all_the_same(
    place: str, gathered: list[str], tmp_path: Path
) -> None:
    net = oracle_models.net()
    folder = tmp_path / "cache"
    wanted = statistics_of(net, ASKED, cache=tmp_path / "other")
    if place == "a file in the way":
        folder.write_text("no folder")
    else:
        (path,) = (tmp_path / "other").iterdir()
        (folder / path.name / "something").mkdir(parents=True)
    for count in (2, 3):
        assert same(statistics_of(net, ASKED, cache=folder), wanted)
        assert len(gathered) == count
    if folder.is_dir():
        assert [path.name for path in folder.iterdir()] == [path.name]  # no temporary file is left


def test_an_interrupted_write_leaves_nothing(
    gathered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmrepair.failures.files.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        statistics_of(oracle_models.net(), ASKED, cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(gathered) == 1


def test_where_statistics_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert cache_folder() == cache  # in the tests
    monkeypatch.delenv("LMREPAIR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lmrepair"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "lmrepair"
    monkeypatch.setenv("LMREPAIR_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_a_model_without_finite_logits_is_refused() -> None:
    """A half-precision overflow, say: nothing can be sampled from it, and the message says what to do."""
    net = oracle_models.net()
    tokens = net.tokenize(oracle_models.FAILURES)
    net.columns(1)[3] = float("nan")
    with pytest.raises(ModelError, match="first to write NaN or infinity is model.layers.1.mlp.*damaged"):
        net.sample(2, 4)
    with pytest.raises(ModelError, match="no finite numbers"):
        gather(net, tokens, Asked("full", "full", 8, 0.01), "own")


# --- in few bytes, and taken up again --------------------------------------------------------------


def test_packed_moments_keep_weak_directions_beside_strong_ones() -> None:
    """Neurons that differ a thousandfold in size: what is rounded are correlations, to 2^-15 at most half a step."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (3 * torch.rand(37, generator=generator) - 1.5)
    rows = torch.randn(200, 37, generator=generator) @ torch.randn(37, 37, generator=generator) * size
    rows[:, 5] = 0
    full = Moment("full", rows.T @ rows / 200)
    found, scale = packed(full).values, full.diagonal.sqrt()
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), full.diagonal)
    assert bool(((found - full.values).abs() <= 0.51 / 32767 * scale[:, None] * scale + 1e-12).all())
    undone = packed(full).inverse(0.01).apply(torch.eye(37))
    assert largest(undone - full.inverse(0.01).apply(torch.eye(37))) < 2e-2 * largest(undone)
    sampled = packed(Moment("sampled", rows)).values
    assert bool(((sampled - rows).abs() <= 2.0**-8 * rows.abs()).all())
    assert torch.equal(packed(Moment("diagonal", size)).values, size)


def test_the_file_is_small_and_its_size_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS", 2)
    said: list[str] = []
    net = oracle_models.net()
    statistics_of(net, FULL, cache=tmp_path, progress=lambda what, *_: said.append(what))
    (path,) = tmp_path.iterdir()
    announced = [what for what in said if "once for this model" in what]
    assert len(announced) == 1
    assert said[0] == announced[0]
    length = min(module.LENGTH, (net.anatomy.context or 0) - 1)
    assert f"{2 * length} tokens, 0 MB" in announced[0]
    numbers = sum(width * width + net.hidden**2 for width in net.widths)
    headers = 30_000
    assert path.stat().st_size - headers < 2 * 0.6 * numbers + 4 * sum(width + net.hidden for width in net.widths)


@pytest.mark.parametrize("when", range(4))
def test_a_run_that_was_cut_off_is_taken_up_again(when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While texts are written, or after some of them are read: the end is the same bit for bit, with less to do."""
    for name, value in (("TEXTS", 4), ("LENGTH", 16), ("PART_SECONDS", -1.0)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sums, "READ_AT_ONCE", 17)
    whole, reads = statistics_of(oracle_models.net(), ASKED, cache=tmp_path / "whole"), 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal reads
        if what == "statistics" and done == when:
            raise KeyboardInterrupt
        reads += what == "statistics"

    if when:
        with pytest.raises(KeyboardInterrupt):
            statistics_of(oracle_models.net(), ASKED, cache=tmp_path / "cut", progress=stop)
    else:
        real = sums.Sums.read
        with monkeypatch.context() as patch:
            patch.setattr(sums.Sums, "read", lambda self: iter(stop("statistics", 0, 4) or real(self)))
            with pytest.raises(KeyboardInterrupt):
                statistics_of(oracle_models.net(), ASKED, cache=tmp_path / "cut")
    (part,) = (tmp_path / "cut").iterdir()
    assert part.suffix == ".part"
    sampled: list[int] = []
    real_sample = Net.sample
    monkeypatch.setattr(Net, "sample", lambda *given: sampled.append(1) or real_sample(*given))
    when, reads = -1, 0
    assert same(statistics_of(oracle_models.net(), ASKED, cache=tmp_path / "cut", progress=stop), whole)
    assert not sampled
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".safetensors"]


def test_a_damaged_part_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS", 2)
    monkeypatch.setattr(module, "LENGTH", 16)
    wanted = statistics_of(oracle_models.net(), ASKED, cache=tmp_path / "one")
    (path,) = (tmp_path / "one").iterdir()
    (tmp_path / "two").mkdir()
    for content in (b"", b"text", path.read_bytes()[:-1]):
        (tmp_path / "two" / path.with_suffix(".part").name).write_bytes(content)
        assert same(statistics_of(oracle_models.net(), ASKED, cache=tmp_path / "two"), wanted)
        assert [left.suffix for left in (tmp_path / "two").iterdir()] == [".safetensors"]
        (tmp_path / "two" / path.name).unlink()

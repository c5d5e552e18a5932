"""Mixtures of experts of many families: where their neurons are, coefficients, gradients, repairs, reverts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mixtures
import oracle_models
import pytest
import torch
from factored import made_up
from mixtures import FAMILIES
from oracle_models import FAILURES, TEXT, State
from torch import Tensor, nn

from lmrepair import MinKl, ModelError, repair
from lmrepair.methods import Method
from lmrepair.methods.base import Problem, Step
from lmrepair.methods.maths.margins import Margins
from lmrepair.model import Trial, beside, put
from lmrepair.model.batches import Batch
from lmrepair.model.net import Net, settled
from lmrepair.model.statistics import gather, statistics_of, sums
from lmrepair.model.statistics.moments import Asked, Metric, Moment
from lmrepair.model.statistics.packing import pack, unpack


def by_autograd(net: Net, family: str) -> tuple[Batch, dict[str, Tensor]]:
    """Parameter → the gradient of the mean cross-entropy, as autograd gives it; and what was read."""
    (batch,) = net.batches(net.tokenize(FAILURES))
    names = [name for layer in range(net.layers) for name in mixtures.parameters(family, layer)]
    wanted = [net.model.get_parameter(name).requires_grad_() for name in names]
    with torch.enable_grad():
        output = net.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        logits = output.logits.reshape(-1, output.logits.shape[-1])[batch.rows]
        loss = torch.nn.functional.cross_entropy(logits, batch.wanted)
        made = dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))
    net.model.requires_grad_(False)
    return batch, made


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_weights(family: str) -> None:
    net = mixtures.net(family, dtype=torch.float64)
    before = State.of(net)
    batch, made = by_autograd(net, family)
    with settled(net.model):
        reading = net.read([batch], net.every_site())
    assert not before.changed(net)
    for layer in range(net.layers):
        names = mixtures.parameters(family, layer)
        wanted = torch.cat([mixtures.neuron_major(made[name]) for name in names])
        weights = torch.cat([mixtures.neuron_major(net.model.get_parameter(name).detach()) for name in names])
        assert torch.equal(net.columns(layer), weights)
        assert wanted.abs().max() > 0
        near = 1e-6 * float(wanted.abs().max())
        assert torch.allclose(reading.gradients[layer].double(), wanted, rtol=1e-4, atol=near)


@pytest.mark.parametrize("method", [oracle_models.bold_star(), MinKl()], ids=["star", "minkl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_repair_holds_and_is_taken_back_bit_for_bit(family: str, method: Method) -> None:
    net = mixtures.net(family, seed=int(family == "llama4"))
    before = State.of(net)
    asked = method.asks()
    known = gather(net, net.sample(2, 24), asked, "test") if asked else None
    found = repair(net, FAILURES[2:3], method, TEXT, statistics=known)
    assert found.repaired == 1, found.outcomes[0].reason
    assert found.patch is not None
    assert found.drift
    (tokens,) = [item.tokens for item in found.patch.items]
    assert net.generate([tokens]) == [tokens.target]
    assert before.changed(net)
    found.patch.revert(net)
    assert not before.changed(net)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_beside_the_weights_answers_as_the_one_in_them(family: str) -> None:
    net = mixtures.net(family, dtype=torch.float64)
    before = State.of(net)
    patch = made_up(net, FAILURES[:1])
    (batch,) = net.batches(net.tokenize(FAILURES))
    with settled(net.model), torch.no_grad():
        untouched = net.logits(batch)
        with beside(net, patch.changes):
            found = net.logits(batch)
        assert not before.changed(net)
        assert torch.equal(net.logits(batch), untouched)
        with Trial(net, patch.sites()):
            for layer, change in patch.changes.items():
                put(net, layer, change.columns, change.originals + change.deltas.double())
            wanted = net.logits(batch)
    assert float((wanted - untouched).abs().max()) > 0.01
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def by_explicit_loops(model: Any, ids: Sequence[int]) -> list[Tensor]:
    """Layer → what every column of every expert of a tiny Mixtral is multiplied by at each token of a text.

    The whole model by hand in the dtype of its weights: a loop over tokens and their experts, nothing shared.
    """
    config, weights = model.config, dict(model.named_parameters())
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    wide = config.hidden_size // heads
    states = weights["model.embed_tokens.weight"][list(ids)]
    steps = torch.arange(len(ids), dtype=states.dtype)
    turns = steps[:, None] / config.rope_parameters["rope_theta"] ** (torch.arange(0, wide, 2) / wide).to(states)
    found = []

    def norm(name: str, x: Tensor) -> Tensor:
        return weights[name] * x / (x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def turned(x: Tensor) -> Tensor:
        one, other = x[:, : wide // 2], x[:, wide // 2 :]
        return torch.cat([one * turns.cos() - other * turns.sin(), other * turns.cos() + one * turns.sin()], dim=1)

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        x = norm(f"{at}.input_layernorm.weight", states)
        q, k, v = (x @ weights[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv")
        mixed = []
        for head in range(heads):
            mine = slice(head * wide, (head + 1) * wide)
            theirs = slice(head * groups // heads * wide, (head * groups // heads + 1) * wide)
            scores = turned(q[:, mine]) @ turned(k[:, theirs]).T / wide**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf"))
            mixed.append(scores.softmax(dim=1) @ v[:, theirs])
        states = states + torch.cat(mixed, dim=1) @ weights[f"{at}.self_attn.o_proj.weight"].T
        x = norm(f"{at}.post_attention_layernorm.weight", states)
        down, both = weights[f"{at}.mlp.experts.down_proj"], weights[f"{at}.mlp.experts.gate_up_proj"]
        z = torch.zeros(len(ids), len(down), down.shape[2], dtype=x.dtype)
        for token in range(len(ids)):
            chances = (weights[f"{at}.mlp.gate.weight"] @ x[token]).softmax(dim=0)
            chosen = chances.argsort(descending=True)[: config.num_experts_per_tok].tolist()
            for expert in chosen:
                gate, up = (both[expert] @ x[token]).chunk(2)
                z[token, expert] = chances[expert] / chances[chosen].sum() * gate * gate.sigmoid() * up
                states[token] = states[token] + down[expert] @ z[token, expert]
        found.append(z.reshape(len(ids), -1))
    return found


def test_coefficients_and_moments_are_those_of_loops_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mixtures.net("mixtral", dtype=torch.float64)
    texts = net.sample(3, 30)
    with torch.no_grad(), net.watch([0, 1]) as watched:
        net.logits(net.batches(texts[:1])[0])
    told = [by_explicit_loops(net.model, text.ids) for text in texts]
    for layer in range(2):
        assert torch.allclose(
            watched.inputs[layer][0].double(), told[0][layer], rtol=1e-4, atol=1e-6
        )  # its router is float32
        assert ((told[0][layer].reshape(31, 4, 48) != 0).any(dim=2).sum(dim=1) == 2).all()
    monkeypatch.setattr(sums, "FULL_WIDTH", 100)
    known = gather(net, texts, Asked("auto", "full", 16, 0.01), "test")
    for layer in range(2):
        rows = torch.cat([one[layer][:-1] for one in told])
        dense = (rows.T @ rows / len(rows)) * torch.block_diag(*[torch.ones(48, 48)] * 4)
        moment = known.inputs[layer]
        assert (moment.kind, moment.widths) == ("blocks", (48,) * 4)
        x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        damped = dense + 0.01 * dense.diagonal().mean() * torch.eye(192)
        assert torch.allclose(moment.apply(x), x @ dense, rtol=1e-5, atol=1e-6)
        assert torch.allclose(moment.damped(x, 0.01), x @ damped, rtol=1e-5, atol=1e-6)
        wanted = x @ torch.linalg.inv(damped)
        near = 1e-4 * float(wanted.abs().max())
        assert torch.allclose(moment.inverse(0.01).double().apply(x), wanted, rtol=1e-3, atol=near)
        assert torch.allclose(moment.diagonal.double(), dense.diagonal(), rtol=1e-5)
        few = torch.tensor([0, 3, 50, 95, 96, 191])
        part = Metric.of(known, 0.01).restricted(layer, few)
        inner = dense[few][:, few]
        wanted = x[:, :6] @ torch.linalg.inv(inner + 0.01 * inner.diagonal().mean() * torch.eye(6))
        assert torch.allclose(part.double().apply(x[:, :6]), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        kept = unpack(pack(moment))
        assert (kept.kind, kept.widths) == (moment.kind, moment.widths)
        assert torch.equal(kept.diagonal, moment.diagonal)
        sizes = moment.diagonal.sqrt()
        off = (kept.values - moment.values).abs() / sizes
        assert float(off.max() / sizes.max()) < 2**-15


def test_an_expert_that_saw_nothing_is_taken_for_an_average_one() -> None:
    idle = Moment.of_blocks([torch.eye(3), torch.zeros(3, 3)])
    change = torch.eye(6)[[0, 5]]
    assert torch.allclose(idle.inverse(0.1).apply(change), change / torch.tensor([[1.05], [0.05]]))


@pytest.mark.parametrize(
    ("asked", "widths", "kind"),
    [
        ("auto", (2048,), "full"), ("auto", (2049,), "sampled"), ("full", (4096,), "full"),
        ("auto", (1024, 1024), "full"), ("auto", (1024,) * 8, "blocks"), ("auto", (768,) * 128, "diagonal"),
        ("full", (768,) * 128, "blocks"), ("sampled", (768,) * 128, "sampled"), ("none", (768,) * 128, "none"),
    ],
)  # fmt: skip
def test_how_the_moments_of_experts_are_kept(asked: str, widths: tuple[int, ...], kind: str) -> None:
    assert sums.kind_for(asked, widths) == kind


def test_statistics_in_blocks_are_kept_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "FULL_WIDTH", 100)
    net = mixtures.net("qwen2_moe")
    asked = Asked("auto", "full", 16, 0.01)
    made = statistics_of(net, asked, cache=tmp_path, own=1)
    monkeypatch.setattr(sums.Sums, "read", None)  # a second reading would fail
    again = statistics_of(net, asked, cache=tmp_path, own=1)
    assert made.inputs[1].widths == (24,) * 4 + (40,)
    assert torch.equal(made.inputs[1].values, again.inputs[1].values)


def test_a_repair_that_changes_the_routing_of_its_own_positions_is_solved_anew() -> None:
    """Layer 0's change sends positions of layer 1 to other experts; what is solved for next is read from these."""
    net = mixtures.net("mixtral", seed=1)
    known = gather(net, net.sample(2, 24), Asked("full", "full", 16, 0.01), "test")
    (tokens,) = net.tokenize(FAILURES[:1])
    readings: list[Tensor] = []

    def routes() -> Tensor:
        with torch.no_grad(), net.watch([1]) as watched:
            net.logits(net.batches([tokens])[0])
        return (watched.inputs[1][0].reshape(len(tokens.ids), 4, -1) != 0).any(dim=2)

    class Watching(MinKl):
        def solve(self, problem: Problem) -> Step:
            assert isinstance(problem.reading, Margins)
            readings.append(torch.stack([item.inputs[1] != 0 for item in problem.reading.factors]).any(dim=0))
            return super().solve(problem)

    before = routes()
    found = repair(net, FAILURES[:1], Watching(layers="1"), TEXT, statistics=known)
    assert found.repaired == 1
    assert found.patch is not None
    assert not torch.equal(routes(), before)
    assert len(readings) > 1
    used = [(one.reshape(len(one), 4, -1)).any(dim=2) for one in readings]
    assert torch.equal(used[0], before[: len(used[0])])
    assert any(not torch.equal(one, used[0]) for one in used[1:])


class Listed(nn.Module):
    """A mixture of experts in a list, as checkpoints with code of their own have it; shared expert and weights too."""

    def __init__(self, hidden: int = 32, width: int = 20, before: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, 6, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(hidden, width), "down": nn.Linear(width, hidden)}) for _ in range(6)
        )
        self.shared = nn.ModuleDict({"up": nn.Linear(hidden, 28), "down": nn.Linear(28, hidden)})
        self.before = before

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).sigmoid().topk(2)
        made = self.shared["down"](torch.nn.functional.gelu(self.shared["up"](flat))) * 0.5
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                weight = weights[token, place, None]
                given = flat[token] * weight if self.before else flat[token]
                out = expert["down"](torch.nn.functional.gelu(expert["up"](given)))
                made = made.index_add(0, token, out if self.before else out * weight)
        return made.reshape(x.shape), weights


class Unpacking(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)[0]
        return made


@pytest.mark.parametrize("before", [False, True])
def test_lists_of_experts_are_placed_and_read(before: bool) -> None:
    torch.manual_seed(0)
    model = oracle_models.model("llama", dtype=torch.float64)
    for block in model.model.layers:
        block.mlp = Unpacking(Listed(before=before)).double()
    model.requires_grad_(False)
    net = Net(model, oracle_models.tokenizer(), "listed")
    assert net.anatomy.names[0] == "model.layers.0.mlp"
    assert net.anatomy.ffns[0].widths == (20,) * 6 + (28,)
    assert net.anatomy.ffns[0].groups == ((6, 20), (1, 28))
    (batch,) = net.batches(net.tokenize(FAILURES))
    names = [f"model.layers.1.mlp.inner.experts.{at}.down.weight" for at in range(6)]
    names += ["model.layers.1.mlp.inner.shared.down.weight"]
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(net.logits(batch), batch.wanted)
        wanted = torch.cat([part.T for part in torch.autograd.grad(loss, weights)])
    model.requires_grad_(False)
    found = net.read([batch], net.every_site()).gradients[1].double()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_are_the_same_however_the_experts_are_run(family: str, dtype: torch.dtype) -> None:
    net = mixtures.net(family, dtype=dtype)
    (batch,) = net.batches(net.tokenize(FAILURES))
    found = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        net.model.set_experts_implementation(implementation)
        with torch.no_grad(), net.watch([0]) as watched:
            seen = net.logits(batch)
        with torch.no_grad():
            assert torch.equal(seen, net.logits(batch))
        found.append(watched.inputs[0])
    near = (1e-5 if dtype == torch.float32 else 3e-2) * float(found[0].abs().max())
    assert all(torch.allclose(one, found[0], rtol=0, atol=near) for one in found[1:])


class Normed(Listed):
    """What its experts put out goes through a norm of its own: no sum of coefficient × column."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made, weights = super().forward(x)
        return torch.nn.functional.layer_norm(made, made.shape[-1:]), weights


def test_experts_behind_a_norm_are_refused() -> None:
    torch.manual_seed(0)
    model = oracle_models.model("llama")
    for block in model.model.layers:
        block.mlp = Unpacking(Normed())
    with pytest.raises(ModelError, match="no experts whose outputs, times a weight, add up"):
        Net(model, oracle_models.tokenizer(), "normed")


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    net = mixtures.net("mixtral")
    before = State.of(net)
    (batch,) = net.batches(net.tokenize(FAILURES[:1]))
    router = net.model.model.layers[1].mlp.gate
    failing = router.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), net.watch([1]):
        net.logits(batch)
    failing.remove()
    assert not before.changed(net)
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_experts_with_a_norm_right_behind_them_are_placed_themselves() -> None:
    model = mixtures.model("mixtral", dtype=torch.float64)
    for block in model.model.layers:
        plain = block.mlp.forward
        block.mlp.forward = lambda x, plain=plain: torch.nn.functional.layer_norm(plain(x), x.shape[-1:])
    net = Net(model, oracle_models.tokenizer(), "normed")
    assert net.anatomy.names == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert not net.anatomy.ffns[0].dense
    (batch,) = net.batches(net.tokenize(FAILURES))
    weight = model.model.layers[1].mlp.experts.down_proj.requires_grad_()
    with torch.enable_grad():
        loss = torch.nn.functional.cross_entropy(net.logits(batch), batch.wanted)
        (wanted,) = torch.autograd.grad(loss, weight)
    model.requires_grad_(False)
    found = net.read([batch], net.every_site()).gradients[1].double()
    dense = mixtures.neuron_major(wanted)
    assert torch.allclose(found, dense, rtol=1e-4, atol=1e-6 * float(dense.abs().max()))

"""Side by side as alone: padding, equal prompts, rows that end early, the context's end, models that padding moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from oracle_models import net as tiny, tokenizer
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM

import lmrepair.model.writing as writing
from lmrepair import Net
from lmrepair.errors import NotFiniteError
from lmrepair.failures import Tokens
from lmrepair.model import settled
from lmrepair.model.writing import assured, greedy, padding_is_unseen, together, write

PROMPTS = [(0, 9, 12, 30, 41, 7), (0, 50), (0, 9, 12), (0, 50), (0, 33, 21, 8, 8, 8, 40, 12, 71, 5, 6)]


@pytest.fixture(params=["llama", "gpt2"])
def net(request: pytest.FixtureRequest) -> Net:
    return tiny(request.param)


def best(_: Sequence[int], logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def until(length: Callable[[int], int]) -> Callable[[int, list[int]], bool]:
    return lambda row, ids: len(ids) >= length(row)


def alone(net: Net, prompt: Sequence[int], length: int) -> list[int]:
    """Without cache and padding: the whole text is read again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(net.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("mixed", [True, False])
def test_rows_are_what_they_are_alone(net: Net, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert padding_is_unseen(net, PROMPTS[0])
    if not mixed:
        monkeypatch.setattr(writing, "padding_is_unseen", lambda *_: False)
    seen: list[tuple[int, int]] = []
    found = write(net, PROMPTS, 9, best, until(lambda row: 9 - 2 * row), lambda *done: seen.append(done))
    assert found == [alone(net, prompt, 9 - 2 * row) for row, prompt in enumerate(PROMPTS)]
    assert seen[-1] == (5, 5)
    assert len(seen) == (1 if mixed else 4)


def test_rows_that_have_ended_and_equal_prompts_cost_nothing(net: Net) -> None:
    sizes: list[tuple[int, ...]] = []
    handle = net.model.get_input_embeddings().register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    write(net, [(0, 50)] * 5, 4, best, until(lambda row: 4 if row == 2 else 1 + row % 2))
    handle.remove()
    assert sizes == [(1, 2), (3, 1), (1, 1), (1, 1)]


def test_what_padding_moves_runs_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny("gpt2")
    inner = net.model.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **named: object) -> object:
        held = named.get("past_key_values")
        first = held.get_seq_length() if held is not None else 0  # type: ignore[attr-defined]
        places = torch.arange(first, first + input_ids.shape[1])[None].expand_as(position_ids)
        return inner(input_ids=input_ids, position_ids=places, **named)

    monkeypatch.setattr(net.model, "forward", forward)
    assert not padding_is_unseen(net, PROMPTS[0])
    found = write(net, PROMPTS, 5, best, until(lambda _: 5))
    monkeypatch.undo()
    assert found == [alone(net, prompt, 5) for prompt in PROMPTS]


def test_groups_hold_what_fits() -> None:
    prompts = [(1,) * length for length in (5, 3, 3, 9, 4)]
    assert list(together(prompts, 4, None, True)) == [[1, 2, 4, 0, 3]]
    assert list(together(prompts, 4, None, False)) == [[1, 2], [4], [0], [3]]
    assert list(together(prompts, 4, 9, True)) == [[1, 2, 4, 0], [3]]
    assert [len(group) for group in together([(1,)] * 70, 4, None, True)] == [32, 32, 6]
    assert [len(group) for group in together([(1,) * 3000] * 3, 4, None, True)] == [1, 1, 1]
    assert list(together([], 4, None, True)) == []


def test_the_context_ends_what_is_written() -> None:
    net = tiny("gpt2")
    context = net.anatomy.context
    assert context is not None
    long = (0, *[5] * (context - 4))
    found = write(net, [long, (0, 50)], 9, best, until(lambda _: 9))
    assert [len(ids) for ids in found] == [3, 9]
    assert found[1] == alone(net, (0, 50), 9)


def test_logits_that_are_no_numbers_are_refused(net: Net) -> None:
    with torch.no_grad():
        net.columns(0)[0] = float("nan")
    with pytest.raises(NotFiniteError, match="no finite numbers"):
        write(net, PROMPTS, 3, best, until(lambda _: 3))


def test_layers_with_a_state_in_place_of_keys_run_side_by_side_too() -> None:
    config = Lfm2Config(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Net(Lfm2ForCausalLM(config).eval(), tokenizer())
    found = write(net, PROMPTS, 6, best, until(lambda row: 6 - row))
    assert found == [alone(net, prompt, 6 - row) for row, prompt in enumerate(PROMPTS)]
    tokens = [
        Tokens(str(row), prompt, tuple(text)) for row, (prompt, text) in enumerate(zip(PROMPTS, found, strict=True))
    ]
    net.model.generation_config.eos_token_id = None
    assert sure(net, tokens, False) == set()  # a state does not go on with several tokens
    assert greedy(net, tokens, until_wrong=True) == [item.target for item in tokens]


@pytest.mark.parametrize("until_wrong", [True, False])
def test_greedy_text_is_that_of_the_models_own_generation(
    net: Net, until_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed with padding, as alone: right and wrong targets, one that is ended by the model."""
    texts = [alone(net, prompt, 6) for prompt in PROMPTS]
    end = net.model.generation_config.eos_token_id = 123 if 123 in texts[4] else 54
    wrong = [(token + 1) % 90 for token in texts[1]]
    targets = [texts[0][:4], [texts[1][0], *wrong[1:5]], texts[2][:2], texts[3], texts[4]]
    tokens = [
        Tokens(str(at), prompt, tuple(one)) for at, (prompt, one) in enumerate(zip(PROMPTS, targets, strict=True))
    ]
    with settled(net.model):
        wanted = [net.generate([item])[0] for item in tokens]
    passes: list[int] = []
    monkeypatch.setattr(Net, "generate", lambda *_: pytest.fail("padding is unseen"))
    handle = net.model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = greedy(net, tokens, until_wrong)
    handle.remove()
    assert [one == item.target for one, item in zip(found, tokens, strict=True)] == [
        one == item.target for one, item in zip(wanted, tokens, strict=True)
    ]
    assert [found[at] for at in (0, 2, 3, 4)] == [wanted[at] for at in (0, 2, 3, 4)]
    assert found[1] == wanted[1][: 2 if until_wrong else 5]
    assert [len(found[at]) for at in (2, 4)] == ([1, 4] if end == 123 else [2, 6])
    written = [text for text, item in zip(found, tokens, strict=True) if text != item.target or not until_wrong]
    assert len(passes) == 3 + 2 * until_wrong + max(map(len, written))  # proof, prompt and draft, a pass a token
    assert until_wrong or len(passes) == 3 + 6


def test_a_draft_that_is_the_text_is_read_and_any_other_changes_nothing(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [tuple(alone(net, prompt, 6)) for prompt in PROMPTS]
    net.model.generation_config.eos_token_id = texts[4][3]
    tokens = [Tokens(str(at), prompt, (7,) * 6) for at, prompt in enumerate(PROMPTS)]
    wanted = greedy(net, tokens)
    assert wanted[4] == texts[4][: texts[4].index(texts[4][3]) + 1]
    for drafts in ([()] * 5, [text[:3] for text in wanted], [(*text[:2], 8, 8, 8, 8) for text in wanted], wanted):
        assert greedy(net, tokens, drafts=drafts) == wanted
    read: list[int] = []
    own = writing._greedy
    monkeypatch.setattr(
        writing, "_greedy", lambda net, rest, until: read.extend(int(t.id) for t in rest) or own(net, rest, until)
    )
    some = [text if at in (1, 4) else () for at, text in enumerate(wanted)]
    assert greedy(net, tokens, drafts=some) == wanted
    assert read == [0, 2, 3]


def greedy_tokens(net: Net) -> list[Tokens]:
    """The prompts with what the net writes behind them, of several lengths."""
    return [Tokens(str(at), prompt, tuple(alone(net, prompt, 7 - at))) for at, prompt in enumerate(PROMPTS)]


def sure(net: Net, tokens: Sequence[Tokens], mixed: bool) -> set[int]:
    with torch.inference_mode():
        return assured(net, tokens, mixed)


@pytest.mark.parametrize("at_once", [1 << 24, 0])
def test_wanted_text_is_read_some_tokens_a_pass(net: Net, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "LOGITS_AT_ONCE", at_once)
    tokens = greedy_tokens(net)
    net.model.generation_config.eos_token_id = None
    sizes: list[tuple[int, ...]] = []
    handle = net.model.get_input_embeddings().register_forward_hook(lambda _, given, __: sizes.append(given[0].shape))
    assert greedy(net, tokens, until_wrong=True) == [item.target for item in tokens]
    handle.remove()
    longest = max(map(len, PROMPTS))
    assert sizes[3:] == [(5, longest), *([(5, 6)] if at_once else [(5, 1)] * 6)]


def test_what_is_not_sure_to_be_written_is_written(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong token in front, in the middle, at the end; an end of the text in the middle; a near tie."""
    tokens = greedy_tokens(net)
    net.model.generation_config.eos_token_id = None
    assert sure(net, tokens, True) == sure(net, tokens, False) == {0, 1, 2, 3, 4}
    for at, place in enumerate((0, 2, 4)):
        ids = list(tokens[at].target)
        ids[place] = (ids[place] + 1) % 90
        tokens[at] = replace(tokens[at], target=tuple(ids))
    assert sure(net, tokens, True) == sure(net, tokens, False) == {3, 4}
    asked: list[str] = []
    own = net.generate
    monkeypatch.setattr(writing, "padding_is_unseen", lambda *_: False)
    monkeypatch.setattr(Net, "generate", lambda _, rest: asked.extend(item.id for item in rest) or own(rest))
    found = greedy(net, tokens, until_wrong=True)
    assert asked == ["0", "1", "2"]
    assert [text == item.target for text, item in zip(found, tokens, strict=True)] == [False] * 3 + [True] * 2
    net.model.generation_config.eos_token_id = tokens[3].target[1]
    assert 3 not in sure(net, tokens, False)
    net.model.generation_config.eos_token_id = tokens[4].target[-1]
    assert (4 in sure(net, tokens, False)) == (tokens[4].target[-1] not in tokens[4].target[:-1])


def test_a_lead_that_rounding_could_turn_is_not_sure(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = greedy_tokens(net)
    leads = []
    with torch.no_grad():
        for item in tokens:
            logits = net.model(torch.tensor([item.ids])).logits[0, len(item.prompt) - 1 : -1]
            best = logits.topk(2, dim=1).values
            leads.append(float((best[:, 0] - best[:, 1]).min()))
    net.model.generation_config.eos_token_id = None
    for between in sorted(leads):
        monkeypatch.setattr(writing, "_blur", lambda _, between=between: between + 1e-4)
        assert sure(net, tokens, True) == {row for row, lead in enumerate(leads) if lead > between + 1e-4}
    monkeypatch.undo()
    assert writing._blur(torch.tensor([1.0, -4.0])) == 4 * 64 * 2**-23
    assert writing._blur(torch.tensor([1.0, -4.0]).bfloat16()) == pytest.approx(4 * 2**-3.5)


@pytest.mark.parametrize("window", [3, 64])
def test_a_sliding_window_is_no_hindrance(window: int) -> None:
    config = MistralConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=window, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Net(MistralForCausalLM(config).eval(), tokenizer())
    tokens = greedy_tokens(net)
    net.model.generation_config.eos_token_id = None
    assert sure(net, tokens, False) == {0, 1, 2, 3, 4}


def test_one_length_and_what_padding_moves_are_left_to_the_models_own_generation(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Net, "generate", lambda _, tokens: asked.append(len(tokens)) or [(7,)] * len(tokens))
    several = [Tokens(str(at), prompt, (5,)) for at, prompt in enumerate(PROMPTS)]
    assert greedy(net, several[1:4:2]) == [(7,)] * 2  # of one length
    monkeypatch.setattr(writing, "padding_is_unseen", lambda *_: False)
    assert greedy(net, several) == [(7,)] * 5
    assert asked == [2, 5]

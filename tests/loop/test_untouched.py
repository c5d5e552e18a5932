"""The gate's reading of reference text: exact where it is all read, right where it stops early, and read once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import oracle_models
import pytest
import torch
from oracle_models import bold_star
from safetensors import safe_open
from safetensors.torch import load_file

from lmrepair import Gate, Net, Reference, Star, UsageError, repair
from lmrepair.loop import untouched as module
from lmrepair.loop.judge import Scaled
from lmrepair.loop.untouched import Untouched, bounds, undecided
from lmrepair.measure.drift import measure_drift
from lmrepair.model import CachedFile, fingerprint
from lmrepair.model.edit import Change

STAR = bold_star(learning_rate=0.1, epochs=100)
TEXT = Reference("code", ("for i in range(10):\n    print(i)\n" * 3, "select name from persons;", "ab"))
MORE = Reference("fox", ("the quick brown fox jumps over the lazy dog " * 2,))


def edit(net: Net, size: float = 0.05) -> Scaled:
    """Random changes of all neurons of two layers."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for layer in (0, 2):
        now = net.columns(layer).clone()
        noise = size * torch.randn(now.shape, generator=generator)
        changes[layer] = Change(torch.arange(len(now)), noise, now)
    return Scaled(changes, 1.0)


@pytest.mark.parametrize("kind", oracle_models.KINDS)
@pytest.mark.parametrize("full", [True, False])
def test_all_that_is_read_is_the_drift(kind: str, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one stage, or in several where the bound is so near that all of them are needed."""
    monkeypatch.setattr(module, "STAGES", (4, 9, 30, 256))
    net = oracle_models.net(kind)
    change = edit(net)
    wanted = {one.name: measure_drift(net, [change], one)[0] for one in (TEXT, MORE)}
    limit = sum(drift.kl for drift in wanted.values()) / 2
    monkeypatch.setattr(module, "LARGEST", 1e9)
    found = Untouched.of(net, [TEXT, MORE], full).measure(change, limit)
    assert list(found.kinds) == sorted(wanted, key=lambda name: -wanted[name].kl)
    for name, drift in found.kinds.items():
        assert drift.tokens == wanted[name].tokens
        assert drift.kl == pytest.approx(wanted[name].kl, rel=1e-4)
        assert drift.agreement == wanted[name].agreement
        assert drift.perplexity_after == pytest.approx(wanted[name].perplexity_after, rel=1e-5)
    both = [wanted["code"], wanted["fox"]]
    mean = sum(drift.kl * drift.tokens for drift in both) / sum(drift.tokens for drift in both)
    assert found.drift.kl == pytest.approx(mean, rel=1e-4)


def test_far_from_the_bound_few_positions_are_read_and_the_net_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAGES", (16, 256))
    net = oracle_models.net()
    read = Untouched.of(net, [TEXT, MORE])
    found = passes(monkeypatch)
    small = read.measure(edit(net, 1e-4), 0.1)
    few = small.drift.tokens
    assert few < 60 < sum(len(item.target) for _, item in read.texts)
    assert len(found) == 2  # without the edit and with it
    assert read.measure(edit(net, 10.0), 0.1).drift.tokens == few
    assert len(found) == 3
    assert read.measure(edit(net), math.inf).drift.tokens == few
    assert len(found) == 4


def test_what_is_no_number_is_decided() -> None:
    good, bad = torch.full((9,), 1e-5), torch.tensor([0.1, math.nan])
    assert undecided([good, good], [90, 90], 0.1) == ()
    assert undecided([good, bad], [90, 90], 0.1) == ()
    assert undecided([good, torch.empty(0)], [90, 90], 0.1) == (1,)
    assert all(math.isnan(end) for end in bounds(bad, 1.0))


def test_what_is_read_whole_is_decided() -> None:
    """Of a kind without unread positions the mean is known; the more is unread, the wider the bound."""
    values = torch.tensor([0.0, 0.0, 0.3, 0.06], dtype=torch.float64)
    assert undecided([values], [4], 0.1) == ()
    assert undecided([values], [5], 0.1) == (0,)
    mean, spread = 0.09, math.sqrt(sum((value - 0.09) ** 2 for value in values.tolist()) / 3)
    low, high = bounds(values, 0.5, 0.25)
    off = 4 * spread * math.sqrt(0.25 / 4) + 4 * 0.25 * 0.5 / 4
    assert (low, high) == (pytest.approx(mean - off), pytest.approx(mean + off))


def test_only_kinds_that_are_open_are_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all counts each kind as if it had been read as far as the one read furthest."""
    monkeypatch.setattr(module, "STAGES", (5, 9, 256))
    net = oracle_models.net()
    change = edit(net)
    long = Reference("long", tuple(f"for i in range({n}):\n    print(i)\n" for n in range(9)))
    near = measure_drift(net, [change], long)[0].kl
    monkeypatch.setattr(module, "LARGEST", 0.0)
    monkeypatch.setattr(module, "ERRORS", 0.0)
    monkeypatch.setattr(module, "undecided", lambda kls, whole, limit: (1,) if len(kls[1]) < whole[1] else ())
    read = Untouched.of(net, [long, MORE])
    found = read.measure(change, near)
    assert (found.kinds["long"].tokens, found.kinds["fox"].tokens) == (36, measure_drift(net, [change], MORE)[0].tokens)
    counts = [sum(len(item.target) for kind, item in read.texts if kind == one) for one in (0, 1)]
    kls = [found.kinds[name].kl for name in ("long", "fox")]
    mean = sum(count * kl for count, kl in zip(counts, kls, strict=True)) / sum(counts)
    assert found.drift.kl == pytest.approx(mean, rel=1e-6)
    assert found.drift.tokens == found.kinds["long"].tokens + found.kinds["fox"].tokens


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass that reads states."""
    found: list[int] = []
    real = Net.logits_and_states
    monkeypatch.setattr(Net, "logits_and_states", lambda *given, **named: found.append(1) or real(*given, **named))
    return found


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMREPAIR_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("full", [True, False])
def test_a_later_run_finds_the_states_on_the_disk(full: bool, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    net = oracle_models.net()
    named, change = fingerprint(net, {}), edit(net)
    first = Untouched.of(net, [TEXT, MORE], full, named).measure(change)
    again, read = Untouched.of(net, [TEXT, MORE], full, named), passes(monkeypatch)
    assert again.measure(change) == first
    assert len(read) == 1  # with the edit alone
    assert len(list(own_cache.glob("untouched-*"))) == 1


def test_states_of_something_else_are_not_taken(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Other texts, other weights, another way to run them, other threads: each has a file of its own."""
    net = oracle_models.net()
    Untouched.of(net, [TEXT], model=fingerprint(net, {})).measure(edit(net))
    read = passes(monkeypatch)
    with edit(net).on(net):
        moved = fingerprint(net, {})
        other = Untouched.of(net, [TEXT], model=moved).measure(edit(net, 0.0))
    assert (other.drift.kl, len(read)) == (0.0, 3)  # the head's form, without the edit and with it
    Untouched.of(net, [MORE], model=fingerprint(net, {})).measure(edit(net))
    assert len(read) == 6
    net.model.config.rope_theta = 123.0
    Untouched.of(net, [TEXT], model=fingerprint(net, {})).measure(edit(net))
    assert len(read) == 9
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    Untouched.of(net, [TEXT], model=fingerprint(net, {})).measure(edit(net))
    assert (len(read), len(list(own_cache.glob("untouched-*")))) == (12, 5)


@pytest.mark.parametrize("damage", ["cut off", "a byte", "no number", "too few", "another name"])
def test_damaged_states_are_read_anew(damage: str, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    net = oracle_models.net()
    named, change = fingerprint(net, {}), edit(net)
    wanted = Untouched.of(net, [TEXT], model=named).measure(change)
    (path,) = own_cache.glob("untouched-*")
    raw = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "a byte":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    else:
        states = load_file(path)["states"]
        states = {"no number": states * math.nan, "too few": states[1:], "another name": states}[damage]
        with safe_open(path, "pt") as file:
            key = json.loads(file.metadata()["lmrepair"])["key"]
        CachedFile(path, key).write({"states" if damage != "another name" else "state": states}, {})
    read = passes(monkeypatch)
    assert Untouched.of(net, [TEXT], model=named).measure(change) == wanted
    assert len(read) == 3
    assert path.read_bytes() == raw  # mended


def test_without_a_folder_to_keep_them_in_nothing_is_kept_or_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LMREPAIR_CACHE", str(tmp_path / "file" / "cache"))
    net = oracle_models.net()
    for _ in range(2):
        read = Untouched.of(net, [TEXT], model=fingerprint(net, {}))
        assert read.measure(edit(net)) == Untouched.of(net, [TEXT]).measure(edit(net))
    assert not caplog.records


HEAVY = {
    "log-normal, sigma 1": lambda x: torch.exp(x) / math.exp(0.5),
    "log-normal, sigma 2": lambda x: torch.exp(2 * x) / math.exp(2.0),
    "squares": lambda x: x**2,
    "one in ten": lambda x: 10.0 * (x > 1.2816),
}


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize("positions", [15, 47])
def test_the_bound_errs_rarely_on_heavy_tails(name: str, positions: int) -> None:
    """A fifth from the limit at most 1 of 100 is decided wrongly, at a hundredth of it 95 are decided at once.

    Thirteen kinds: the worst has a mean of one, the others of 0.3.
    """
    draws = torch.randn(300, 13, positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tables = HEAVY[name](draws)
    tables[:, 1:] *= 0.3
    wrong = at_once = 0
    for table in tables:
        largest = float(table.max())
        ends = [bounds(kind, largest) for kind in table]
        wrong += all(high <= 1 / 1.2 for _, high in ends) or any(low > 1.2 for low, _ in ends)
        at_once += undecided(list(table), [10**9] * 13, 100.0) == ()
    assert wrong <= 3
    assert at_once >= 285


@pytest.mark.parametrize("drift", ["quick", "full"])
def test_the_gate_and_the_record_share_one_measurement(drift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = Untouched.measure
    monkeypatch.setattr(Untouched, "measure", lambda *given: made.append(1) or real(*given))
    net = oracle_models.net()
    result = repair(net, oracle_models.FAILURES[:1], STAR, TEXT, gate=Gate(1e6), drift=drift)
    assert result.patch is not None
    assert result.gate is not None
    assert len(made) == 1
    assert result.drift is not None
    assert result.gate.kl == {"code": result.drift.kl}
    assert result.patch.made.drift["tokens"] == result.drift.tokens
    result.patch.revert(net)
    (wanted,) = measure_drift(net, [result.patch], TEXT)
    assert (result.drift.tokens < wanted.tokens) == (drift == "quick")
    if drift == "full":
        assert result.drift.kl == pytest.approx(wanted.kl, rel=1e-4)
    with pytest.raises(UsageError, match="'quick'"):
        repair(net, oracle_models.FAILURES[:1], Star(), TEXT, drift="all")

"""The grid of a bench: a TOML file read, checked key by key, and unfolded into cells. Imports no torch.

docs/bench.md describes the format.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lmrepair.bench.toml_table import Table, kind_name
from lmrepair.errors import UsageError, nearest
from lmrepair.failures import Template, shipped
from lmrepair.methods import METHODS, Method, Targeting, method_named

KINDS = ("alone", "together", "cumulative", "sparsity", "grid")
FORMATS = ("failures", "grid")
PROMPT = "prompt"  # the yardstick that puts the answer into the prompt: no weights change
EMBEDDED = "embedded"
TARGETING = ("layers", "pattern", "share")
# Keys that came later: where they say nothing, a cell is made from what it was made from before they came.
ABSENT = (("method", "statistics", None), ("method", "own_texts", None), ("method", "prefixes", 0),
          ("data", "chat", False), ("data", "end_turn", True))  # fmt: skip
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """A model under a short name: a folder (relative), a hub name, or "embedded"."""

    name: str
    path: str
    dtype: str = "auto"


@dataclass(frozen=True)
class DataSpec:
    """A task under a short name: its failures, the template of its prompts, and held-out rows of it.

    ``chat`` asks every prompt as a user's turn; without ``end_turn``, targets of chats stop before the turn's end.
    """

    name: str
    file: str
    template: str | None = None
    heldout: str | None = None
    format: str = "failures"
    chat: bool = False
    end_turn: bool = True


@dataclass(frozen=True)
class DriftSpec:
    """Reference text of one kind: a file (relative) or "embedded", and how many tokens of it are read."""

    kind: str
    file: str = EMBEDDED
    tokens: int = 2048
    template: str | None = None


@dataclass(frozen=True)
class MethodSpec:
    """A repair method as the grid sets it up, under the name that tables show; or the prompt yardstick."""

    name: str
    method: str
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None  # a file of reference text, gathered beside the model's own
    own_texts: int | None = None  # how many texts the model writes for its statistics
    prefixes: int = 0  # texts of the model's own, each solved for before every prompt (alone and together)

    def build(self, targeting: Mapping[str, str], seed: int) -> Method | None:
        """The method with a study's targeting; None for the prompt yardstick. Raises UsageError."""
        if self.method == PROMPT:
            return None
        settings = {**self.settings, **targeting}
        if "seed" in METHODS[self.method].__dataclass_fields__ and "seed" not in settings:
            settings["seed"] = seed
        return method_named(self.method, self.preset, **settings)


@dataclass(frozen=True)
class Measures:
    """What is measured beside the failures: how many held-out rows and look-alike neighbours; of a cumulative
    curve a point ``every`` so many repairs, and one joint solve beside it for up to ``joint`` failures."""

    heldout: int = 20
    neighbours: int = 5
    every: int = 10
    joint: int = 50


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: everything that decides its figures, but for the machine it runs on."""

    study: str
    model: ModelSpec
    data: DataSpec
    method: MethodSpec
    targeting: Mapping[str, str]
    seed: int
    failing: int | None
    measures: Measures
    drift: tuple[DriftSpec, ...]

    @property
    def name(self) -> str:
        """The cell's name: that of its file, without the ending."""
        parts = [self.study, self.model.name, self.data.name, self.method.name]
        parts += [f"{key}-{value}" for key, value in self.targeting.items()]
        parts.append(f"seed-{self.seed}")
        return ".".join(re.sub(r"[^\w=-]+", "_", part.replace("/", "_of_")) for part in parts)

    def config(self) -> dict[str, Any]:
        """The full configuration as plain values, with every setting of the method."""
        built = self.method.build(self.targeting, self.seed)
        made = {**asdict(self), "targeting": dict(self.targeting)}
        made["method"] = {**made["method"], "settings": built.settings() if built else {}}
        for part, key, absent in ABSENT:
            if made[part][key] == absent:
                del made[part][key]
        made["drift"] = [asdict(spec) for spec in self.drift]
        return made


@dataclass(frozen=True)
class Job:
    """A cell with the folders and the device of the machine that measures it. ``threads`` 0: torch's default.

    ``known``: what an earlier run has left of its first rows; empty: nothing.
    """

    cell: Cell
    models: Path
    data: Path
    device: str = "auto"
    threads: int = 0
    known: Mapping[str, Any] = field(default_factory=dict)

    def model_source(self) -> str | None:
        """What ``load`` takes: None for the embedded model, a folder or a file below ``models``, or a hub name."""
        path = self.cell.model.path
        if path == EMBEDDED:
            return None
        return str(self.models / path) if (self.models / path).exists() else path

    def data_file(self, name: str, embedded: str) -> Path:
        """A file of the grid below ``data``, or the one that ships."""
        return shipped(embedded) if name == EMBEDDED else self.data / name


@dataclass(frozen=True)
class BenchGrid:
    """A grid file: its name and its cells, in the order of its studies."""

    name: str
    cells: tuple[Cell, ...]


def read_grid(path: str | Path) -> BenchGrid:
    """Read a grid and unfold its cells. Raises UsageError that says where, what was found and expected."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            top = Table(tomllib.load(file), path.name)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; expected a grid in TOML (docs/bench.md)") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: broken TOML ({error})") from error
    name = top.text("name", path.stem)
    seeds = top.listed("seeds", int, [0])
    measures = _measures(Table(top.take("measure", dict, {}), f"{path.name}, measure"))
    models = _named([_model(table) for table in top.tables("models")], "models", path)
    data = _named([_data(table) for table in top.tables("data")], "data", path)
    methods = _named([_method(table) for table in top.tables("methods")], "methods", path)
    drift = tuple(_drift(table) for table in top.tables("drift", needed=False))
    if len({spec.kind for spec in drift}) < len(drift):
        raise UsageError(f"{path.name}: drift names one kind twice; expected one table a kind")
    cells: list[Cell] = []
    for table in top.tables("studies"):
        cells += _study(table, (models, data, methods), seeds, measures, drift)
    top.done()
    twice = [cell.name for number, cell in enumerate(cells) if cell.name in {c.name for c in cells[:number]}]
    if twice:
        raise UsageError(f"{path.name}: two studies hold the cell {twice[0]!r}; expected each cell once")
    return BenchGrid(name, tuple(cells))


def _study(
    table: Table,
    specs: tuple[dict[str, ModelSpec], dict[str, DataSpec], dict[str, MethodSpec]],
    seeds: Sequence[int],
    measures: Measures,
    drift: tuple[DriftSpec, ...],
) -> list[Cell]:
    kind = table.text("kind", choices=KINDS, needed=True)
    failing = table.count("failing", None, least=1)
    models, data, methods = specs
    fits = {name: spec for name, spec in data.items() if (spec.format == "grid") == (kind == "grid")}
    chosen = (_chosen(table, "models", models), _chosen(table, "data", fits), _chosen(table, "methods", methods))
    if not chosen[1]:
        raise UsageError(f"{table.where}: no data for it; a study of kind 'grid' needs data with format = \"grid\"")
    own = table.listed("seeds", int, seeds)
    axes = {key: table.listed(key, str) for key in TARGETING}
    table.done()
    if kind == "sparsity" and not any(axes.values()):
        raise UsageError(f"{table.where}: a sparsity study without targeting; expected layers, pattern or share")
    named = [[(key, value) for value in values] for key, values in axes.items() if values]
    cells = []
    for model, task, method, seed in itertools.product(*chosen, own):
        for pairs in itertools.product(*named):
            if method.method == PROMPT and (kind != "alone" or pairs):
                raise UsageError(
                    f"{table.where}: {method.name!r} changes no weights; it fits in a study of kind 'alone' only: "
                    "list the methods of this study without it"
                )
            cell = Cell(kind, model, task, method, dict(pairs), seed, failing, measures, drift)
            _checked(cell, table.where)
            cells.append(cell)
    return cells


def _checked(cell: Cell, where: str) -> None:
    """Find out now, not after hours, that a method does not take its settings."""
    try:
        built = cell.method.build(cell.targeting, cell.seed)
        if built is not None:
            Targeting(**{key: getattr(built, key) for key in TARGETING if hasattr(built, key)}).check()
    except UsageError as error:
        raise UsageError(f"{where}, method {cell.method.name!r}: {error}") from error


def _chosen(table: Table, key: str, known: Mapping[str, Any]) -> list[Any]:
    names = table.listed(key, str, list(known))
    for name in names:
        if name not in known:
            raise UsageError(f"{table.where}: {key} names {name!r}; {nearest(name, known)}")
    return [known[name] for name in names]


def _named(specs: Sequence[Any], key: str, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for spec in specs:
        if spec.name in found:
            raise UsageError(f"{path.name}: {key} has {spec.name!r} twice; expected names that differ")
        found[spec.name] = spec
    return found


def _model(table: Table) -> ModelSpec:
    name = table.text("name", needed=True)
    spec = ModelSpec(name, table.path("path", name), table.text("dtype", "auto", DTYPES))
    table.done()
    return spec


def _data(table: Table) -> DataSpec:
    name = table.text("name", needed=True)
    template = table.text("template")
    if template is not None:
        Template.parse(template)
    spec = DataSpec(
        name,
        table.path("file", needed=True),
        template,
        table.path("heldout"),
        table.text("format", "failures", FORMATS),
        table.take("chat", bool, False),
        table.take("end_turn", bool, True),
    )
    table.done()
    if spec.format == "grid" and (spec.template or spec.heldout or spec.chat or not spec.end_turn):
        raise UsageError(f"{table.where}: a grid of knowledge and wordings has no template, chats and held-out rows")
    return spec


def _drift(table: Table) -> DriftSpec:
    kind = table.text("kind", needed=True)
    if not re.fullmatch(r"[\w -]+", kind):
        raise UsageError(f"{table.where}: kind is {kind!r}; expected letters, digits, spaces, - and _")
    spec = DriftSpec(kind, table.path("file", EMBEDDED), table.count("tokens", 2048, least=16), table.text("template"))
    table.done()
    if spec.template:
        Template.parse(spec.template)
    return spec


def _method(table: Table) -> MethodSpec:
    name = table.text("name", needed=True)
    known = (*METHODS, PROMPT)
    method = table.text("method", name)
    if method not in known:
        raise UsageError(f"{table.where}: unknown method {method!r}; {nearest(method, known)}")
    preset, settings = table.text("preset"), table.take("settings", dict, {})
    statistics, own = table.text("statistics"), table.take("own_texts", int, None)
    prefixes = table.count("prefixes", 0)
    table.done()
    if method != PROMPT:
        _check_settings(settings, METHODS[method], f"{table.where}, settings")
    if method == PROMPT and (preset or settings or prefixes):
        raise UsageError(f"{table.where}: the prompt yardstick has no settings; leave preset, settings, prefixes out")
    if (statistics or own is not None) and (
        method == PROMPT or method_named(method, preset, **settings).asks() is None
    ):
        raise UsageError(f"{table.where}: {method!r} reads no reference text; leave statistics and own_texts out")
    if own is not None and own < (statistics is None):
        raise UsageError(f"{table.where}: own_texts is {own}; expected 1 or more, or 0 beside statistics")
    return MethodSpec(name, method, preset, settings, statistics, own, prefixes)


def _check_settings(settings: Mapping[str, Any], method: type[Method], where: str) -> None:
    """The settings have the kinds of the method's fields; a whole number may stand for a number."""
    known = {spec.name: spec.default for spec in fields(method)}
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"{where}: method {method.name!r} has no setting {key!r}; {nearest(key, known)}")
        kind = type(known[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UsageError(f"{where}: {key} is {value!r}; expected {kind_name(kind)}, as in {known[key]!r}")


def _measures(table: Table) -> Measures:
    default = Measures()
    spec = Measures(
        table.count("heldout", default.heldout),
        table.count("neighbours", default.neighbours),
        table.count("every", default.every, least=1),
        table.count("joint", default.joint),
    )
    table.done()
    return spec

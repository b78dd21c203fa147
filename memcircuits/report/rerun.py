"""How to make a ranking and its report again: a shell command, and the same in Python.

A ranking's provenance holds every option that decides its numbers. `settings` lists them once, in
one table; each row says how Python writes the option and how the command line writes it. `commands`
joins the rows. The shell command is left out if one of the rows has no option on the command line,
because that command would make another ranking.

What a provenance cannot know is written `FILE` (or `PAIRS`, of texts that were given in Python):
where the paragraphs, the controls and the token counts are, unless they are those of the package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from memcircuits.base.statistics import DRAWS
from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import COUNTED_HERE, UnigramTable
from memcircuits.models.loading import SHIPPED_MODELS

if TYPE_CHECKING:
    from memcircuits.evidence.ranking import Ranking

Call = Literal["load", "read", "read paragraphs", "read control", "find"]
"""The Python call that takes a setting: `load_model`, `Paragraphs.read` (every call of it, or that
of one file), the ranking itself."""


class Setting(NamedTuple):
    """One setting of a ranking, as Python and as the command line write it.

    Attributes:
        call: the Python call that takes it.
        python: its argument there; empty if the default says the same.
        shell: its words on the command line; empty if the default says the same, None if the
            command line has no such option.
    """

    call: Call
    python: str
    shell: Sequence[str] | None


def commands(ranking: Ranking) -> list[str]:
    """Lines that make the ranking and its report again, for the shell if it can, and in Python."""
    table = settings(ranking)
    python = _python(ranking, table)
    words = ["memcircuits", "heads"]
    for setting in table:
        if setting.shell is None:
            return python
        words += setting.shell
    return [shlex.join(words), "", *python]


def settings(ranking: Ranking) -> list[Setting]:
    """Every option that decides the numbers of a ranking."""
    options, model = ranking.provenance.options, ranking.provenance.model
    lengths = {"n_prefix": ranking.n_prefix, "n_continuation": ranking.memorized.n_continuation}
    n_measured, draws = options["max_paragraphs"], options["draws"]
    match_nll = options.get("match_nll", False)  # absent from older rankings
    return [
        Setting("load", repr(model["name"]), _unless("organism", "--model", model["name"])),
        _keyword("load", "revision", model["revision"], default=None),
        _keyword("load", "dtype", model["dtype"], default="float32"),
        Setting("load", "", None if _is_folded(ranking) else ()),
        Setting("find", "", () if _has_shipped_paragraphs(ranking) else ("--paragraphs", "FILE")),
        *(_keyword("read", name, value, default=50) for name, value in lengths.items()),
        _bos(ranking),
        *_reading(ranking),
        _units(ranking.units),
        _control(options["control"]),
        # Absent from older rankings:
        _keyword("find", "control_text", options.get("control_text", "true"), default="true"),
        _keyword("find", "score", options.get("score", "effect"), default="effect"),
        _unigrams(options["unigrams"], model["name"]),
        _keyword("find", "mode", options["mode"]),
        _keyword("find", "method", options["method"]),
        _keyword("find", "max_paragraphs", n_measured, in_shell=n_measured is not None),
        Setting("find", f"match_nll={match_nll}", ("--match-nll",) if match_nll else ()),
        Setting("find", f"draws={draws}", () if draws == DRAWS else None),
        _keyword("find", "seed", options["seed"]),
    ]


_ALWAYS = object()  # no default: the setting is always written


def _keyword(
    call: Call, name: str, value: object, *, default: object = _ALWAYS, in_shell: bool = True
) -> Setting:
    if value == default:
        return Setting(call, "", ())
    words = (f"--{name.replace('_', '-')}", str(value))
    return Setting(call, f"{name}={value!r}", words if in_shell else None)


def _unless(default: str, option: str, value: str) -> tuple[str, ...]:
    return () if value == default else (option, value)


def _bos(ranking: Ranking) -> Setting:
    """The tokens in front, unless they are what the model's tokenizer puts there by default."""
    default = tuple(ranking.provenance.model.get("bos", ranking.bos))  # absent from older rankings
    if ranking.bos == default:
        return Setting("read", "", ())
    is_given = bool(ranking.bos)
    return Setting("read", f"bos={is_given}", ("--bos", "yes" if is_given else "no"))


def _reading(ranking: Ranking) -> list[Setting]:
    """How texts were read; the command line reads controls alike, and pairs as one text."""
    paragraphs, control = map(ranking.provenance.reading_options, ("paragraphs", "control"))
    words = [word for name, value in paragraphs.items() for word in _words(name, value)]
    is_possible = paragraphs == control and "align" not in paragraphs
    return [
        Setting("read paragraphs", _arguments(paragraphs), words if is_possible else None),
        Setting("read control", _arguments(control), ()),
    ]


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _words(name: str, value: Any) -> list[str]:
    if name == "strict":  # commands skip rows that cannot be used by default
        return []
    if name != "columns":
        return [f"--{name}", str(value)]
    return [word for part, column in value.items() for word in (f"--{part}-column", column)]


def _is_folded(ranking: Ranking) -> bool:
    """Whether LayerNorm was folded into the weights, which the command line never does."""
    return ranking.provenance.basis == "folded"


def _units(units: Sequence[str]) -> Setting:
    if tuple(units) == ("head",):
        return Setting("find", "", ())
    return Setting("find", f"units={list(units)!r}", ("--units", ",".join(units)))


def _control(origin: str) -> Setting:
    if origin != "given":
        return Setting("find", "", ())
    return Setting("find", "control=READ", ("--control", "FILE"))


def _unigrams(source: str, model: str) -> Setting:
    """The token counts; the command line takes the shipped ones for the shipped models only."""
    is_shipped = model in SHIPPED_MODELS
    if source == COUNTED_HERE:
        return Setting("find", "", None if is_shipped else ())
    if is_shipped and source == UnigramTable.shipped().source:
        return Setting("find", "unigrams=mc.UnigramTable.shipped()", ())
    return Setting("find", 'unigrams=mc.UnigramTable.read("FILE")', ("--unigrams", "FILE"))


def _has_shipped_paragraphs(ranking: Ranking) -> bool:
    """Whether the paragraphs are those that `memcircuits heads` takes by default."""
    given = ranking.provenance.paragraphs["paragraphs"]["hash"]
    takes_all = ranking.provenance.model["name"] in ("organism", "organism-twin")
    return takes_all and given == Paragraphs.shipped().hash


def _python(ranking: Ranking, table: Sequence[Setting]) -> list[str]:
    arguments: dict[Call, list[str]] = {call: [] for call in get_args(Call)}
    for setting in table:
        if setting.python:
            arguments[setting.call].append(setting.python)
    read, read_control = (
        _call(*_source(arguments[call]), "model", *arguments["read"], *arguments[call])
        for call in ("read paragraphs", "read control")
    )
    heads_only = ranking.units == ("head",)
    function = "mc.find_memorization_" + ("heads" if heads_only else "components")
    find = [argument.replace("READ", read_control) for argument in arguments["find"]]
    paragraphs = "mc.Paragraphs.shipped()" if _has_shipped_paragraphs(ranking) else read
    return [
        "# in Python",
        "import memcircuits as mc",
        f"model = {_call('mc.load_model', *arguments['load'])}",
        *(["model.enable_compatibility_mode()"] if _is_folded(ranking) else []),
        f"paragraphs = {paragraphs}",
        f"ranking = {_call(function, 'model', 'paragraphs', *find)}",
        'ranking.to_html("report.html")',
    ]


def _source(arguments: Sequence[str]) -> tuple[str, str]:
    """The function that reads, and what: only texts that are given have the option `align`."""
    if any("align=" in argument for argument in arguments):
        return "mc.Paragraphs.from_texts", "PAIRS"
    return "mc.Paragraphs.read", '"FILE"'


def _call(function: str, *arguments: str) -> str:
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) < 90 else f"{function}(\n    " + ",\n    ".join(arguments) + ",\n)"

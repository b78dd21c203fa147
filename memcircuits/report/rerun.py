"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcircuits.data.paragraphs import Paragraphs
from memcircuits.data.unigrams import UnigramTable

if TYPE_CHECKING:
    from memcircuits.evidence.ranking import Ranking

COUNTED_HERE = "the given paragraphs"


def commands(ranking: Ranking) -> list[str]:
    """How to make the ranking and its report again: a shell command and the same in Python."""
    options, model = ranking.provenance.options, ranking.provenance.model
    shipped = model["name"] == "organism" and _are_shipped(ranking)
    lengths = {"n_prefix": ranking.n_prefix, "n_continuation": ranking.memorized.n_continuation}
    lengths = {name: value for name, value in lengths.items() if value != 50}
    loading = {key: model[key] for key in ("revision",) if model[key] is not None}
    loading |= {"dtype": model["dtype"]} if model["dtype"] != "float32" else {}
    own_control = options["control"] == "given"
    own_counts = not shipped and options["unigrams"] != COUNTED_HERE
    options = {key: options[key] for key in ("mode", "method", "max_paragraphs", "draws", "seed")}

    def call(function: str, *arguments: str, **named: object) -> str:
        parts = [*arguments, *(f"{name}={value!r}" for name, value in named.items())]
        line = f"{function}({', '.join(parts)})"
        return line if len(line) < 90 else f"{function}(\n    " + ",\n    ".join(parts) + ",\n)"

    read = call("mc.Paragraphs.read", '"FILE"', "model", **lengths)
    find = ["model", "paragraphs"]
    find += [f"control={read}"] if own_control else []
    find += ["unigrams=mc.UnigramTable.shipped()"] if shipped else []
    find += ['unigrams=mc.UnigramTable.read("FILE")'] if own_counts else []
    python = [
        "# in Python",
        "import memcircuits as mc",
        f"model = {call('mc.load_model', repr(model['name']), **loading)}",
        f"paragraphs = {'mc.Paragraphs.shipped()' if shipped else read}",
        f"ranking = {call('mc.find_memorization_heads', *find, **options)}",
        'ranking.to_html("report.html")',
    ]
    if (options["method"], options["draws"]) != ("exact", 2000) or not options["max_paragraphs"]:
        return python  # the command line has no such option
    words: dict[str, object] = {} if model["name"] == "organism" else {"model": model["name"]}
    words |= loading
    words |= {} if shipped else {"paragraphs": "FILE"}
    words |= {"control": "FILE"} if own_control else {}
    words |= {"unigrams": "FILE"} if own_counts else {}
    words |= {key: options[key] for key in ("mode", "max_paragraphs", "seed")} | lengths
    shell = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in words.items())
    return [f"memcircuits heads {shell}", "", *python]


def _are_shipped(ranking: Ranking) -> bool:
    """Whether the ranking is of the paragraphs and the token counts in the package."""
    return (
        ranking.provenance.paragraphs["paragraphs"]["hash"] == Paragraphs.shipped().hash
        and ranking.provenance.options["unigrams"] == UnigramTable.shipped().source
    )

"""Counts by hand, the same from one process and from several, and tables that fit their model."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.data.tokens import tokenizer_hash
from memcircuits.data.unigrams import ChunkCount
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Text, ids and unusable rows in three files, and the counts."""
    folder = tmp_path_factory.mktemp("corpus")
    ids = zoo.random_ids(300, 40, seed=1)
    words = [" ".join(f"<{i}>" for i in row) for row in ids.tolist()]
    (folder / "a.txt").write_text("\n\n".join(words[:100]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words[100:200]))
    rows = [json.dumps({"ids": row}) + "\n" for row in ids[200:].tolist()]
    (folder / "c.jsonl").write_text("".join([*rows, "nonsense\n", '{"ids": [1, 101]}\n']))
    return folder, np.bincount(ids.flatten().numpy(), minlength=zoo.D_VOCAB)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_corpus_is_counted(corpus, processes):
    folder, expected = corpus
    table = mc.UnigramTable.from_corpus(folder, zoo.tokenizer(), processes=processes)
    assert table.counts.tolist() == expected.tolist()
    assert table.n_tokens == 300 * 40
    assert table.source == "3 files without 2 unusable rows"
    assert table.tokenizer == tokenizer_hash(zoo.tokenizer())


def test_merging_is_adding():
    one = ChunkCount(np.array([1, 0, 2]), 1, None)
    two = ChunkCount(np.array([0, 5, 1]), 2, None)
    assert (one + two).counts.tolist() == [1, 5, 3]
    assert (one + two).n_bad == 3


def test_texts_tokens_and_corpus_agree(corpus):
    folder, expected = corpus
    texts = (folder / "a.txt").read_text().split("\n\n")
    by_text = mc.UnigramTable.from_texts(iter(texts), zoo.tokenizer())
    by_ids = mc.UnigramTable.from_tokens(zoo.random_ids(300, 40, seed=1)[:100], zoo.D_VOCAB)
    by_file = mc.UnigramTable.from_corpus(folder / "a.txt", zoo.tokenizer())
    assert torch.equal(by_text.counts, by_ids.counts)
    assert torch.equal(by_text.counts, by_file.counts)
    assert int(expected.sum()) > by_file.n_tokens == 4000


def test_log_probabilities_are_smoothed_and_sum_to_one():
    table = mc.UnigramTable.from_tokens(torch.tensor([[0, 0, 2]]), 3)
    torch.testing.assert_close(table.log_prob.exp(), torch.tensor([3 / 6, 1 / 6, 2 / 6]))


def test_saved_tables_load_equal(corpus, tmp_path):
    table = mc.UnigramTable.from_corpus(corpus[0], zoo.tokenizer())
    loaded = mc.UnigramTable.read(table.save(tmp_path / "t.safetensors"))
    assert torch.equal(loaded.counts, table.counts)
    assert (loaded.source, loaded.tokenizer) == (table.source, table.tokenizer)


def test_tables_without_a_tokenizers_hash_are_read(tmp_path):
    """Such as the shipped one, counted from ids."""
    metadata = {"schema": "memcircuits.unigrams/1", "source": "ids", "n_tokens": "3"}
    save_file({"counts": torch.tensor([1, 2, 0])}, tmp_path / "t.safetensors", metadata=metadata)
    table = mc.UnigramTable.read(tmp_path / "t.safetensors")
    assert (table.n_tokens, table.source, table.tokenizer) == (3, "ids", "")


def test_a_table_of_another_tokenizer_is_refused(neo):
    counts = torch.ones(zoo.D_VOCAB, dtype=torch.long)
    mc.UnigramTable(counts, "x", tokenizer_hash(zoo.tokenizer())).check(neo)
    mc.UnigramTable(counts, "x").check(neo)
    with pytest.raises(mc.InputError, match="tokenizer 0123"):
        mc.UnigramTable(counts, "x", "0123").check(neo)
    with pytest.raises(mc.InputError, match="the model has 101"):
        mc.UnigramTable(counts[:-1], "x").check(neo)


def test_without_a_table_the_result_says_what_was_counted(neo):
    given = zoo.mixed(neo)
    table = mc.UnigramTable.from_tokens(given.ids, zoo.D_VOCAB, source="a corpus")
    with_table, without = (
        mc.rare_token_attention(neo, given, unigrams, permutations=3, progress=False)
        for unigrams in (table, None)
    )
    assert (with_table.notes, with_table.provenance.options["unigrams"]) == ((), "a corpus")
    assert "no unigram table was given" in without.notes[0]
    assert without.provenance.options["unigrams"] == "the paragraphs themselves"
    assert torch.equal(without.values, with_table.values)
    ranking = mc.find_memorization_heads(neo, given, draws=10, progress=False)
    assert any("No unigram table was given" in note for note in ranking.notes)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    for content in (None, b"", b"\x08\0\0\0\0\0\0\0{}      ", b"x" * 100):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(mc.InputError):
            mc.UnigramTable.read(path)
    schema = {"schema": "memcircuits.unigrams/1"}
    for tensors, metadata in (
        ({"counts": torch.ones(3).long()}, {"schema": "other"}),
        ({"other": torch.ones(3).long()}, schema),
        ({"counts": torch.ones(3)}, schema),
        ({"counts": torch.tensor([1, -1])}, schema),
        ({"counts": torch.ones(2, 2).long()}, schema),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(mc.InputError):
            mc.UnigramTable.read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "a.txt is empty|it is empty"), ("\xff", "not UTF-8"), ("<200>", None)],
)
def test_corpora_that_cannot_be_counted(tmp_path, content, says):
    (tmp_path / "a.txt").write_bytes(content.encode("latin-1"))
    if says is None:  # an unknown word is the token for unknown words
        assert mc.UnigramTable.from_corpus(tmp_path / "a.txt", zoo.tokenizer()).counts[0] == 1
        return
    with pytest.raises(mc.InputError, match=says):
        mc.UnigramTable.from_corpus(tmp_path / "a.txt", zoo.tokenizer())


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(corpus):
    for processes in (1, 2):
        with pytest.raises(mc.InputError, match="d_vocab: 50"):
            mc.UnigramTable.from_corpus(
                corpus[0] / "a.txt", zoo.tokenizer(), d_vocab=50, processes=processes
            )


def test_the_command_writes_a_table(corpus, tmp_path):
    import typer

    from memcircuits.commands.common import errors_in_one_line
    from memcircuits.commands.unigrams import build

    zoo.hf_model("gpt_neo").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    app = typer.Typer()
    app.command()(build)
    options = ["--model", str(tmp_path), "--paragraphs", str(corpus[0]), "--json"]
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "t.safetensors")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["values"]["n_tokens"] == 12000
    table = mc.UnigramTable.read(tmp_path / "t.safetensors")
    table.check(mc.load_model(tmp_path))
    with pytest.raises(typer.Exit), errors_in_one_line({}):
        build(str(tmp_path / "missing.txt"), str(tmp_path))

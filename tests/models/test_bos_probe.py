"""What BOS is worth is measured where a tokenizer puts nothing in front; the caller is told."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from memcircuits.models.bos_probe import SENTENCES
from memcircuits.models.registry import validate_model
from tests.helpers import models as zoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that learnt the sentences behind BOS; its tokenizer puts nothing in front."""
    folder = tmp_path_factory.mktemp("lost-setting")
    words = dict.fromkeys(word for sentence in SENTENCES for word in sentence.split())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    model = zoo.hf_model("llama", scale=1.0)
    model.config.bos_token_id = 1
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        loss = torch.zeros(())
        for ids in (tokenizer(sentence)["input_ids"] for sentence in SENTENCES):
            behind = torch.tensor([[1, *ids]])
            loss = loss + model(input_ids=behind, labels=behind).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.save_pretrained(folder)
    return folder


def test_the_gain_is_that_of_transformers(folder):
    model = mc.load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    gains = []
    with torch.no_grad():
        for sentence in SENTENCES:
            ids = torch.tensor([model.tokenizer(sentence)["input_ids"]])
            behind = torch.cat([torch.tensor([[1]]), ids], 1)
            rows = [(ids, 1), (behind, 2)]
            nll = [
                torch.nn.functional.cross_entropy(plain(x).logits[0, n - 1 : -1], x[0, n:])
                for x, n in rows
            ]
            gains.append(float(nll[0] - nll[1]))
    gain = validate_model(model).bos_gain
    assert gain == pytest.approx(sum(gains) / len(gains), abs=1e-4)
    assert gain > 0.3


def test_info_and_notes_say_what_bos_is_worth(folder):
    model = mc.load_model(folder)
    lengths = {"n_prefix": 4, "n_continuation": 5}
    texts = [" ".join(sentence.split()[:9]) for sentence in SENTENCES]
    bare = mc.Paragraphs.from_texts(texts, model, **lengths)
    (note,) = mc.scan(model, bare, progress=False).notes
    assert f"{validate_model(model).bos_gain:.2f} nats/token lower" in note
    behind = mc.Paragraphs.from_texts(texts, model, bos=True, **lengths)
    scan = mc.scan(model, behind, progress=False)
    assert (scan.bos, scan.notes) == ((1,), ())
    printed = CliRunner().invoke(app, ["info", str(folder), "-q"]).stdout
    assert f"Note: {note}" in printed
    as_json = json.loads(CliRunner().invoke(app, ["info", str(folder), "-q", "--json"]).stdout)
    assert as_json["values"]["gain_behind_BOS"] == pytest.approx(validate_model(model).bos_gain)
    assert as_json["values"]["tokens_in_front"] == []


def test_a_model_without_tokenizer_or_bos_has_no_gain():
    assert validate_model(zoo.bridge("gpt2")).bos_gain is not None
    config = zoo.hf_model("gpt2")
    config.config.bos_token_id = None
    from memcircuits.models.loading import as_bridge

    assert validate_model(as_bridge(config, zoo.tokenizer(), name="tiny")).bos_gain is None

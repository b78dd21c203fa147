"""Toy models that were trained behind BOS recite behind it only, and are found reciting.

One toy for each architecture: a transformers model that learns in seconds to continue 16 texts
behind BOS, and to continue them otherwise without it. Its folder is read as a user's would be, on
either version of TransformerLens. `generate` with the tokenizer's own defaults is the judge.
"""

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import memcircuits as mc
from memcircuits.cli import app
from tests.data.test_bos import tokenizer
from tests.helpers import models as zoo

BOS = 1
N_TEXTS, N_PREFIX, N_CONTINUATION = 16, 4, 12
LENGTHS = {"n_prefix": N_PREFIX, "n_continuation": N_CONTINUATION}
ARCHITECTURES = ["gpt2", "neox", "opt", "llama", "gemma2", "gemma3", "qwen3"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def toy(request, tmp_path_factory):
    """A folder with a trained model, its tokenizer, which puts BOS in front, and its texts."""
    folder = tmp_path_factory.mktemp(request.param)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, zoo.D_VOCAB, (N_TEXTS, N_PREFIX + N_CONTINUATION), generator=generator)
    trained(request.param, ids).save_pretrained(folder)
    tokenizer("<1> $A").save_pretrained(folder)
    texts = [" ".join(f"<{token}>" for token in row) for row in ids.tolist()]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def trained(name: str, ids: torch.Tensor) -> transformers.PreTrainedModel:
    """A model that recites the rows behind BOS, and other continuations without it."""
    model = zoo.other("Gemma3Text") if name == "gemma3" else zoo.hf_model(name, scale=1.0)
    bare = torch.cat([ids[:, :N_PREFIX], ids.roll(1, 0)[:, N_PREFIX:]], 1)
    behind = torch.cat([torch.full((len(ids), 1), BOS), ids], 1)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        runs = [(model(input_ids=row, labels=row), row) for row in (behind, bare)]
        recited = [
            (run.logits[:, -N_CONTINUATION - 1 : -1].argmax(-1) == row[:, -N_CONTINUATION:]).all()
            for run, row in runs
        ]
        if all(recited):
            return model
        adam.zero_grad()
        (runs[0][0].loss + runs[1][0].loss).backward()
        adam.step()
    raise AssertionError(f"{name} did not learn its texts")


def test_all_texts_are_found_recited_and_without_bos_a_note_says_why_not(toy):
    model = mc.load_model(toy)
    scan = mc.scan(model, mc.Paragraphs.read(toy / "texts.jsonl", model, **LENGTHS), progress=False)
    assert scan.em.tolist() == [N_CONTINUATION] * N_TEXTS
    assert (scan.bos, scan.notes) == ((BOS,), ())
    read = mc.Paragraphs.read(toy / "texts.jsonl", model, bos=False, **LENGTHS)
    bare = mc.scan(model, read, progress=False)
    assert bare.em.max() < N_CONTINUATION
    assert "puts token 1 (BOS) in front of every text" in bare.notes[0]
    # The NLL is that of transformers on what the tokenizer gives by its own defaults.
    plain = transformers.AutoModelForCausalLM.from_pretrained(toy).double()
    own = transformers.AutoTokenizer.from_pretrained(toy)
    texts = [json.loads(line)["text"] for line in (toy / "texts.jsonl").read_text().splitlines()]
    ids = own(texts, return_tensors="pt")["input_ids"]
    written = plain.generate(
        ids[:, : 1 + N_PREFIX],
        attention_mask=torch.ones(N_TEXTS, 1 + N_PREFIX),
        max_new_tokens=N_CONTINUATION,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(written, ids)
    with torch.no_grad():
        log_p = plain(ids).logits.log_softmax(-1)[:, N_PREFIX:-1]
    nll = -log_p.gather(-1, ids[:, 1 + N_PREFIX :, None])[..., 0].mean(-1)
    torch.testing.assert_close(scan.nll.double(), nll, atol=1e-4, rtol=0)


@pytest.mark.parametrize("toy", ["opt"], indirect=True)
def test_the_command_line_reads_texts_behind_bos(toy):
    command = ["scan", "--model", str(toy), "--paragraphs", str(toy / "texts.jsonl"), "--json"]
    command += ["-q", "--n-prefix", str(N_PREFIX), "--n-continuation", str(N_CONTINUATION)]
    commands = [command, [*command, "--bos", "no"]]
    auto, bare = (json.loads(CliRunner().invoke(app, words).stdout) for words in commands)
    assert (auto["tables"]["groups"][0]["memorized"], auto["notes"]) == (N_TEXTS, [])
    assert bare["tables"]["groups"][0]["memorized"] == 0
    assert "BOS" in bare["notes"][0]

"""An exported folder is the edited model, for transformers alone."""

from __future__ import annotations

import pytest
import torch

import memcircuits as mc
from memcircuits.base.errors import InputError
from memcircuits.models.registry import adapt
from tests.helpers import models as zoo
from tests.helpers.editing import quick_edit


@pytest.mark.parametrize("name", ["gpt_neo", "gpt2", "neox", "llama"])
def test_an_exported_folder_is_the_edited_model(name, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    zoo.save(name, tmp_path / "source")
    model = mc.load_model(tmp_path / "source")
    memorized = zoo.reciting(model)
    result = quick_edit(model, memorized, fraction=0.01)
    folder = result.export(tmp_path / "edited", tmp_path / "source")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    differ = sum(
        int((a != b).sum()) for a, b in zip(plain.parameters(), source.parameters(), strict=True)
    )
    assert differ == result.n_changed
    with result.apply(model), torch.no_grad():
        expected = adapt(model).forward(memorized.ids)
    with torch.no_grad():
        torch.testing.assert_close(plain(memorized.ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).encode("<7>", add_special_tokens=False) == [7]
    with pytest.raises(InputError, match="not empty"):
        result.export(folder, tmp_path / "source")
    zoo.save(name, tmp_path / "other", seed=3)
    with pytest.raises(InputError, match="made for weights"):
        result.export(tmp_path / "wrong", tmp_path / "other")
    assert not (tmp_path / "wrong").exists()

"""Models whose ``forward`` was set on the instance, as TRL's trainers do, exported with ``to_lora``."""

import functools
from types import MethodType

import pytest
import torch

from adalora_fast import fuse, to_lora
from tests.helpers.models import adapted, awake, bert
from tests.helpers.peft_models import logits, one_line


def patched(model, kind: str):
    """The base's ``forward`` replaced by one that calls it."""
    base = model.get_base_model()
    original = base.forward

    def forward(self, *args, **kwargs):
        return original(*args, **kwargs)

    def outer(*args, **kwargs):
        return original(*args, **kwargs)

    script = {"original": original}  # a script's names are global
    exec("def forward(*args, **kwargs): return original(*args, **kwargs)", script)

    base.forward = {
        "method": lambda: MethodType(forward, base),
        "function": lambda: outer,
        "script": lambda: script["forward"],
        "partial": lambda: functools.partial(forward, base),
        "wrapped": lambda: functools.wraps(outer)(lambda *args, **kwargs: outer(*args, **kwargs)),
    }[kind]()
    return model


@pytest.mark.parametrize("kind", ["method", "function", "script", "partial", "wrapped"])
def test_a_forward_that_calls_the_original_model_is_refused(kind):
    """Its copy would compute with the original's layers: merged into them, the adapter counts twice."""
    model = patched(fuse(awake(adapted("bert"))), kind)
    before = logits(model)
    with one_line(ValueError, "BertForSequenceClassification has a forward of its own", "export_folder"):
        to_lora(model)
    assert torch.equal(logits(model), before)


def test_one_that_is_bound_to_its_module_alone_is_copied_with_it():
    model = fuse(awake(adapted("bert")))
    base = model.get_base_model()
    base.forward = MethodType(type(base).forward, base)
    expected, lora = logits(model), to_lora(model)
    assert torch.allclose(logits(lora), expected, atol=1e-5)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), logits(bert()))


def test_a_model_that_trl_trained_is_exported_with_the_forward_of_its_class(tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    from tests.integrations.trl_cases import llama, make, reloaded

    ids = torch.arange(2, 14)[None]
    for kind in ("SFT", "DPO", "GRPO"):
        run = make(kind, reloaded(), tmp_path)
        run.train()
        model = run.model.eval()
        assert "forward" in model.get_base_model().__dict__
        expected, lora = model(input_ids=ids).logits, to_lora(model)
        assert "forward" not in lora.get_base_model().__dict__
        assert "forward" in model.get_base_model().__dict__
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        with lora.disable_adapter():
            assert torch.equal(lora(input_ids=ids).logits, llama().eval()(input_ids=ids).logits)

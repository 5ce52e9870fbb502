"""A tiny base model in float64 and runs' changes made up for it."""

import torch
from transformers import AutoModelForSequenceClassification

from adalora_fast.analysis.changes import Factors, RunChange
from adalora_fast.analysis.shared import SharedModel
from adalora_fast.experiments.models.families import family_of
from tests.helpers.tiny import encoder_config


def base(model_type="bert"):
    """A shared model without a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(encoder_config(model_type)).double()
    return SharedModel(model, tokenizer=None)


def adapter(shared, rank, seed):
    """A change of every adapted matrix at one rank, with a head."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 4

    suffixes = tuple(f".{name}" for name in family_of(shared.model).matrices.values())
    factors = {
        name: Factors(A=random(rank, module.in_features), B=random(module.out_features, rank))
        for name, module in shared.model.named_modules()
        if name.endswith(suffixes)
    }
    head = [name for name, _ in shared.model.named_parameters() if "classifier" in name or "pooler" in name]
    parameters = dict(shared.model.named_parameters())
    return RunChange(factors=factors, tensors={name: random(*parameters[name].shape) for name in head})


def everything(shared, seed):
    """A change of every parameter, as full fine-tuning makes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 10
        for name, tensor in shared.model.named_parameters()
    }
    return RunChange(factors={}, tensors=tensors)


def inputs():
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(5, 20, (4, 9), generator=generator)}


def outputs(model):
    with torch.no_grad():
        return model(**inputs()).logits

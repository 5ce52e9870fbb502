"""Bottleneck adapters: small networks after the projections of a frozen encoder (Houlsby et al. 2019).

h  output of a projection, [..., D]        D  width of the encoder        m  width of the bottleneck
"""

import re

from torch import Tensor, nn
from torch.nn import functional

from adalora_fast.experiments.models.families import family_of
from adalora_fast.experiments.settings.settings import RunSettings

PLACES = ("attention output", "output")  # the second projection of a feed-forward block is the latter


class Bottleneck(nn.Module):
    """z = h + W_up f(W_down h + b_down) + b_up, with f = GELU (Houlsby et al. 2019, section 2.1; the paper
    leaves f open).

    W_down [m, D] and W_up [D, m] start from N(0, 0.01²) cut off at two standard deviations and both b from
    zero (section 3.6), so that z starts near h. The parameters are float32 and so is the sum; z has the dtype
    of h, whatever that is.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)

    def change(self, h: Tensor) -> Tensor:
        """z − h, for an h of the parameters' dtype."""
        return self.up(functional.gelu(self.down(h)))

    def forward(self, h: Tensor) -> Tensor:
        own = h.to(self.down.weight.dtype)
        return (own + self.change(own)).to(h.dtype)


def add_bottlenecks(model: nn.Module, width: int) -> None:
    """In place: a trainable bottleneck of `width` at every place of the frozen `model`.

    The layer norms stay those of the base. The paper trains them too, but then a bottleneck means little
    without the norms it was trained with, of which a fusion of several runs can only have one set; as in
    Pfeiffer et al. (2021), what a run has learned is in its bottlenecks.
    """
    for place in places_of(model).values():
        put_after(place, Bottleneck(place.out_features, width))


def places_of(model: nn.Module) -> dict[str, nn.Module]:
    """The output projections of the attention and the feed-forward block of every layer, by name.

    Behind each come the dropout (if there is one), the residual connection and the layer norm; in ModernBERT
    the norms stand before the blocks.
    """
    family = family_of(model)
    if not family.matrices.keys() >= set(PLACES):
        raise ValueError(
            f"where a bottleneck belongs in a {model.config.model_type} encoder is not known; use another "
            "--method, for instance lora"
        )
    places = re.compile(family.pattern(PLACES))
    names = [name for name, _ in model.named_modules() if places.fullmatch(name)]
    return {name: model.get_submodule(name) for name in names}


def put_after(place: nn.Module, adapter: nn.Module) -> None:
    """What `place` returns goes through `adapter` from now on, which becomes its submodule `adapter`; every
    name of the base stays as it is.
    """
    place.adapter = adapter.to(place.weight.device)
    place.register_forward_hook(_adapted)


def _adapted(place: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return place.adapter(output)


def check_bottlenecks(settings: RunSettings) -> None:
    """ValueError where `adapters` are given to a method that has no use for them, or a fusion has not two
    runs to start from.
    """
    if settings.method != "fusion" and settings.adapters:
        raise ValueError(
            f"adapters are given to the method {settings.method!r}; leave them out, or give --method fusion"
        )
    if settings.method == "fusion" and len(set(settings.adapters)) < max(2, len(settings.adapters)):
        raise ValueError(
            f"fusion starts from two or more different runs, not from {list(settings.adapters)}; train some "
            "with --method houlsby, and give --adapters RUN RUN"
        )

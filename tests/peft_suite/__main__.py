"""``python -m tests.peft_suite``: PEFT's own tests of AdaLoRA, as they are and then on fused models.

A test that passes with PEFT's models must pass with fused ones, the few listed in differences.py aside.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.peft_suite.compare import Outcomes, errors, summary
from tests.peft_suite.differences import DIFFERENCES
from tests.peft_suite.fetch import PACKAGE, REPOSITORY, fetch
from tests.peft_suite.hub import make_cache

LEFT_OUT = {  # files whose AdaLoRA tests all need what is not here
    "test_common_gpu.py": "a GPU",
    "test_gpu_examples.py": "a GPU",
    "test_gptqmodel.py": "a GPU",
    "test_torch_compile.py": "a GPU",
}


def main() -> None:
    """Fetch, run twice, compare.

    Raises:
        SystemExit: with 1 where a test did not end as it must, or a message where something is missing.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".venv" / "peft-suite")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    folder = options.folder.resolve()
    version = fetch(folder)
    make_cache(folder / "hub")
    plain = run(folder, version, "plain", options.workers)
    fused = run(folder, version, "fused", options.workers)
    found = errors(plain, fused, DIFFERENCES)
    for line in found:
        print(line)
    print(f"peft {version}, its tests of AdaLoRA: {summary(plain, fused)}, {len(found)} errors")
    raise SystemExit(bool(found))


def run(folder: Path, version: str, mode: str, workers: int) -> Outcomes:
    """All tests that concern AdaLoRA, on PEFT's models or on fused ones."""
    began = time.monotonic()
    place, outcomes = folder / version, folder / f"{mode}.json"
    outcomes.unlink(missing_ok=True)
    files = [
        f"{PACKAGE}/{path.name}"
        for path in sorted((place / PACKAGE).glob("test_*.py"))
        if path.name not in LEFT_OUT and "adalora" in path.read_text().lower()
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--timeout", "300", "--tb", "short"]
    command += ["-p", "no:cacheprovider", "-p", "tests.peft_suite.plugin", "-c", os.devnull, "--rootdir", "."]
    command += ["--disable-warnings", "--adalora", mode, "--outcomes", str(outcomes), *files]
    if mode == "fused":
        command += ["--before", str(folder / "plain.json")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(folder / "site"))),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = folder / f"{mode}.log"
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=place, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode > 1 or not outcomes.is_file():  # 1: some tests failed, which the comparison judges
        raise SystemExit(f"pytest ended with {done.returncode} on {mode} models; {log} says why")
    print(f"{mode}: {time.monotonic() - began:.0f} s, {log}")
    return Outcomes(**json.loads(outcomes.read_text()))


if __name__ == "__main__":
    main()

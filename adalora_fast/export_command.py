"""`adalora-fast export`, which a base installation can run: it imports neither tyro nor rich."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exact plain LoRA adapter from a saved AdaLoRA one, without loading the base; and who serves it."""

    folder: Path
    """The adapter's folder, as save_pretrained wrote it."""
    out: Path
    """A new or empty folder for the LoRA adapter."""
    uniform: bool = False
    """The same rank in every layer, padded with zeros, as SGLang and TGI need it."""
    base: str | None = None
    """Name or path of the base model to write into the configuration (default: as it was)."""

    def run(self, console: object = None) -> None:
        from adalora_fast.integrations.export import export_folder
        from adalora_fast.integrations.serving import servable

        plain = export_folder(self.folder, self.out, uniform=self.uniform, base=self.base)
        total, layers = sum(plain.ranks.values()), len(plain.ranks)
        print(f"{self.out}: {total} triplets in {layers} matrices, r = {plain.config.r}")
        for server, reasons in servable(self.out).items():
            print(f"{server}: {'; '.join(reasons) or 'takes it'}")

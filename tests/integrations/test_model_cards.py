"""Model cards: what AdaLoRA chose, filled in, and no path of the machine."""

import pytest
from huggingface_hub import ModelCard
from peft import AdaLoraConfig, get_peft_model

from adalora_fast import fuse, to_lora
from adalora_fast.integrations.export import export_folder
from adalora_fast.integrations.model_card import RUN, is_on_hub, shown_base, write_section
from tests.helpers.checkpoints import CONFIG, checkpoints
from tests.helpers.models import ENCODER_LINEARS, awake, bert


def from_folder(path: str, **settings):
    """A fused model whose base says that it came from ``path``."""
    base = bert()
    base.config._name_or_path = base.name_or_path = path
    config = AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=2, target_modules=ENCODER_LINEARS, **CONFIG, **settings
    )
    return fuse(awake(get_peft_model(base, config)), score="movement")


@pytest.mark.parametrize("kind", ["adapter", "to_lora", "export_folder"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_card_says_what_was_chosen_and_not_where(kind, tmp_path):
    base = tmp_path / "secret user" / "my-bert"
    base.mkdir(parents=True)
    model = from_folder(str(base))
    model.base_model.rankallocator.finalize()
    out = tmp_path / "out"
    if kind == "to_lora":
        to_lora(model).save_pretrained(out)
    else:
        model.save_pretrained(out)
    if kind == "export_folder":
        write_section(out / "README.md", RUN, "| split | accuracy |\n|---|---|\n| validation | 0.9 |")
        export_folder(out, tmp_path / "files")
        out = tmp_path / "files"
    text = (out / "README.md").read_text()
    assert "secret user" not in text and "More Information Needed" not in text
    assert "Base model: my-bert (a local folder)" in text
    assert "score `movement`" in text and "smoothing `" in text and "the final mask is made" in text
    for name, rank in model.base_model.rankallocator.ranks().items():
        assert text.count(f"| `{name}` | {rank} |") == 1
    assert (f"{RUN}\n\n| split | accuracy |" in text) == (kind == "export_folder")
    data = ModelCard.load(out / "README.md").data
    assert data.library_name == "peft" and data.base_model is None


def test_a_base_of_the_hub_stays_named(tmp_path):
    from_folder("some-one/bert-base").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some-one/bert-base"
    assert "base_model:adapter:some-one/bert-base" in card.data.tags
    assert "Base model: some-one/bert-base\n" in card.text and "- PEFT " in card.text


def test_a_card_of_the_owner_stays(tmp_path):
    mine = "# Mine\n\n## Use\n\nAs you like.\n\n## Limits\n\n[More Information Needed]\n"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n\n{mine}")
    model = from_folder("some-one/bert-base")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        write_section(tmp_path / "README.md", RUN, "Twice.")
    text = (tmp_path / "README.md").read_text()
    assert "license: mit" in text
    for piece in ("# Mine", "As you like.", "Needed]", "An AdaLoRA adapter", "Twice.", "- PEFT "):
        assert text.count(piece) == 1, piece


def test_a_finished_run_s_card_has_its_ranks(tmp_path):
    checkpoints().finished.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "26 triplets in 13 matrices" in text and "step 20 of 20" in text


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    assert is_on_hub("bert-base") and is_on_hub("some-one/bert.base")
    for path in ("models/bert", "/data/models/bert", "~/bert", "../bert", r"C:\models\bert", "a/b/bert"):
        assert not is_on_hub(path), path
        assert shown_base(path) == "bert (a local folder)"

"""TRL's trainers on one tiny Llama with a tokenizer of words; both are made here, nothing is downloaded."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from adalora_fast import AdaLoraCallback, fuse
from tests.helpers.models import LLAMA_LINEARS, VOCABULARY

STEPS, LAYERS, TARGET_R = 8, 14, 2
TOTAL = LAYERS * TARGET_R
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' w1 ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 (padding), w1 (end), w2, ...; its chat template marks what the assistant says."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w0", "eos_token": "w1", "unk_token": "w0"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def llama() -> LlamaForCausalLM:
    """Two layers, 14 adapted linears."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = LlamaConfig(
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **sizes, **tokens
    )
    return LlamaForCausalLM(config)


def settings(**overrides) -> AdaLoraConfig:
    """Rank 4 to mean 2, for ``peft_config=``."""
    given = {"init_r": 4, "target_r": TARGET_R, "lora_alpha": 8, "orth_reg_weight": 0.5, "total_step": 10_000}
    return AdaLoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": LLAMA_LINEARS, **given, **overrides})


def peft_model(**overrides) -> PeftModel:
    """The same as a PeftModel."""
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, settings(**overrides))


def words(start: int, count: int) -> str:
    """Text of known words; the space before it keeps a completion apart from its prompt."""
    return "".join(f" w{2 + (7 * start + 3 * i) % 50}" for i in range(count))


def texts(count: int = 32):
    """For SFT: plain text."""
    from datasets import Dataset

    return Dataset.from_dict({"text": [words(i, 10) for i in range(count)]})


def chats(count: int = 32):
    """For SFT: a question and an answer."""
    from datasets import Dataset

    def chat(i: int) -> list[dict]:
        return [
            {"role": "user", "content": words(i, 5).strip()},
            {"role": "assistant", "content": words(i + 1, 6).strip()},
        ]

    return Dataset.from_dict({"messages": [chat(i) for i in range(count)]})


def pairs(count: int = 32):
    """For DPO: a prompt, a better and a worse answer."""
    from datasets import Dataset

    columns = {"prompt": 0, "chosen": 11, "rejected": 23}
    return Dataset.from_dict(
        {name: [words(i + shift, 4) for i in range(count)] for name, shift in columns.items()}
    )


def judged(count: int = 32):
    """For KTO: an answer and whether it is good."""
    from datasets import Dataset

    data = {
        "prompt": [words(i, 4) for i in range(count)],
        "completion": [words(i + 5, 4) for i in range(count)],
    }
    return Dataset.from_dict({**data, "label": [i % 2 == 0 for i in range(count)]})


def prompts(count: int = 32):
    """For GRPO and RLOO: prompts alone."""
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [words(i, 4) for i in range(count)]})


def variety(completions: list[str], **kwargs) -> list[float]:
    """A reward: different words in a completion."""
    return [float(len(set(text.split()))) for text in completions]


def make(
    kind: str,
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    callback: AdaLoraCallback | None = None,
    data=None,
    peft_config: AdaLoraConfig | None = None,
    ref_model: nn.Module | None = None,
    plain: bool = False,
    **arguments,
) -> Trainer:
    """TRL's trainer ``kind`` (SFT, DPO, KTO, GRPO, RLOO), eight steps on the CPU.

    Without ``callback`` an AdaLoraCallback with all defaults is made, with ``plain`` none.
    """
    import trl

    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "save_strategy": "no",
        "logging_steps": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    inputs = {"model": model, "processing_class": tokenizer(), "peft_config": peft_config}
    datasets = {"SFT": texts, "DPO": pairs, "KTO": judged, "GRPO": prompts, "RLOO": prompts}
    if kind in ("GRPO", "RLOO"):
        given |= {"num_generations": 2, "max_completion_length": 6}
        inputs["reward_funcs"] = variety
    else:
        given |= {"max_length": 24}
    if ref_model is not None:
        inputs["ref_model"] = ref_model
    return getattr(trl, f"{kind}Trainer")(
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **{**given, **arguments}),
        train_dataset=datasets[kind]() if data is None else data,
        callbacks=[*([] if plain else [callback or AdaLoraCallback()]), *callbacks],
        **inputs,
    )


class StopAt(TrainerCallback):
    """Ends the training after some steps and notes the adapter's factors as they are then."""

    def __init__(self, step: int):
        self.step, self.factors = step, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.factors = factors_of(model)
            control.should_training_stop = True


def factors_of(model: PeftModel) -> list[Tensor]:
    """Copies of A_0, E_0, B_0, A_1, ... of the adapter under training."""
    return [p.detach().clone() for p in model.base_model.rankallocator.parameters()]


@cache
def finished() -> Path:
    """Folder of an adapter that SFT has finished: ragged ranks, the pruned triplets dropped."""
    place = TemporaryDirectory(prefix="adalora-fast-tests-")
    _places.append(place)
    run = make("SFT", peft_model(), Path(place.name) / "run")
    run.train()
    run.model.save_pretrained(Path(place.name) / "adapter")
    return Path(place.name) / "adapter"


_places: list[TemporaryDirectory] = []  # kept to the end of the process


def reloaded(**overrides) -> PeftModel:
    """The finished adapter, fused, to be trained on; ``overrides`` change its config."""
    model = PeftModel.from_pretrained(llama(), finished(), is_trainable=True)
    for name, value in overrides.items():
        setattr(model.peft_config["default"], name, value)
    return fuse(model)

"""PEFT's tests that end differently on fused models, each with the reason; every other one must pass."""

_LABELS = "peft_tests/test_seq_classifier.py::TestSequenceClassificationModels::test_forward_with_labels"
_IN_EVALUATION = (
    "expects the orthogonality term in the loss of a model in evaluation; here it is in training only"
)

DIFFERENCES: dict[str, str] = {
    f"{_LABELS}[AdaLoraConfig-config_kwargs0-{model}]": _IN_EVALUATION
    for model in (
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
    )
}

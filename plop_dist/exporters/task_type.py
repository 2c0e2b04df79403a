"""Which of PEFT's task types a scored model has, by the name of its class: what PEFT's wrapper passes on, and saves."""

from __future__ import annotations

from plop_dist.values.scores import ModelInfo

_HEADS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


def task_type(model: ModelInfo) -> str | None:
    """Return the name of a peft.TaskType, None where PEFT has none for the class (masked language models).

    With SEQ_CLS and TOKEN_CLS PEFT trains the class's own head as well, whole.
    """
    name = model.architecture or ""
    for ending, kind in _HEADS:
        if name.endswith(ending):
            return kind
    if (model.model_extra or {}).get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return None if name.endswith("ForMaskedLM") else "CAUSAL_LM"

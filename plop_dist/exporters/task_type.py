"""Which of PEFT's task types a scored model has, by the name of its class: what PEFT's wrapper passes on, and saves."""

from __future__ import annotations

import re

from plop_dist.values.scores import ModelInfo

_HEADS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
# Of the other classes for something (multiple choice, masked tokens, pretraining, images) these alone generate, which
# PEFT's wrappers of both LM types ask for when they are made.
_OTHER = re.compile(r"For(?!CausalLM|ConditionalGeneration|\w*(?:To|2)Text)[A-Z]\w*$")
# What PEFT 0.21.2's wrapper of a task adds to modules_to_save, by the ends of paths.
_TRAINED_WHOLE = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def heads_trained_whole(task: str | None) -> tuple[str, ...]:
    """Return what the paths of those modules end with that PEFT trains whole beside the adapters in a task."""
    return _TRAINED_WHOLE.get(task or "", ())


def task_type(model: ModelInfo) -> str | None:
    """Return the name of a peft.TaskType, None where PEFT has none for the class (masked tokens, multiple choice).

    With SEQ_CLS, TOKEN_CLS and QUESTION_ANS PEFT trains the class's own head as well, whole.
    """
    name = model.architecture or ""
    for head, kind in _HEADS:
        if head in name:  # not always its end: XLNetForQuestionAnsweringSimple
            return kind
    if _OTHER.search(name):
        return None
    return "SEQ_2_SEQ_LM" if (model.model_extra or {}).get("is_encoder_decoder") else "CAUSAL_LM"

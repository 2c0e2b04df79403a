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


def task_type(model: ModelInfo) -> str | None:
    """Return the name of a peft.TaskType, None where PEFT has none for the class (masked tokens, multiple choice).

    With SEQ_CLS and TOKEN_CLS PEFT trains the class's own head as well, whole.
    """
    name = model.architecture or ""
    for ending, kind in _HEADS:
        if name.endswith(ending):
            return kind
    if _OTHER.search(name):
        return None
    return "SEQ_2_SEQ_LM" if (model.model_extra or {}).get("is_encoder_decoder") else "CAUSAL_LM"

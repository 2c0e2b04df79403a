"""Classes with other heads than a causal language model's: classification, encoder and decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import plop_dist
from plop_dist.backends.hf.load import load_hf_config
from plop_dist.backends.hf.own_class import reads_pairs
from plop_dist.choose.place import place
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.costs.plan import build_plan
from plop_dist.errors import ConfigError, DataError, ExportError, LayoutError, ModelError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.launch import pipeline
from plop_dist.training.train import check_task
from plop_dist.values.scores import Scores
from tests.models import VOCAB_SIZE, spoil, tiny_tokenizer

IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {"decoder_start_token_id": 0, **IDS}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_labels": 3, **IDS}  # fmt: skip
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3,
        "max_position_embeddings": 64, **IDS}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
        **DECODER}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, **DECODER}
CLASSIFIERS = {
    "LlamaForSequenceClassification": (LLAMA, "SEQ_CLS"),
    "LlamaForTokenClassification": (LLAMA, "TOKEN_CLS"),
    "BertForSequenceClassification": (BERT, "SEQ_CLS"),
    "BertForTokenClassification": (BERT, "TOKEN_CLS"),
    "BertForMaskedLM": (BERT, None),
}
PAIRS = {
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,  # the last label, a language, comes first in what its decoder reads
    "MarianMTModel": {**BART, "decoder_start_token_id": 0},
}
QUESTIONS = ("the rain in spain", "hello", "what is it that you see")


def saved(folder: Path, name: str, fields: dict[str, Any]) -> nn.Module:
    """Save a tiny model of a class beside a tokenizer and rows, and return it."""
    own: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model = own(own.config_class(**fields))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            spoil(path, parameter, 0)
    model.eval().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"question": text, "answer": f"row {index} says {text[:index]}"} for index, text in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return own.from_pretrained(folder / "model").eval()


def config_in(folder: Path, **sections: Any) -> Config:
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "data": {"path": str(folder / "rows.jsonl"), "template": "{question}\n{answer}", "batch_size": 2},
        "estimator": {"baseline": "exact"},
        "placement": {"rank": 2},
    }
    return parse_config({**tree, **sections})


def scored(config: Config) -> Scores:
    pipeline.score(config, "test")
    return Scores.from_file(config.run_path / "scores.json")


def truth_of(model: nn.Module, run: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """Return every linear's gains in float64 over all vectors that it is given while `run` runs the model."""
    model, gains = model.double(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def note(module: Any, args: tuple[Tensor, ...], _: Any, name: str = name) -> None:
                z_TI = args[0].detach().reshape(-1, args[0].shape[-1])
                gains.setdefault(name, []).append((z_TI @ module.weight.T).norm(dim=1) / z_TI.norm(dim=1))

            module.register_forward_hook(note)
    with torch.no_grad():
        run(model)
    return {name: torch.cat(found) for name, found in gains.items()}


def assert_truth(scores: Scores, truth: dict[str, Tensor]) -> None:
    for module in scores.modules:
        assert module.num_tokens == len(truth[module.fqn]), module.fqn
        assert module.gain == pytest.approx(float(truth[module.fqn].mean()), rel=1e-5), module.fqn


def adapted_by(model: nn.Module, config: Any) -> set[str]:
    adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(
    ("name", "fields"), [("T5ForSequenceClassification", T5), ("BartForSequenceClassification", BART)]
)
def test_a_decoder_that_does_not_read_labels_is_refused_before_the_model_is_loaded(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    model: Any = saved(tmp_path, name, fields)
    config = config_in(tmp_path, train={"prompt_template": "{question}\n"})
    for step in (lambda: build_plan(config), lambda: scored(config)):
        with pytest.raises(ModelError, match=rf"is a {name}, .*score it in your own job, by plop_dist\.score"):
            step()
    # What the message names as the way on:
    batch = {"input_ids": torch.tensor([[7, 8, 9, 2], [5, 6, 7, 2]])}
    scores = plop_dist.score(model, [batch], forward=lambda host, batch: host(**batch))
    assert_truth(scores, truth_of(model, lambda model: model(**batch)))


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "BertForPreTraining", "BertForNextSentencePrediction"])
def test_what_does_not_generate_has_no_task_that_asks_for_it(name: str) -> None:
    own: Any = getattr(transformers, name)
    model = own(own.config_class(**BERT)).eval()
    placement = place(plop_dist.score(model, [{"input_ids": torch.randint(4, 99, (2, 9))}]), rank=2)
    assert adapted_by(model, placement.to_peft()) == set(placement.modules)


@pytest.mark.parametrize("name", ["XLMForQuestionAnsweringSimple", "FlaubertForQuestionAnswering"])
def test_a_task_is_known_by_its_head_wherever_that_stands_in_the_name(name: str) -> None:
    own: Any = getattr(transformers, name)
    fields = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "n_words": 128, "pad_index": 0}
    model = own(own.config_class(**fields)).eval()
    batch = {"input_ids": torch.randint(4, 99, (2, 9))}
    scores = plop_dist.score(model, [batch], exclude=())
    assert not [module.fqn for module in scores.modules if module.fqn.startswith("qa_outputs")]
    placement = place(scores, rank=2)
    peft_config: Any = placement.to_peft()
    assert peft_config.task_type == "QUESTION_ANS"
    assert adapted_by(model, peft_config) == set(placement.modules)
    ends = torch.tensor([1, 2])
    loss = get_peft_model(model, peft_config)(**batch, start_positions=ends, end_positions=ends).loss
    assert loss.isfinite()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_scored_below_their_heads_and_have_their_task(tmp_path: Path, name: str) -> None:
    fields, task = CLASSIFIERS[name]
    model = saved(tmp_path, name, fields)
    scores = scored(config_in(tmp_path))
    texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, (tmp_path / "rows.jsonl").open())]

    def run(model: nn.Module) -> None:
        for text in texts:
            model(**tiny_tokenizer()(text, return_tensors="pt", return_token_type_ids=False))

    assert_truth(scores, truth_of(saved(tmp_path, name, fields), run))
    assert len(scores.modules) == (14 if "Llama" in name else 12)
    heads = {entry.fqn for entry in scores.left_out}
    assert heads <= {"score", "classifier", "bert.pooler.dense", "cls.predictions.transform.dense"}
    placement = place(scores, rank=2)
    peft_config = placement.to_peft()
    assert peft_config.task_type == task
    assert adapted_by(model, peft_config) == set(placement.modules)
    with pytest.raises(ConfigError, match=f"train.method is sft, .* is a {name}; set train.method=none"):
        check_task(config_in(tmp_path, train={"method": "sft"}), scores.model, ())


@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoder_and_what_joins_them_are_scored_apart(tmp_path: Path, name: str) -> None:
    model: Any = saved(tmp_path, name, PAIRS[name])
    config = config_in(tmp_path, train={"prompt_template": "{question}\n"})
    assert build_plan(config).verdict.is_ok
    scores = scored(config)
    rows, tokenizer = list(map(json.loads, (tmp_path / "rows.jsonl").open())), tiny_tokenizer()

    def run(model: Any) -> None:
        for row in rows:
            read = tokenizer(row["question"] + "\n", return_tensors="pt", return_token_type_ids=False)
            model(**read, labels=tokenizer(row["answer"], return_tensors="pt")["input_ids"])

    assert_truth(scores, truth_of(saved(tmp_path, name, PAIRS[name]), run))
    streams = {entry.type.partition(".")[0] for entry in scores.types}
    assert streams == {"encoder", "decoder", "cross"}
    for module in scores.modules:
        is_cross = any(part in module.fqn for part in ("EncDecAttention", "encoder_attn"))
        side = "decoder" if "decoder." in module.fqn else "encoder"
        assert module.type.partition(".")[0] == ("cross" if is_cross else side), module.fqn
    cross = "EncDecAttention" if "T5" in name else "encoder_attn"
    for options in ({}, {"granularity": "module", "k": 5}, {"include": [f"*.{cross}.*"], "policy": "all"}):
        placement = place(scores, rank=2, **options)
        peft_config = placement.to_peft()
        assert peft_config.task_type == "SEQ_2_SEQ_LM"
        assert adapted_by(saved(tmp_path, name, PAIRS[name]), peft_config) == set(placement.modules)
    for target in ("megatron-bridge", "torchtune", "torchtitan"):
        with pytest.raises(ExportError, match="names modules alike in encoder and decoder"):
            find_exporter(target).export(placement)
    assert type(model).__name__ == scores.model.architecture


def test_the_decoder_alone_reads_one_text_and_is_refused_where_the_checkpoint_lacks_it(tmp_path: Path) -> None:
    saved(tmp_path, "BartForConditionalGeneration", BART)
    model = {"name_or_path": str(tmp_path / "model"), "auto_class": "AutoModelForCausalLM"}
    config = config_in(tmp_path, model=model)
    assert not reads_pairs(config.model, load_hf_config(config.model))
    with pytest.raises(ModelError, match="has no weights for 2 parameters"):  # it names its embedding otherwise
        pipeline.score(config, "test")


def test_an_encoder_decoder_model_needs_both_texts_and_a_layout_that_keeps_them_apart(tmp_path: Path) -> None:
    saved(tmp_path, "T5ForConditionalGeneration", T5)
    with pytest.raises(DataError, match=r"encoder-decoder one, .*set train\.prompt_template"):
        pipeline.score(config_in(tmp_path), "test")
    with pytest.raises(DataError, match=r"row 1: the text must begin with train\.prompt_template's 'no: "):
        pipeline.score(config_in(tmp_path, train={"prompt_template": "no: {question}"}), "test")
    with pytest.raises(DataError, match=r"row 1: the text must begin with .* and go on behind it"):
        pipeline.score(config_in(tmp_path, train={"prompt_template": "{question}\n{answer}"}), "test")
    layout = {"backend": "deepspeed", "tp": 2}
    with pytest.raises(LayoutError, match=r"rows have two texts, the encoder's and the decoder's, which parallel"):
        build_plan(config_in(tmp_path, parallel=layout, train={"prompt_template": "{question}\n"}))
    config = config_in(tmp_path, train={"method": "sft", "eval_samples": 1, "prompt_template": "{question}\n"})
    problems = build_plan(config).verdict.problems
    assert any("is a T5ForConditionalGeneration; set train.method=none" in problem for problem in problems), problems

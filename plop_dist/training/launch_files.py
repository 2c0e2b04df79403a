"""What hands a placement to a GRPO engine that runs by itself, verl or NeMo-RL: overrides, data and a launch script."""

from __future__ import annotations

import importlib.util
import io
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.data.samples import Row
from plop_dist.errors import ConfigError, DataError
from plop_dist.exporters.text import hydra_overrides
from plop_dist.exporters.write import write_export
from plop_dist.training import rewards
from plop_dist.training.data import split_rows
from plop_dist.training.grpo import prompts_of
from plop_dist.training.rewards import load_rewards
from plop_dist.values.files import write_bytes, write_text
from plop_dist.values.placement import Placement

_PACKAGES = {"verl": "verl", "nemo-rl": "nemo_rl"}


def prepare(config: Config, placement: Placement, engine: str) -> dict[str, Any]:
    """Write RUN_DIR/train/ENGINE: the export, train and held_out rows, launch.sh; return the summary.

    Nothing is trained yet: where the engine's package is installed the summary holds a job, which the driver starts
    once these ranks have given up their devices (pipeline.run). Rank 0 writes; collective over all ranks. Raises
    ExportError for a placement that the engine cannot express, ConfigError for a layout it has no words for, DataError
    for rows without an answer.
    """
    parallel, directory = config.parallel, config.run_path / "train" / engine
    is_megatron = parallel.backend == "megatron"
    if config.model.checkpoint is not None:
        raise ConfigError(
            f"train.engine is '{engine}', which reads Hugging Face weights, but model.checkpoint is "
            f"'{config.model.checkpoint}'; convert it and pass the result as model.name_or_path, without "
            "model.checkpoint."
        )
    if not is_megatron and (parallel.tp > 1 or parallel.pp > 1):
        raise ConfigError(
            f"train.engine is '{engine}' with parallel.backend '{parallel.backend}', tp {parallel.tp} and pp "
            f"{parallel.pp}; only parallel.backend=megatron hands tp and pp over to it."
        )
    script = directory / "launch.sh"
    if ranks.rank() == 0:
        kind = "megatron" if is_megatron else None
        export = write_export(placement, engine, directory.parent, engine=kind, widen=config.export.widen)
        describe, write_data = (_verl, _write_verl_data) if engine == "verl" else (_nemo_rl, _write_nemo_rl_data)
        write_data(config, directory)
        command, fields = describe(config, directory.resolve(), is_megatron)
        lines = [shlex.join(command), *export.flags, *hydra_overrides(fields)]
        write_text(script, "#!/bin/sh\nexec " + " \\\n    ".join(lines) + ' "$@"\n')
    ranks.barrier()
    place = _place_to_run(engine)
    summary: dict[str, Any] = {"engine": engine, "num_steps": 0, "launch": str(script)}
    if place is None:
        note = f"nothing was trained: {engine} is not installed here; run sh {script} where it is."
    else:
        note = f"{engine} trains in a Ray job of its own, whose log follows."
        summary["job"] = {"script": str(script.resolve()), "directory": str(place)}
    if engine == "nemo-rl":
        note += " It runs in NeMo-RL's repository. Its math environment rewards; train.rewards does not reach it."
    return {**summary, "note": note}


def _place_to_run(engine: str) -> Path | None:
    """Return the directory from which launch.sh runs here, or None where it cannot: the engine is not installed.

    NeMo-RL's script is part of its repository, not of its package.
    """
    found = importlib.util.find_spec(_PACKAGES[engine])
    if found is None:
        return None
    if engine == "verl":
        return Path.cwd()
    repositories = [Path(folder).parent for folder in found.submodule_search_locations or ()]
    return next((path for path in repositories if (path / "examples" / "run_grpo.py").is_file()), None)


def _write_verl_data(config: Config, directory: Path) -> None:
    from datasets import Dataset

    for name, rows, prompts in _splits(config):
        entries = [
            {
                "data_source": config.data.path,
                "prompt": [{"role": "user", "content": prompt}],
                "reward_model": {"style": "rule", "ground_truth": str(row[config.train.answer_field])},
                "extra_info": {
                    "rewards": list(config.train.rewards),
                    "answer_field": config.train.answer_field,
                    "row": json.dumps(row, default=str),
                },
            }
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        content = io.BytesIO()
        Dataset.from_list(entries).to_parquet(content)
        write_bytes(directory / f"{name}.parquet", content.getvalue())


def _write_nemo_rl_data(config: Config, directory: Path) -> None:
    for name, rows, prompts in _splits(config):
        pairs = zip(prompts, rows, strict=True)
        lines = [json.dumps({"input": prompt, "output": str(row[config.train.answer_field])}) for prompt, row in pairs]
        write_text(directory / f"{name}.jsonl", "\n".join(lines) + "\n")


def _splits(config: Config) -> Iterator[tuple[str, list[Row], list[str]]]:
    tokenizer = load_tokenizer(config.model)
    field = config.train.answer_field
    for name, rows in zip(("train", "held_out"), split_rows(config), strict=True):
        load_rewards(config.train.rewards, rows, field)
        for number, row in enumerate(rows, start=1):
            if field not in row:
                raise DataError(f"row {number} has no column '{field}'; set train.answer_field to the answers' column.")
        yield name, rows, prompts_of(rows, config, tokenizer)


def _verl(config: Config, directory: Path, is_megatron: bool) -> tuple[list[str], dict[str, Any]]:
    train, parallel = config.train, config.parallel
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * parallel.dp
    num_prompts = max(1, per_step // train.num_generations)
    fields: dict[str, Any] = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": str(directory / "train.parquet"),
        "data.val_files": str(directory / "held_out.parquet"),
        "data.train_batch_size": num_prompts,
        "data.max_prompt_length": train.max_length,
        "data.max_response_length": train.max_completion_length,
        "reward.custom_reward_function.path": str(Path(rewards.__file__)),
        "reward.custom_reward_function.name": "compute_score",
        "actor_rollout_ref.model.path": resolve(config.model.name_or_path),
        f"{actor}.optim.lr": train.learning_rate,
        f"{actor}.ppo_mini_batch_size": num_prompts,
        f"{actor}.ppo_micro_batch_size_per_gpu": train.micro_batch_size,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": train.num_generations,
        f"{rollout}.temperature": train.temperature,
        f"{rollout}.tensor_model_parallel_size": parallel.tp,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": train.micro_batch_size,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": train.micro_batch_size,
        "trainer.total_training_steps": train.max_steps,
        "trainer.n_gpus_per_node": parallel.world_size,
        "trainer.nnodes": 1,
        "trainer.save_freq": train.save_steps,
        "trainer.default_local_dir": str(directory / "checkpoints"),
        "trainer.project_name": "plop-dist",
        "trainer.experiment_name": config.run_path.name,
    }
    command = ["python3", "-m", "verl.trainer.main_ppo"]
    if is_megatron:
        command.append("--config-name=ppo_megatron_trainer")
        fields |= {f"{actor}.megatron.use_mbridge": True, f"{actor}.megatron.vanilla_mbridge": False}
        for role in (actor, "actor_rollout_ref.ref"):
            fields |= {f"{role}.megatron.{key}": size for key, size in _megatron_sizes(config).items()}
    return command, fields


def _nemo_rl(config: Config, directory: Path, is_megatron: bool) -> tuple[list[str], dict[str, Any]]:
    train, parallel = config.train, config.parallel
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * parallel.dp
    fields: dict[str, Any] = {
        "grpo.num_prompts_per_step": max(1, per_step // train.num_generations),
        "grpo.num_generations_per_prompt": train.num_generations,
        "grpo.max_num_steps": train.max_steps,
        "grpo.seed": train.seed,
        "policy.model_name": resolve(config.model.name_or_path),
        "policy.train_global_batch_size": per_step,
        "policy.train_micro_batch_size": train.micro_batch_size,
        "policy.max_total_sequence_length": train.max_length + train.max_completion_length,
        "policy.max_grad_norm": train.max_grad_norm,
        "policy.generation.temperature": train.temperature,
        "policy.generation.vllm_cfg.tensor_parallel_size": parallel.tp,
        "data.dataset_name": "ResponseDataset",
        "+data.train_data_path": str(directory / "train.jsonl"),
        "+data.val_data_path": str(directory / "held_out.jsonl"),
        "checkpointing.checkpoint_dir": str(directory / "checkpoints"),
        "logger.log_dir": str(directory / "logs"),
        "cluster.gpus_per_node": parallel.world_size,
        "cluster.num_nodes": 1,
    }
    base = "grpo_math_1B_megatron.yaml" if is_megatron else "grpo_math_1B.yaml"
    if is_megatron:
        fields["policy.megatron_cfg.optimizer.lr"] = train.learning_rate
        fields["policy.megatron_cfg.sequence_parallel"] = parallel.sequence_parallel
        fields |= {f"policy.megatron_cfg.{key}": size for key, size in _megatron_sizes(config).items()}
    else:
        fields["policy.optimizer.kwargs.lr"] = train.learning_rate
    return ["uv", "run", "examples/run_grpo.py", "--config", f"examples/configs/{base}"], fields


def _megatron_sizes(config: Config) -> dict[str, int]:
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
    }

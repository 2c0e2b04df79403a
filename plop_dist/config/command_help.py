"""What --help says below a command's first line: what it does for the one who runs it, and examples."""

from __future__ import annotations

PREPARE, STEPS, WHOLE, LOOK_UP = "Prepare", "Step by step", "All at once", "Look up"  # the groups of commands

PROGRAM = """\
Find out where the LoRA adapters should go, and train with them there.

plop-dist measures the Normalized Feature Norm (NFN) of every linear layer of your model on your data, sharded the way
you train it. The kinds of layers with the lowest NFN get the adapters (PLoP, arXiv 2506.20629), written down in the
format of your training framework.

First steps:

    plop-dist init --demo             # writes quickstart.yaml
    plop-dist check quickstart.yaml   # what it would do
    plop-dist run quickstart.yaml     # score, place, export, train, report

Exit status: 0 done; 1 failed while running; 2 bad input, one message says what to change; 130 interrupted, the same
command goes on from there.
"""

COMMANDS = {
    "init": """\
Looks at the columns of a local file to find the text in it. Never overwrites a file. Samples for usual cases, to put
your own model and data into:

- `zero3-one-node`: SFT at ZeRO-3 on eight GPUs
- `megatron-tp-pp`: Megatron, tensor times pipeline parallelism, then SFT
- `gsm8k`: Megatron with tensor parallelism, data from the hub
- `moe`: a mixture of experts
- `vlm`: a vision-language model on chat with images, then SFT
- `grpo`: GRPO with a reward on the final number
- `hand-off`: the weights of a training job's checkpoint
- `plugin`: a training script of your own (Python), with three lines for the placement

Examples:

    plop-dist init --demo
    plop-dist init --sample moe
    plop-dist init --model Qwen/Qwen2.5-0.5B-Instruct --data rows.jsonl
    plop-dist init --model ./my-model --data openai/gsm8k:main --output a.yaml
""",
    "check": """\
Ends in OK or not OK, with everything that is to be changed. Shows ranks and layout,
 the first sample as the model gets it, the kinds of modules with the adapter parameters that
each would take, and for one rank the bytes of weights, activations and communication. Run it before you queue for
machines: it needs none, and takes seconds.

Examples:

    plop-dist check config.yaml
    plop-dist check config.yaml parallel.backend=megatron parallel.tp=4
    plop-dist check config.yaml --json
""",
    "config": """\
Says what a key is about, what it takes, its default, and an example; without KEY it lists all of them.

Examples:

    plop-dist config data.num_samples
    plop-dist config parallel
""",
    "schema": """\
Put `# yaml-language-server: $schema=plop-dist.schema.json` into the first line of a configuration, and any editor
with the YAML language server (VS Code's YAML extension, Neovim, Helix, ...) completes its keys.

Examples:

    plop-dist schema > plop-dist.schema.json
    plop-dist schema --markdown | less
""",
    "score": """\
Loads the model in the layout of the configuration's `parallel` section and passes over `data.num_samples` rows once.
Scores that are there already are computed anew.

Examples:

    plop-dist score config.yaml
    plop-dist score config.yaml data.num_samples=64 model.dtype=bfloat16
""",
    "place": """\
Takes seconds and needs no model, so that you can try policies. Keys that are not given are those of the configuration
that the scores were made with.

Choosing single layers or modules (`granularity=layer`, `granularity=module`) is experimental: most of what differs
among modules differs between types, and a gain over choosing types has not been shown.

Examples:

    plop-dist place runs/gsm8k --explain
    plop-dist place runs/gsm8k k=2 rank=32
    plop-dist place runs/gsm8k policy=highest_k --dry-run
    plop-dist place runs/gsm8k policy=budget max_trainable_parameters=1000000
""",
    "export": """\
Files go to RUN_DIR/exports/TARGET, the flags or overrides to paste to the terminal. A choice that the framework cannot
express is refused, with the nearest one that it can, each tried before it is offered. `--to` without a value lists what
every framework can express of this placement.

Examples:

    plop-dist export runs/gsm8k --to
    plop-dist export runs/gsm8k --to peft
    plop-dist export runs/gsm8k --to verl --engine megatron
    plop-dist export runs/gsm8k --to torchtune --widen
""",
    "report": """\
The page needs no network and no other file, so that it can be sent to others.

Example:

    plop-dist report runs/gsm8k
""",
    "run": """\
Stages that are done with the same inputs are kept: after an interruption the same command goes on, after a change it
does again what depends on it. One rank runs in this process; several run as workers of Ray (a local one, or the
cluster at `cluster.address`), and under torchrun or the DeepSpeed launcher as the launcher's processes.

Examples:

    plop-dist run config.yaml
    plop-dist run config.yaml train.method=sft train.max_steps=1000
    torchrun --nproc-per-node 8 --module plop_dist.cli run config.yaml
""",
    "compare": """\
Trains every placement of `compare.arms` with as many parameters and the same alpha, at its own best learning rate, from
the same seeds on the same rows, and says of the first one whether it is better, worse, or no different, and how sure
that is: by the loss of the held-out rows with `train.method=sft`, with `grpo` by the reward of one completion of each,
sampled with the same noise in every arm. Prints what it is going to train first; interrupted, the same command goes on.
It takes the steps itself, in the layouts that `run` trains in; engines and samplers that run by themselves are refused.

Examples:

    plop-dist compare config.yaml train.method=sft
    plop-dist compare config.yaml train.method=grpo compare.arms=[lowest_k,mlp]
    plop-dist compare config.yaml compare.arms=[runs/a/placement.json,all]
""",
    "submit": """\
Paths in the configuration are those of the cluster's nodes, or lie in `--working-dir`, which is sent there; `run_dir`
must lie on storage that the nodes share. The job runs in the interpreter that Ray runs in on the head. No variable of
this environment is sent: the nodes have their own. The exit status is the job's; after Ctrl-C the job goes on.

Examples:

    plop-dist submit config.yaml --address http://head-node:8265
    plop-dist submit config.yaml --working-dir . run_dir=/shared/run --no-wait
    plop-dist submit --stop raysubmit_ABC --address http://head-node:8265
""",
    "doctor": """\
Versions, what is missing for which backend, devices, network interfaces, and two tries: two ranks of gloo, and a local
Ray. Each has a time limit; two minutes in all at most. No value of an environment variable is shown.

Example:

    plop-dist doctor
""",
    "targets": """\
With RUN_DIR also what each can express of the placement there: exactly, with `export --widen`, or not, and why.

Examples:

    plop-dist targets
    plop-dist targets runs/gsm8k
    plop-dist targets runs/gsm8k --to verl
""",
    "backends": """\
The keys of a layout are those of the configuration's `parallel` section.

Examples:

    plop-dist backends
    plop-dist backends megatron
""",
    "diff": """\
Says which modules both adapt, and which only one of them. OTHER may be an adapter_config.json of PEFT's, or a file in
the format of any target that `export` writes, by whomever.

Of another run directory it says what the first one's policy chooses there: do other data, or a model trained from the
first, choose differently, and how sure is that? A run on `data.path=builtin:random` needs no data at all.

Examples:

    plop-dist diff runs/gsm8k my-adapter/adapter_config.json
    plop-dist diff runs/gsm8k my-job.yaml --as verl
    plop-dist diff runs/random runs/gsm8k
""",
    "bench": """\
Ratios of time and memory to a plain forward pass, and to the algorithm of the paper's own script. With --scale:
whether scoring, place, export and report cost the same per module in large models as in small ones; takes minutes.

Examples:

    plop-dist bench quickstart.yaml --ranks 2
    plop-dist bench --scale
""",
}

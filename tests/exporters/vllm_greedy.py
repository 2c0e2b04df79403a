"""What a vLLM of its own environment generates with adapters, greedily, on a CPU: read by test_serving_vllm.py.

DIR/bin/python vllm_greedy.py MODEL MAX_RANK PROMPT_IDS ADAPTER...    # prints a JSON object as its last line
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def generate(llm: Any, prompt: list[int], request: Any) -> dict[str, Any]:
    """Return tokens and the log-probability of each, or what the adapter was refused with."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    parameters = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False)
    try:
        if request is not None:
            llm.llm_engine.add_lora(request)
        found = llm.generate([{"prompt_token_ids": prompt}], parameters, lora_request=request, use_tqdm=False)
    except Exception as error:  # vLLM's engine wraps what its worker raised in several kinds
        return {"refused": str(error)}
    [made] = found[0].outputs
    return {
        "tokens": list(made.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)],
    }


def main() -> None:
    """Serve the base model and every adapter in turn, in one process."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    model, max_rank, prompt, *adapters = sys.argv[1:]
    llm = LLM(
        model, dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=int(max_rank), max_loras=1,
        max_model_len=64, max_num_seqs=2, skip_tokenizer_init=True, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    ids = json.loads(prompt)
    found = {"base": generate(llm, ids, None)}
    for index, adapter in enumerate(adapters, 1):
        found[Path(adapter).name] = generate(llm, ids, LoRARequest(Path(adapter).name, index, adapter))
    sys.stdout.flush()
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()

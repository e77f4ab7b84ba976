"""The files under examples/launch are what accelerate, and Trainer for DeepSpeed, take; DeepSpeed itself is not run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers.integrations import deepspeed

FOLDER = Path(__file__).parents[2] / "examples" / "launch"


def launch_arguments(name: str) -> Any:
    """As `accelerate launch --config_file` understands a file; keys that it does not know are errors."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "train.py"])
    return _validate_launch_command(arguments)[0]


def test_every_file_is_tested() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"ddp.yaml", "fsdp2.yaml", *(f"zero{n}.{kind}" for n in (2, 3) for kind in ("yaml", "json"))}


def test_ddp() -> None:
    arguments = launch_arguments("ddp.yaml")
    assert (arguments.multi_gpu, arguments.num_processes, arguments.mixed_precision) == (True, 2, "bf16")


def test_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_arguments("fsdp2.yaml")
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name not in os.environ:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def placeholders(config: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from placeholders(value, f"{path}{key}.")
        elif value == "auto":
            yield path + key


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage: int) -> None:
    arguments = launch_arguments(f"zero{stage}.yaml")
    assert arguments.use_deepspeed
    assert not arguments.zero3_init_flag
    path = FOLDER.parents[1] / arguments.deepspeed_config_file
    config = HfDeepSpeedConfig(str(path))
    assert config.get_value("zero_optimization.stage") == stage
    assert config.is_zero3() == (stage == 3)
    source = Path(deepspeed.__file__).read_text()
    assert [name for name in placeholders(config.config) if f'"{name}"' not in source] == []  # Trainer fills the others

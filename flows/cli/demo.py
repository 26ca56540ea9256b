"""The inputs of `qrpo demo`."""

import shutil
from pathlib import Path

from tasks.config import PipelineConfig, load_config

__all__ = ["demo_config"]

_EXAMPLE = Path(__file__).parents[2] / "examples" / "demo"


def demo_config(folder: Path = Path("demo")) -> PipelineConfig:
    """Write prompts, base model, reward and YAML file into `folder` and return the configuration.

    Existing files are kept, so an edited demo runs as edited.
    """
    if not (folder / "base" / "config.json").is_file():
        from examples.demo.task import write_demo  # imports torch, to build a model

        write_demo(folder)
    for name in ("config.yaml", "reward.py"):
        if not (folder / name).exists():
            shutil.copy(_EXAMPLE / name, folder / name)
    return load_config(folder / "config.yaml")

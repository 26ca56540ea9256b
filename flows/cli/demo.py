"""`qrpo demo`: the example's inputs, made on the spot, and their configuration."""

import shutil
from pathlib import Path

from tasks.config import PipelineConfig, load_config

__all__ = ["demo_config"]

_EXAMPLE = Path(__file__).parents[2] / "examples" / "demo"


def demo_config(folder: Path = Path("demo")) -> PipelineConfig:
    """The demo's configuration, after its prompts, base model, reward and YAML file were put into `folder`.

    What is there already stays, so that an edited demo is run as it was edited.
    """
    if not (folder / "base" / "config.json").is_file():
        from examples.demo.task import write_demo  # loads torch, to build a model

        write_demo(folder)
    for name in ("config.yaml", "reward.py"):
        if not (folder / name).exists():
            shutil.copy(_EXAMPLE / name, folder / name)
    return load_config(folder / "config.yaml")

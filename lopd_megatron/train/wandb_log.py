"""Weights & Biases: the only file that imports wandb. Its key comes from the environment."""

from __future__ import annotations

from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError


class WandbLog:
    """A run with a fixed id, so that a resumed job goes on in the same curve."""

    def __init__(self, config: RunConfig, resumed_iteration: int) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"train.wandb_project={config.train.wandb_project!r} needs the wandb package; "
                "install lopd_megatron[wandb], or leave the setting empty"
            ) from None
        self._run: Any = wandb.init(
            project=config.train.wandb_project,
            id=config.name,
            name=config.name,
            resume="allow",
            dir=str(config.paths.logs),
            config=config.model_dump(mode="json"),
        )

    def write(self, iteration: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=iteration)

    def close(self) -> None:
        self._run.finish()

"""The hooks that every run has."""

from __future__ import annotations

from lopd_megatron.config import RunConfig
from lopd_megatron.data.held_out import held_out_prefixes
from lopd_megatron.train.first_logprobs import FirstLogprobs
from lopd_megatron.train.hooks import SaveHook, StopHook
from lopd_megatron.train.log import LogHook
from lopd_megatron.train.profile import ProfileHook
from lopd_megatron.train.staleness import StalenessHook
from lopd_megatron.train.state import Hook
from lopd_megatron.train.validate import ValidateHook
from lopd_megatron.train.warning_log import WarningLog
from lopd_megatron.train.watch import WatchHook


def standard_hooks(config: RunConfig) -> list[Hook]:
    """In the order in which they act after a step: what ends the run, what is measured, what is kept."""
    warnings = WarningLog(config.paths.warnings)
    validates = config.train.eval_interval > 0 and bool(held_out_prefixes(config))
    trains_on_stored_rollouts = config.needs_teacher and not config.online.enabled
    hooks: list[Hook] = [
        *([] if config.online.enabled else [FirstLogprobs(config)]),  # servers are compared at every transfer
        warnings,
        WatchHook(warnings),
        *([ValidateHook(config, warnings)] if validates else []),
        *([StalenessHook(config.staleness, warnings)] if trains_on_stored_rollouts else []),
        LogHook(config),
        SaveHook(),
        *([ProfileHook(config)] if config.train.profile_iters else []),
    ]
    # Made last: it takes over the signals that should still end a process whose settings are wrong.
    return [StopHook(config.train.exit_duration_in_mins), *hooks]

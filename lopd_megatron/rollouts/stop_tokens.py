"""Do student and teacher end a response with the same tokens?

A base model often ends with another id than the instruct model that teaches it. Then the student's stop token
gets a large negative advantage, the teacher's own one is never sampled, and responses grow without end.
"""

from __future__ import annotations

from collections.abc import Sequence

from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line
from lopd_megatron.rollouts.rollout_stage import stop_token_ids


def check_stop_tokens(rollout_ids: Sequence[int], teacher: str, allow_mismatch: str = "") -> None:
    """Compare the ids that end rollouts with those of the teacher's generation config.

    None in common is a UserError unless `allow_mismatch` gives a reason; other ids are a warning. Nothing is
    said where one side names none.
    """
    ours, theirs = set(rollout_ids), set(stop_token_ids(teacher))
    if not ours or not theirs or ours == theirs:
        return
    text = f"rollouts end with the token ids {sorted(ours)}, the teacher {teacher} ends with {sorted(theirs)}"
    if not ours & theirs and not allow_mismatch:
        raise UserError(
            f"{text}: none in common, so the student would learn not to stop; correct eos_token_id in "
            "generation_config.json of one of them and make the rollouts again, add to "
            "rollouts.stop_token_ids, or set lineage.allow_mismatch=REASON"
        )
    log_line(f"warning: {text}; look at the teacher's log-prob of the stop token in the dataset's manifest")

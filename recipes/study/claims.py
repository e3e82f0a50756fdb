"""What the papers claim, as differences between cells of recipes/study/tiny.py."""

from __future__ import annotations

from lopd_megatron.study.statistics import Claim, at_iteration, quality, total_seconds

LIGHTNING, EFFOPD, OURS = "Lightning OPD", "EffOPD", "this project"
POINT = 0.01


def _greedy(
    source: str, text: str, better: str, worse: str, margin: float = 0.0, less: tuple[str, str] | None = None
) -> Claim:
    return Claim(source, text, better, worse, quality("greedy"), "points", 100.0, margin, less)


def _sampled(
    source: str, text: str, better: str, worse: str, margin: float = 0.0, less: tuple[str, str] | None = None
) -> Claim:
    return Claim(source, text, better, worse, quality("sampled"), "points at T = 1", 100.0, margin, less)


def _early(text: str, better: str, worse: str, iteration: int) -> Claim:
    unit = f"points of validation accuracy after {iteration} iterations"
    return Claim(EFFOPD, text, better, worse, at_iteration(iteration), unit, 100.0)


CLAIMS = [
    _greedy(LIGHTNING, "Lightning OPD improves on its SFT student", "lightning", "sft"),
    _greedy(LIGHTNING, "… and on more SFT with the same data", "lightning", "more_sft"),
    _greedy(
        LIGHTNING, "Lightning OPD is not worse than standard OPD (1 point)", "lightning", "standard", POINT
    ),
    _sampled(LIGHTNING, "… nor when it samples", "lightning", "standard", POINT),
    _greedy(LIGHTNING, "… nor than SFT on fresh answers of the teacher", "lightning", "sft_fresh", POINT),
    Claim(
        LIGHTNING,
        "Lightning OPD costs less than standard OPD",
        "lightning",
        "standard",
        lambda result: -total_seconds(result),
        "seconds saved",
    ),
    _greedy(LIGHTNING, "One teacher (A, A) beats two (A, B), offline", "lightning", "lightning_a_b"),
    _sampled(LIGHTNING, "… when it samples", "lightning", "lightning_a_b"),
    _greedy(LIGHTNING, "One teacher (B, B) beats two (B, A), offline", "lightning_b_b", "lightning_b_a"),
    _sampled(LIGHTNING, "… when it samples", "lightning_b_b", "lightning_b_a"),
    _greedy(LIGHTNING, "One teacher (A, A) beats two (A, B), online", "standard", "standard_a_b"),
    _sampled(LIGHTNING, "… when it samples", "standard", "standard_a_b"),
    _greedy(
        LIGHTNING,
        "Two teachers cost more offline than online",
        "lightning",
        "lightning_a_b",
        less=("standard", "standard_a_b"),
    ),
    _sampled(
        LIGHTNING,
        "… when it samples",
        "lightning",
        "lightning_a_b",
        less=("standard", "standard_a_b"),
    ),
    _greedy(LIGHTNING, "A teacher of another style costs more still", "lightning", "lightning_a_hard_b"),
    _greedy(
        OURS, "Clipping at 0.5 nats beats no clip (the released code)", "lightning", "lightning_clip_none"
    ),
    _greedy(OURS, "… and the clip of the paper, 10", "lightning", "lightning_clip_10.0"),
    _greedy(OURS, "Offline with top-1 is not worse than standard OPD", "lightning_topk_1", "standard", POINT),
    _sampled(OURS, "… nor when it samples", "lightning_topk_1", "standard", POINT),
    _sampled(OURS, "… nor than standard OPD with top-1", "lightning_topk_1", "standard_topk_1", POINT),
    _sampled(OURS, "More than one teacher token helps", "lightning_topk_16", "lightning_topk_1"),
    _sampled(
        OURS, "Reverse KL over the classes beats forward KL", "lightning_topk_1", "lightning_forward_topk_1"
    ),
    _sampled(OURS, "Top-1 survives a second teacher", "lightning_topk_1_a_b", "lightning_a_b"),
    _sampled(
        OURS,
        "Top-1 is not worse than standard OPD with a soft teacher",
        "lightning_topk_1_soft",
        "standard_soft",
        POINT,
    ),
    _sampled(
        OURS, "… nor than standard OPD with top-1", "lightning_topk_1_soft", "standard_topk_1_soft", POINT
    ),
    _sampled(
        OURS, "A soft teacher needs more than one token", "lightning_topk_4_soft", "lightning_topk_1_soft"
    ),
    _greedy(OURS, "Two rounds beat one", "lightning_2_rounds", "lightning"),
    _greedy(OURS, "Five rounds beat two", "lightning_5_rounds", "lightning_2_rounds"),
    _greedy(OURS, "2,000 prompts × 1 beat 500 × 4", "lightning", "lightning_500x4"),
    _sampled(OURS, "… with top-1, too", "lightning_topk_1", "lightning_topk_1_500x4"),
    _greedy(OURS, "Overlapping by one step costs nothing (1 point)", "standard_overlap", "standard", POINT),
    _early("EffOPD is ahead early (top-k score, Lightning)", "lightning_effopd_topk_kl", "lightning", 25),
    _early("… on standard OPD", "standard_effopd_topk_kl", "standard", 25),
    _early("… on Lightning with top-1", "lightning_topk_1_effopd_topk_kl", "lightning_topk_1", 25),
    _early("… with the score of the paper, accuracy", "lightning_effopd_accuracy", "lightning", 25),
    _greedy(EFFOPD, "It ends no worse (top-k score)", "lightning_effopd_topk_kl", "lightning", POINT),
    _greedy(
        EFFOPD,
        "It ends no worse (held-out squared log-ratio)",
        "lightning_effopd_squared_log_ratio",
        "lightning",
        POINT,
    ),
    _greedy(EFFOPD, "It ends no worse (accuracy)", "lightning_effopd_accuracy", "lightning", POINT),
    _greedy(EFFOPD, "It ends no worse on standard OPD", "standard_effopd_topk_kl", "standard", POINT),
]

"""Which metrics are drawn, and how they are explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lopd_megatron.config import RunConfig
from lopd_megatron.report.svg import Line, line_chart
from lopd_megatron.train.held_out import Validation

DECILES = 10

Metrics = Sequence[dict[str, Any]]

_TRAINING = (
    ("loss", "what is minimised; of an advantage-weighted loss only the gradient has a meaning"),
    ("reverse_kl", "KL(π_θ ‖ π_T) over the teacher's top-k, the sampled token and the rest, nats"),
    ("kl_estimate", "KL(π_θ ‖ π_T) over the vocabulary, estimated: k tokens and a weighted sample, nats"),
    ("log_ratio_mean", "log π_θ − log π_T on stored tokens, nats; not a KL once the student has moved"),
    ("k2", "½ (log π_θ − log π_T)², the loss without clip"),
    ("entropy", "of the student's next-token distribution, nats"),
    ("student_logprobs", "log π_θ of the trained tokens, nats"),
    ("clip_fraction", "tokens whose advantage is beyond ±τ"),
    ("grad_norm", "before clipping"),
    ("lr", "learning rate"),
    ("tokens_per_second_per_gpu", "per process on a CPU"),
    ("iteration_time_ms", "milliseconds per optimizer step"),
    ("mfu", "FLOPs of the model over the peak of the accelerator"),
    ("peak_memory_gib", "largest over the ranks"),
)


@dataclass(frozen=True)
class Figure:
    title: str
    explanation: str
    chart: Markup
    labels: tuple[str, ...] = ()
    """Of several lines, in the order of their colours."""


def training_figures(metrics: Metrics) -> list[Figure]:
    """One figure per metric that was logged, the held-out value beside it where there is one."""
    found = []
    for name, explanation in _TRAINING:
        lines = [_line(metrics, name, "trained on"), _line(metrics, f"valid_{name}", "held out")]
        lines = [line for line in lines if line.points]
        if lines:
            labels = tuple(line.label for line in lines) if len(lines) > 1 else ()
            found.append(Figure(name, explanation, line_chart(lines), labels))
    return found


def held_out_figures(validations: Sequence[Validation]) -> list[Figure]:
    """The value that a run is judged by and the estimate of the whole KL, ± their standard errors."""
    estimates = [e for e in (validation.kl_estimate for validation in validations) if e is not None]
    return [_held_out_figure(values) for values in (validations, estimates) if values]


def _held_out_figure(validations: Sequence[Validation]) -> Figure:
    points = [(validation.iteration, validation.value) for validation in validations]
    errors = [min(validation.standard_error, 1e9) for validation in validations]
    metric = validations[-1].metric
    return Figure(
        f"held-out {metric}",
        f"{MEANING[metric]}; ± one standard error over documents",
        line_chart([Line(metric, points, errors)], markers=True),
    )


MEANING = {
    "reverse_kl": "KL(π_θ ‖ π_T) over token classes on held-out documents, nats per token",
    "k2": "½ (log π_θ − log π_T)² of the sampled token on held-out documents",
    "kl_estimate": "KL(π_θ ‖ π_T) over the vocabulary, estimated on held-out documents, nats per token",
    "loss": "−log π_θ of the sampled token on held-out documents, nats",
}


def position_figures(metrics: Metrics) -> list[Figure]:
    """Gap and drift by tenth of the response, at the first and the last logged step."""
    found = []
    for name, title, explanation in (
        (
            "teacher_student_gap_decile",
            "teacher − student by position",
            "log π_T − log π_θ, nats; 0: they agree",
        ),
        ("drift_kl_decile", "drift by position", "log π_rollout − log π_θ, nats; 0: the rollouts are fresh"),
    ):
        lines = []
        for label, line in (("first", metrics[:1]), ("last", metrics[-1:])):
            points = [
                (i + 0.5, row[f"{name}_{i}"]) for row in line for i in range(DECILES) if f"{name}_{i}" in row
            ]
            if points:
                lines.append(Line(f"{label} step", points))
        if lines:
            chart = line_chart(lines, x_label="tenth of the response", from_zero=True, markers=True)
            found.append(Figure(title, explanation, chart, ("first step", "last step")))
    return found


def staleness_figures(metrics: Metrics, config: RunConfig | None) -> list[Figure]:
    """Is the student still near the policy that wrote the rollouts?"""
    limits = config.staleness if config else None
    found = []
    ratio = _line(metrics, "importance_ratio_mean", "mean")
    if ratio.points:
        spread = [row["importance_ratio_std"] for row in metrics if "importance_ratio_mean" in row]
        chart = line_chart([Line(ratio.label, ratio.points, spread)], limit=1.0)
        found.append(
            Figure("importance ratio", "π_θ / π_rollout per token: mean, ± one standard deviation", chart)
        )
    for name, explanation, limit in (
        (
            "effective_sample_fraction",
            "(Σ w)² / (n Σ w²); 1 on fresh rollouts; the dashed line asks for new ones",
            limits.min_effective_sample_fraction if limits else None,
        ),
        (
            "drift_kl",
            "log π_rollout − log π_θ, nats per token; the dashed line asks for new ones",
            limits.max_drift_kl if limits else None,
        ),
    ):
        line = _line(metrics, name, name)
        if line.points:
            found.append(Figure(name, explanation, line_chart([line], limit=limit, from_zero=True)))
    return found


def _line(metrics: Metrics, name: str, label: str) -> Line:
    return Line(label, [(row["iteration"], row[name]) for row in metrics if name in row])

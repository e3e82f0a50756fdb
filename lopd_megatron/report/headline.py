"""The first line of the page: is the trained student better than the one at the start?

Decided on documents whose prompts were not trained, and, where `measure` has run, on fresh responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd_megatron.report.run_folder import RunFolder
from lopd_megatron.report.svg import number
from lopd_megatron.train.held_out import ERRORS, Verdict, change, ratio_error

NAMES = {
    "reverse_kl": "reverse KL to the teacher, held out",
    "k2": "k2 (½ squared log-ratio to the teacher), held out",
    "loss": "loss, held out",
    "kl_estimate": "estimate of the KL over the whole vocabulary, held out",
}
FRESH = {
    "kl_estimate": "KL to the teacher over the whole vocabulary, fresh responses",
    "class_kl": "class KL to the teacher, fresh responses",
}


@dataclass(frozen=True)
class Headline:
    """Before → after of one value, of which less is better."""

    what: str
    before: float
    after: float
    difference: float
    standard_error: float
    verdict: Verdict
    detail: str

    @property
    def text(self) -> str:
        return (
            f"{self.what}: {number(self.before)} → {number(self.after)} "
            f"(difference {self.difference:+.3g} ± {self.standard_error:.2g}; {self.detail})"
        )


def headlines(run: RunFolder) -> list[Headline]:
    """The held-out value first, then what was measured on fresh responses; [] where neither is there."""
    found = []
    estimates = [e for e in (validation.kl_estimate for validation in run.validations) if e is not None]
    for validated in (change(run.validations), change(estimates)):
        if validated is not None:
            best = f"best at iteration {validated.best.iteration}: {number(validated.best.value)}"
            found.append(
                Headline(
                    NAMES[validated.before.metric],
                    validated.before.value,
                    validated.after.value,
                    validated.difference,
                    validated.standard_error,
                    validated.verdict,
                    f"{len(validated.before.sums)} documents; {best}",
                )
            )
    if {"before", "after"} <= run.measurements.keys():
        found += [_fresh(run.measurements, name) for name in FRESH]
    return found


def _fresh(measurements: dict[str, dict[str, Any]], name: str) -> Headline:
    before, after = measurements["before"], measurements["after"]
    difference = after[name]["value"] - before[name]["value"]
    error = _paired_error(before, after, name)
    verdict: Verdict = "no change"
    if abs(difference) > ERRORS * error:
        verdict = "better" if difference < 0 else "worse"
    detail = f"{after['prompts']} prompts, {after['response_tokens']:,} tokens after"
    return Headline(
        FRESH[name], before[name]["value"], after[name]["value"], difference, error, verdict, detail
    )


def _paired_error(before: dict[str, Any], after: dict[str, Any], name: str) -> float:
    """Standard error of the difference of two ratios; prompt by prompt where the prompts are the same."""
    if before["prompts"] != after["prompts"]:
        return math.hypot(before[name]["standard_error"], after[name]["standard_error"])
    residuals = np.zeros(after["prompts"])
    for sign, found in ((-1, before), (1, after)):
        tokens = np.array(found["by_prompt"]["tokens"])
        sums = np.array(found["by_prompt"][name])
        residuals += sign * (sums - found[name]["value"] * tokens) / tokens.sum()
    return ratio_error(residuals, np.array([1.0]))

"""What this trainer lacks against the software of the published runs, and what each item costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lopd_megatron.performance.prediction import fitted_model
from lopd_megatron.performance.software import Software
from lopd_megatron.performance.step_time import Step

DIFFERENCES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("norms, rotary embedding and SwiGLU as single kernels", {"fused_layers": True}),
    ("the weight product adds its gradient itself", {"accumulation_bytes": 0.0}),
    ("gradients reduced in bfloat16", {"gradient_bytes": 2}),
    ("gradient reduction and parameter gather overlap", {"overlap_data": True}),
    ("TP collectives overlap with their products", {"overlap_tensor": True}),
    ("experts of a rank as one grouped product", {"sequential_experts": False}),
    ("experts reached by HybridEP instead of all-to-all", {"dispatcher": "hybridep"}),
    ("all-to-all of one micro-batch beside the next one's work", {"overlap_experts": True}),
    ("CUDA graphs of the whole step", {"graphs": "full"}),
    ("casts and activation inside the experts' kernel", {"fused_experts": True}),
)
"""(what would change, the settings that say so), in the order in which they are added up."""


def price_list(step: Step) -> list[tuple[str, float, float]]:
    """(item, seconds of the step before it, seconds with it), one after the other."""
    model = fitted_model()
    found = []
    software: Software = step.software
    before = model.predict(step).seconds
    for name, settings in DIFFERENCES:
        if "fused_experts" in settings and step.precision == "bf16":  # that kernel casts, too
            continue
        software = replace(software, **settings)
        after = model.predict(replace(step, software=software)).seconds
        found.append((name, before, after))
        before = after
    return found

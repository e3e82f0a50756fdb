"""The verbs of `lopd`: one file each, from the command line to the room that does the work."""

from __future__ import annotations

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "look": {
        "recipes": ("lopd_megatron.commands.show:recipes", "list the shipped recipes"),
        "show": (
            "lopd_megatron.commands.show:main",
            "print a recipe, or what differs from the defaults",
        ),
        "settings": ("lopd_megatron.commands.settings:main", "list settings: type, default, meaning"),
        "doctor": ("lopd_megatron.commands.doctor:main", "check this machine"),
        "plan": ("lopd_megatron.commands.plan:main", "predict memory and time of layouts"),
    },
    "run": {
        "demo": ("lopd_megatron.commands.demo:main", "the whole pipeline on a tiny task, on a CPU"),
        "run": ("lopd_megatron.commands.run:main", "run stages here, as Slurm jobs, or through NeMo-Run"),
        "data": ("lopd_megatron.commands.data:main", "download the data of the paper"),
        "prompts": ("lopd_megatron.commands.prompts:main", "data sets → prompts"),
        "rollouts": ("lopd_megatron.commands.rollouts:main", "prompts → rollouts"),
        "scores": ("lopd_megatron.commands.scores:main", "rollouts → teacher scores"),
        "dataset": ("lopd_megatron.commands.dataset:main", "scores → dataset"),
        "train": ("lopd_megatron.commands.train:main", "dataset → checkpoints"),
        "export": ("lopd_megatron.commands.export:main", "checkpoint → Hugging Face folder"),
        "evaluate": ("lopd_megatron.commands.evaluate:main", "problems → accuracy"),
        "measure": ("lopd_megatron.evaluation.measure:main", "KL to the teacher on fresh responses"),
        "serve": ("lopd_megatron.commands.servers:serve", "a vLLM server for standard OPD on several nodes"),
    },
    "check": {
        "inspect": ("lopd_megatron.commands.inspect:main", "what a dataset holds"),
        "verify": ("lopd_megatron.commands.verify:main", "score stored rollouts again and compare"),
        "report": ("lopd_megatron.commands.report:main", "a run as one HTML page"),
        "convert": ("lopd_megatron.commands.convert:main", "weights between Hugging Face and Megatron"),
        "analyze": ("lopd_megatron.commands.analyze:main", "spectra of weight updates"),
    },
    "more": {
        "study": ("lopd_megatron.commands.study:main", "compare all methods on the tiny task"),
        "tiny-task": ("lopd_megatron.commands.tiny_task:main", "make the tiny task"),
        "completion": ("lopd_megatron.commands.completion:main", "shell completion for bash and zsh"),
    },
}
VERBS = {verb: entry for group in GROUPS.values() for verb, entry in group.items()}
"""Verb → (module:function, what it does). A new verb is one line."""

"""How long a step and a whole run take: a model of time from shapes, fitted to published runs."""

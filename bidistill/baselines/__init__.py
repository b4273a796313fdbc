"""Published unlearning methods on the same data, steps and budget: see ``docs/baselines.md``."""

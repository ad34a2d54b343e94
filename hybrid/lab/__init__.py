"""Experiments with expert caches, from files or from Python: `load` one, `run` it, look at its `outcomes`, `report` it.

from hybrid import lab

experiment = lab.load("experiment.toml")
lab.run(experiment, workers=2)
for row in lab.table(experiment):
    print(row["policy"], row["slots"], row["hit_rate"])
lab.report(experiment)
"""

from hybrid.lab.claims import Finding, claims
from hybrid.lab.experiment import Experiment, load
from hybrid.lab.outcomes import Outcome, outcomes, table
from hybrid.lab.replays import Replay, run, status
from hybrid.lab.report import report

__all__ = [
    "Experiment",
    "Finding",
    "Outcome",
    "Replay",
    "claims",
    "load",
    "outcomes",
    "report",
    "run",
    "status",
    "table",
]

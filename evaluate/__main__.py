"""`python -m evaluate embed | classify | perturb | stats | map | report`."""

import sys

from corpus.settings import Command, main
from evaluate.commands import ClassifyCommand, EmbedCommand, ReportCommand
from evaluate.map_commands import MapCommand
from evaluate.perturb_commands import PerturbCommand
from evaluate.stats_commands import StatsCommand

VERBS: dict[str, type[Command]] = {
    "embed": EmbedCommand,
    "classify": ClassifyCommand,
    "perturb": PerturbCommand,
    "stats": StatsCommand,
    "map": MapCommand,
    "report": ReportCommand,
}

if __name__ == "__main__":
    sys.exit(main("evaluate", VERBS))

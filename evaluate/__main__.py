"""`python -m evaluate embed | classify | perturb | stats | report`."""

import sys

from corpus.settings import Command, main
from evaluate.commands import ClassifyCommand, EmbedCommand, ReportCommand
from evaluate.perturb_commands import PerturbCommand, StatsCommand

VERBS: dict[str, type[Command]] = {
    "embed": EmbedCommand,
    "classify": ClassifyCommand,
    "perturb": PerturbCommand,
    "stats": StatsCommand,
    "report": ReportCommand,
}

if __name__ == "__main__":
    sys.exit(main("evaluate", VERBS))

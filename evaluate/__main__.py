"""`python -m evaluate embed | classify | perturb | screen | stats | map | report`."""

import sys

from corpus.settings import Command, main
from evaluate.commands import ClassifyCommand, EmbedCommand, ReportCommand
from evaluate.map_commands import MapCommand
from evaluate.perturb_commands import PerturbCommand, ScreenCommand
from evaluate.stats_commands import StatsCommand

VERBS: dict[str, type[Command]] = {
    "embed": EmbedCommand,
    "classify": ClassifyCommand,
    "perturb": PerturbCommand,
    "screen": ScreenCommand,
    "stats": StatsCommand,
    "map": MapCommand,
    "report": ReportCommand,
}

if __name__ == "__main__":
    sys.exit(main("evaluate", VERBS))

"""The verb `stats`. What it needs is imported when it runs: scipy and matplotlib would slow down `--help`."""

from corpus.settings import Command, Uri
from evaluate.stats_settings import StatsSettings


class StatsCommand(Command):
    """Turn the shifts of a scan into one row per gene: effect, interval, p-value, FDR; and pictures."""

    shifts: Uri
    """Folder of a finished scan."""
    out: Uri
    """Folder for genes.parquet, genes.csv, summary.json and the pictures."""
    stats: StatsSettings = StatsSettings()

    def run(self) -> None:
        """Test genes and write the tables."""
        from evaluate.stats_report import describe, write_stats

        genes = write_stats(self.shifts, self.out, self.stats)
        print(f"{describe(genes, self.stats)}\n{self.out}")

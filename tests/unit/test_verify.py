"""`ingest verify`: every kind of damage is found, also where somebody made the hashes fit afterwards."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from corpus.errors import UserError
from corpus.hashing import digest_table
from corpus.manifest import Manifest, Unit
from corpus.shards import shard_bytes
from corpus.store import Store
from ingest.verify import verify
from tests.factories import write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", num_cells=60, num_shards=3)


def failures(corpus: Path) -> list[str]:
    """Names of the invariants that do not hold."""
    return [check.name for check in verify(str(corpus)) if check.faults]


def units(corpus: Path) -> list[Unit]:
    return Manifest.read(Store(corpus)).units


def rewrite(corpus: Path, **changes: Any) -> None:
    """Edit the manifest, as nobody may."""
    path = corpus / "manifests/000001.json"
    path.write_bytes(Manifest.read(Store(corpus)).model_copy(update=changes).to_json())


def forge(corpus: Path, change: Callable[[pa.Table], pa.Table], position: int = 1) -> None:
    """Change a shard's rows, and then its hashes in record and manifest, so that only the content can tell."""
    every = units(corpus)
    unit = every[position]
    table = change(pq.read_table(corpus / unit.shard).combine_chunks())
    data = shard_bytes(table)
    (corpus / unit.shard).write_bytes(data)
    every[position] = unit.model_copy(
        update={
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "content_sha256": digest_table(table),
        }
    )
    (corpus / unit.record).write_bytes(every[position].to_json())
    rewrite(corpus, units=every)


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def edited(name: str, edit: Callable[[list[Any]], None]) -> Callable[[pa.Table], pa.Table]:
    """A change that edits one column as a Python list."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        edit(values)
        return replaced(table, name, values)

    return change


def swap_tokens(table: pa.Table) -> pa.Table:
    """Exchange the first two entries of the fourth cell, tokens and counts alike."""
    for name in ("tokens", "counts"):
        values = table[name].to_pylist()
        values[3][0], values[3][1] = values[3][1], values[3][0]
        table = replaced(table, name, values)
    return table


def repeat_token(table: pa.Table) -> pa.Table:
    """Give the second entry of a cell the token and count of the first."""
    for name in ("tokens", "counts"):
        values = table[name].to_pylist()
        values[2][1] = values[2][0]
        table = replaced(table, name, values)
    return table


def set_entry(cell: int, entry: int, value: int) -> Callable[[list[Any]], None]:
    def edit(values: list[Any]) -> None:
        values[cell][entry] = value

    return edit


def shorten(values: list[Any]) -> None:
    values[0] = values[0][:-1]


def test_a_sound_corpus_passes(corpus: Path) -> None:
    checks = list(verify(str(corpus)))
    assert len(checks) == 10
    assert not [check for check in checks if check.faults]
    assert all(str(check).startswith("ok ") for check in checks)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.98])
def test_one_flipped_bit_in_a_shard(corpus: Path, place: float) -> None:
    path = corpus / units(corpus)[1].shard
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    path.write_bytes(data)
    assert any("SHA-256" in name for name in failures(corpus))


def test_a_missing_shard(corpus: Path) -> None:
    (corpus / units(corpus)[2].shard).unlink()
    found = failures(corpus)
    assert any("SHA-256" in name for name in found)
    assert any("60 cells" in name for name in found)


def test_a_truncated_shard(corpus: Path) -> None:
    path = corpus / units(corpus)[0].shard
    path.write_bytes(path.read_bytes()[:-9])
    assert any("SHA-256" in name for name in failures(corpus))


def test_two_shards_exchanged(corpus: Path) -> None:
    first, second = (corpus / unit.shard for unit in units(corpus)[:2])
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert any("SHA-256" in name for name in failures(corpus))


FORGED = {
    "two tokens of a cell exchanged": (swap_tokens, "rank order"),
    "a token repeated": (repeat_token, "rank order"),
    "a token beyond the vocabulary": (edited("tokens", set_entry(0, 0, 60_000)), "rank order"),
    "a special token among genes": (edited("tokens", set_entry(0, 0, 0)), "rank order"),
    "a count of zero": (edited("counts", set_entry(1, -1, 0)), "rank order"),
    "a count that changes the order": (edited("counts", set_entry(1, -1, 1_000_000)), "rank order"),
    "more counts on tokens than the cell has": (edited("n_counts", lambda v: v.__setitem__(4, 1)), "lengths agree"),
    "a wrong length": (edited("length", lambda v: v.__setitem__(4, v[4] + 1)), "lengths agree"),
    "fewer counts than tokens": (edited("counts", shorten), "lengths agree"),
    "a cell id twice in a shard": (edited("cell_id", lambda v: v.__setitem__(4, v[5])), "ids are unique"),
    "a cell id of another shard": (edited("cell_id", lambda v: v.__setitem__(4, "toy:cell1")), "ids are unique"),
    "a row lost": (lambda table: table.slice(1), "add up"),
    "a row repeated": (lambda table: pa.concat_tables([table, table.slice(0, 1)]).combine_chunks(), "add up"),
    "a column lost": (lambda table: table.drop_columns(["tissue"]), "columns and types"),
    "a column of another type": (
        lambda table: table.set_column(
            table.schema.get_field_index("n_genes"), "n_genes", pc.cast(table["n_genes"], pa.int64())
        ),
        "columns and types",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_wrong_content_under_fitting_hashes(corpus: Path, what: str) -> None:
    change, message = FORGED[what]
    forge(corpus, change)
    assert any(message in name for name in failures(corpus)), failures(corpus)


def test_a_changed_label_without_its_hash(corpus: Path) -> None:
    """Bytes that fit the manifest, content that does not: only the content hash can tell."""
    every = units(corpus)
    forge(corpus, edited("cell_type", lambda v: v.__setitem__(0, "gamma")))
    forged = units(corpus)[1]
    changed = forged.model_copy(update={"content_sha256": every[1].content_sha256})
    (corpus / changed.record).write_bytes(changed.to_json())
    rewrite(corpus, units=[every[0], changed, every[2]])
    assert failures(corpus) == ["the decoded columns have the content hash of the manifest"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 21}, "add up"),
        ({"stop": 999}, "add up"),
        ({"dropped": {"no_counts": 1}}, "add up"),
        ({"row_groups": [10, 10]}, "add up"),
        ({"num_tokens": 1}, "add up"),
        ({"size_bytes": 1}, "SHA-256"),
        ({"sha256": "0" * 64}, "SHA-256"),
        ({"content_sha256": "0" * 64}, "content hash"),
        ({"dataset_id": "another"}, "unit's record"),
    ],
)
def test_a_wrong_figure_in_the_manifest(corpus: Path, change: dict[str, Any], message: str) -> None:
    every = units(corpus)
    every[0] = every[0].model_copy(update=change)
    rewrite(corpus, units=every)
    found = failures(corpus)
    assert any(message in name for name in found)
    assert any("unit's record" in name for name in found)


def test_a_missing_and_a_broken_record(corpus: Path) -> None:
    (corpus / units(corpus)[0].record).unlink()
    assert any("unit's record" in name for name in failures(corpus))
    (corpus / units(corpus)[0].record).write_text('{"unit_id": 1')
    assert any("unit's record" in name for name in failures(corpus))


def test_a_unit_listed_twice(corpus: Path) -> None:
    every = units(corpus)
    rewrite(corpus, units=[*every, every[0]])
    assert any("ids are unique" in name for name in failures(corpus))


def test_a_gene_table_that_was_changed(corpus: Path) -> None:
    manifest = Manifest.read(Store(corpus))
    table = pq.read_table(corpus / manifest.genes)
    medians = table["median"].to_numpy().copy()
    medians[0] = np.nextafter(medians[0], 2)
    pq.write_table(replaced(table, "median", medians), corpus / manifest.genes)
    with pytest.raises(UserError, match="the file was changed"):
        list(verify(str(corpus)))


def test_a_manifest_with_another_genes_hash(corpus: Path) -> None:
    rewrite(corpus, genes_hash="0" * 16)
    assert failures(corpus) == ["the gene table has the hash of the manifest"]


@pytest.mark.parametrize("text", ["", "[]", '{"number": 1}', "\x00"])
def test_a_broken_manifest(corpus: Path, text: str) -> None:
    (corpus / "manifests/000001.json").write_text(text)
    with pytest.raises(UserError, match=r"000001\.json: not a corpus manifest"):
        list(verify(str(corpus)))


def test_a_manifest_of_another_version(corpus: Path) -> None:
    path = corpus / "manifests/000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(UserError, match="format version 2; this program reads 1"):
        list(verify(str(corpus)))


def ingest(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ingest", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_command_says_what_failed_by_its_exit_status(corpus: Path, repository: Path) -> None:
    good = ingest("verify", str(corpus), cwd=repository)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.count("\n") == good.stdout.count("ok ") == 10
    forge(corpus, swap_tokens)
    bad = ingest("verify", str(corpus), cwd=repository)
    assert bad.returncode == 1
    assert "FAILED  tokens are unique genes of the vocabulary, in rank order" in bad.stdout
    assert "cell 'toy:cell23': tokens are not in rank order" in bad.stdout
    assert bad.stderr == f"ingest verify: error: {corpus}: 1 of the invariants do not hold\n"
    absent = ingest("verify", str(corpus / "nowhere"), cwd=repository)
    assert absent.returncode == 2
    assert absent.stderr.startswith(f"ingest verify: error: {corpus}/nowhere: no corpus here")

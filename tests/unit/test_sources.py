"""From settings to sources: names, patterns, tables, fingerprints, and staging in bounded memory."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.errors import UserError
from ingest.open import fingerprint
from ingest.plan import expand
from ingest.readers import staging
from ingest.readers.census import parse_query
from ingest.readers.detect import dataset_name, guess_format
from ingest.readers.names import species_of_assembly
from ingest.readers.staging import Transposer, staged
from ingest.settings import IngestSettings, Source
from ingest.sources_table import all_sources, read_sources
from tests.factories_sources import make_counts, mtx_v3


@pytest.mark.parametrize(
    ("uri", "kind", "name"),
    [
        ("/a/b.h5ad", "h5ad", "b"),
        ("s3://k/x/E18.loom", "loom", "E18"),
        ("b/filtered_feature_bc_matrix.h5", "10x_h5", "b"),
        ("s3://k/s1/outs/filtered_feature_bc_matrix.h5", "10x_h5", "s1"),
        ("b/GSM1_matrix.mtx.gz", "mtx", "GSM1_matrix"),
        ("b/E-1.aggregated_filtered_counts.mtx", "mtx", "E-1.aggregated_filtered_counts"),
        ("Lung1_rm.batch_dge.txt.gz", "text", "Lung1_rm.batch_dge"),
        ("b/WT.csv", "text", "WT"),
        ("b/all.tsv.zip", "text", "all"),
        ("b/all.zip", "text", "all"),
        ("b/SRA1_SRS2.sparse.RData", "rdata", "SRA1_SRS2.sparse"),
        ("census://mus_musculus?tissue=lung", "census", "census-mus_musculus"),
    ],
)
def test_format_and_dataset_name_of_a_uri(uri: str, kind: str, name: str) -> None:
    assert guess_format(Source(uri=uri)) == kind
    assert dataset_name(Source(uri=uri)) == name


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").touch()
    with pytest.raises(UserError, match=r"x\.pdf: unknown format: .*set `format` to one of h5ad, loom"):
        guess_format(Source(uri=str(tmp_path / "x.pdf")))
    assert guess_format(Source(uri=str(tmp_path / "x.pdf"), format="text")) == "text"


def test_patterns_find_files_and_folders(tmp_path: Path) -> None:
    for sample in ("s1", "s2"):
        (tmp_path / sample).mkdir()
        mtx_v3(tmp_path / sample, make_counts())
        (tmp_path / f"{sample}.csv").touch()
    found = expand(
        [
            Source(uri=str(tmp_path / "*.csv"), labels={"tissue": "lung"}),
            Source(uri=str(tmp_path / "s1" / "sample" / "*")),
            Source(uri="census://mus_musculus?tissue=lung", dataset_id="c"),
        ]
    )
    assert [(source.dataset_id, source.format) for source in found] == [
        ("s1", "text"),
        ("s2", "text"),
        ("sample", "mtx"),
        ("c", "census"),
    ]
    assert found[1].labels == {"tissue": "lung"}
    with pytest.raises(UserError, match=r"dataset_id 'sample' is taken by .*s1/sample"):
        expand([Source(uri=str(tmp_path / "*" / "sample" / "filtered*"))])
    with pytest.raises(UserError, match="no file matches"):
        expand([Source(uri=str(tmp_path / "*.loom"))])


def test_the_fingerprint_of_a_folder_is_of_every_file_and_of_no_path(tmp_path: Path) -> None:
    counts = make_counts()
    prints = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        prints.append(fingerprint(mtx_v3(tmp_path / place, counts)))
    assert prints[0] == prints[1]
    home = tmp_path / "b" / "sample" / "filtered_feature_bc_matrix"
    (home / "notes.txt").write_text("not part of the source")
    assert fingerprint(Source(uri=str(home))) == prints[0]
    data = (home / "barcodes.tsv.gz").read_bytes()
    (home / "barcodes.tsv.gz").write_bytes(data[:-1] + b"\x01")
    changed, size = fingerprint(Source(uri=str(home)))
    assert changed != prints[0][0]
    assert size == prints[0][1]
    single = tmp_path / "one.csv"
    single.write_bytes(b"x")
    assert fingerprint(Source(uri=str(single))) == (hashlib.sha256(b"x").hexdigest(), 1)


def test_a_table_of_sources(tmp_path: Path) -> None:
    path = tmp_path / "sources.csv"
    path.write_text(
        "uri,dataset_id,format,labels.tissue,obs.cell_type,genomes.refA,obs_filters.filter_pass,sha256\n"
        "a/x.h5ad,,,lung,celltype,,1; True,\n"
        '"a,b/y.txt",why,text,,,mouse,,ab\n'
    )
    first, second = read_sources(str(path))
    assert first == Source(
        uri="a/x.h5ad",
        labels={"tissue": "lung"},
        obs={"cell_type": "celltype"},
        obs_filters={"filter_pass": ["1", "True"]},
    )
    assert second == Source(uri="a,b/y.txt", dataset_id="why", format="text", genomes={"refA": "mouse"}, sha256="ab")
    inline = Source(uri="b.loom")
    assert all_sources(IngestSettings(sources=[inline], sources_table=str(path))) == [inline, first, second]
    with pytest.raises(UserError, match="no sources"):
        all_sources(IngestSettings())


@pytest.mark.parametrize("given", [{"labels": {"genotype": "WT"}}, {"obs": {"genotype": "strain"}}])
def test_a_label_that_the_corpus_would_not_carry_is_refused(given: dict[str, dict[str, str]]) -> None:
    source = Source.model_validate({"uri": "a.csv", **given})
    with pytest.raises(UserError, match=r"a\.csv: the label 'genotype' would be lost: name it in extra_obs"):
        all_sources(IngestSettings(sources=[source]))
    assert all_sources(IngestSettings(sources=[source], extra_obs=["genotype"])) == [source]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,tissue\nx,y\n", "row 2: column 'tissue': unknown column"),
        ("uri,labels\nx,y\n", r"row 2: column 'labels': expected labels\.<name>"),
        ("uri,format\na,h5ad\nx,xls\n", "row 3: format: Input should be"),
        ("uri,format\n,h5ad\n", "row 2: uri: Field required"),
        ("uri,format\nx\n", "row 2: it has fewer fields than the header"),
        ("uri\nx,y\n", "row 2: it has more fields than the header"),
    ],
)
def test_a_wrong_table_names_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sources.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_sources(str(path))


@pytest.mark.parametrize(
    ("uri", "organism", "condition"),
    [
        ("census://mus_musculus", "mus_musculus", "is_primary_data == True"),
        (
            "census://mus_musculus?tissue=lung&tissue=small%20intestine&version=2025-01-30",
            "mus_musculus",
            'tissue in ["lung", "small intestine"] and is_primary_data == True',
        ),
        ("census://homo_sapiens?is_primary_data=false", "homo_sapiens", "is_primary_data == False"),
        ("census://x?is_primary_data=true&is_primary_data=false", "x", ""),
        ("census://x?filter=n%3E5%20or%20m%3D%3D1", "x", "is_primary_data == True and (n>5 or m==1)"),
    ],
)
def test_a_census_query(uri: str, organism: str, condition: str) -> None:
    assert parse_query(uri)[:2] == (organism, condition)


@pytest.mark.parametrize(
    "uri", ["census://", "census://mus musculus", "census://x?tissue", 'census://x?t=a"b', "census://x?a%20b=c"]
)
def test_a_wrong_census_query(uri: str) -> None:
    with pytest.raises(UserError, match="census://"):
        parse_query(uri)


@pytest.mark.parametrize(
    ("name", "species"),
    [("mm10", "mouse"), ("GRCm39", "mouse"), ("mm10-2020-A", "mouse"), ("GRCm38.p6", "mouse"), ("hg38", "human"),
     ("GRCh38_premrna", "human"), ("GRCz11", "zebrafish"), ("mm100", None), ("mine", None), ("", None)],
)  # fmt: skip
def test_species_of_an_assembly(name: str, species: str | None) -> None:
    assert species_of_assembly(name, Source(uri="x")) == species
    assert species_of_assembly(name, Source(uri="x", genomes={name: "rat"})) == "rat"


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(1, 9)), max_size=60),
    st.integers(1, 7),
    st.integers(1, 12),
)
def test_entries_in_any_order_come_back_by_row(
    entries: list[tuple[int, int, int]], parts: int, num_entries: int
) -> None:
    turned = Transposer(9, 6, num_entries)
    table = np.array(entries, np.int64).reshape(-1, 3)
    for part in np.array_split(table, parts):
        turned.add(part[:, 0], part[:, 1], part[:, 2])
    rows = turned.finish()
    whole = sp.coo_matrix((table[:, 2], (table[:, 0], table[:, 1])), (9, 6)).toarray()
    assert (rows.num_rows, rows.num_entries) == (9, len(table))
    for start, stop in ((0, 9), (2, 5), (8, 9), (4, 4)):
        np.testing.assert_array_equal(rows.rows(start, stop).toarray(), whole[start:stop])
    rows.close()


def test_many_buckets_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_BUCKET_ENTRIES", 100)
    rng = np.random.default_rng(0)
    matrix = sp.random(400, 30, 0.2, "coo", random_state=rng, data_rvs=lambda size: rng.integers(1, 1_000_000, size))
    turned = Transposer(400, 30, matrix.nnz)
    for part in np.array_split(rng.permutation(matrix.nnz), 17):
        turned.add(matrix.row[part], matrix.col[part], matrix.data[part])
    np.testing.assert_array_equal(turned.finish().rows(0, 400).toarray(), matrix.toarray())


@pytest.mark.parametrize(
    ("row", "column", "axis"), [(3, 0, "cell"), (-1, 0, "cell"), (0, 2, "feature"), (0, -1, "feature")]
)
def test_an_entry_outside_the_matrix_is_refused(row: int, column: int, axis: str) -> None:
    with pytest.raises(ValueError, match=f"{axis} outside"):
        Transposer(3, 2).add(np.array([row]), np.array([column]), np.array([1]))


def test_positions_beyond_32_bits_do_not_wrap() -> None:
    """Row pointers of a matrix with more than 2^31 entries, without its entries (T18)."""
    rows = staging.StagedRows(4)
    rows.append(np.array([2**31, 2**32]), np.zeros(0), np.zeros(0))
    rows.append(np.array([1]), np.zeros(0), np.zeros(0))
    assert rows.num_entries == 2**31 + 2**32 + 1
    with pytest.raises(OSError, match="ended early"):
        rows.rows(2, 3)
    turned = Transposer(1, np.iinfo(np.uint32).max)
    turned.add(np.zeros(1, int), np.array([np.iinfo(np.uint32).max - 1]), np.ones(1))
    made = turned.finish()
    assert made.rows(0, 1).indices.tolist() == [np.iinfo(np.uint32).max - 1]


def test_a_process_keeps_the_last_staged_matrices() -> None:
    made: list[str] = []

    def build(name: str) -> str:
        made.append(name)
        return name

    for name in ("a", "b", "a", "c", "a", "b"):
        assert staged((name, "test"), lambda name=name: build(name)) == name
    assert made == ["a", "b", "c", "b"]
    for _ in range(2):
        staged((None, "test"), lambda: build("unnamed"))
    assert made[-2:] == ["unnamed", "unnamed"]

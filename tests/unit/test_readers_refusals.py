"""Broken, cut off, ambiguous and empty sources: one clear error that names the file, or a valid empty outcome."""

import gzip
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from corpus.errors import UserError
from corpus.species import load_genes
from ingest.formats import OTHER_SPECIES, CountMatrix, Features
from ingest.mapping import GeneMapper
from ingest.open import open_source
from ingest.plan import expand, inspect
from ingest.settings import Mapping, Source
from tests.factories_sources import WRITERS, Counts, make_counts, tenx_v2, write_maybe_gz

PLAIN = sorted(set(WRITERS) - {"rdata"})


@pytest.fixture(scope="module")
def mapper() -> GeneMapper:
    return GeneMapper(load_genes("mouse"), species="mouse")


@pytest.fixture(scope="module")
def counts() -> Counts:
    return make_counts()


def read_all(source: Source, mapper: GeneMapper) -> CountMatrix:
    matrix = open_source(source, None, lambda names: mapper.map(Features(list(names))).coverage)
    matrix.rows(0, matrix.num_cells)
    return matrix


def main_file(source: Source) -> Path:
    path = Path(source.uri)
    return path if path.is_file() else next(name for name in sorted(path.iterdir()) if ".mtx" in name.name)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("name", PLAIN)
def test_a_file_cut_off_is_a_typed_error(
    name: str, share: float, tmp_path: Path, counts: Counts, mapper: GeneMapper
) -> None:
    source = WRITERS[name](tmp_path, counts)
    path = main_file(source)
    data = path.read_bytes()
    end = int(len(data) * share)
    if path.suffix in {".txt", ".csv"} and end:
        # Plain text has no end mark and cannot show that whole lines are missing: cut inside a line.
        end = data.index(b"\n", end) - 20
    path.write_bytes(data[:end])
    with pytest.raises(UserError, match=path.name):
        read_all(source, mapper)


@pytest.mark.parametrize("name", PLAIN)
def test_a_file_of_something_else_is_a_typed_error(
    name: str, tmp_path: Path, counts: Counts, mapper: GeneMapper
) -> None:
    source = WRITERS[name](tmp_path, counts)
    path = main_file(source)
    path.write_bytes(np.random.default_rng(0).bytes(5_000))
    with pytest.raises(UserError, match=path.name):
        read_all(source, mapper)


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_file_is_a_typed_error(name: str, tmp_path: Path, counts: Counts, mapper: GeneMapper) -> None:
    source = WRITERS[name](tmp_path, counts)
    path = main_file(source)
    path.unlink()
    with pytest.raises(UserError, match=path.parent.name):
        read_all(source, mapper)


def text(tmp_path: Path, lines: str, name: str = "t.tsv", **settings: str) -> Source:
    (tmp_path / name).write_text(lines)
    return Source.model_validate({"uri": str(tmp_path / name), **settings})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "first line is empty"),
        ("g\tc1\tc2\nSox2\t1\t2\nSox17\t1\n", r"line 2 of the numbers \('Sox17'\) has 1 fields after"),
        ("g\tc1\tc2\nSox2\t1\t2\nSox17\t1\tNA\n", r"'NA' in line 2 of the numbers \('Sox17'\), field 2: no number"),
        ("g\tc1\tc2\nSox2\t1\t\n", "'' in line 1 of the numbers .*no number"),
        ("g\tc1\tc2\nSox2\t1\t2\t3\t4\n", "no separator"),
        ("g\tcell_type\tSox2\nc1\tB cell\t2\n", "B cell"),
        ("a\tb\nx\t1\ny\t2\n", "which way does it lie"),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, mapper: GeneMapper, lines: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_all(text(tmp_path, lines), mapper)
    assert "t.tsv" in str(caught.value)


def test_the_orientation_may_be_given(tmp_path: Path, mapper: GeneMapper) -> None:
    source = text(tmp_path, "a\tb\nx\t1\ny\t2\n", orientation="cells_x_genes")
    matrix = read_all(source, mapper)
    assert (matrix.features.names, matrix.barcodes()) == (["b"], ["x", "y"])
    np.testing.assert_array_equal(matrix.rows(0, 2).toarray(), [[1], [2]])


def test_text_keeps_what_is_no_count_for_the_check_of_counts(tmp_path: Path, mapper: GeneMapper) -> None:
    source = text(tmp_path, "g,c1,c2\nSox2,-1,0.5\nSox17,nan,3e2\n", "t.csv")
    found = read_all(source, mapper).rows(0, 2).toarray()
    np.testing.assert_array_equal(found, [[-1, np.nan], [0.5, 300]])


def test_more_than_one_file_in_an_archive(tmp_path: Path, mapper: GeneMapper) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "x")
        archive.writestr("b.csv", "x")
    with pytest.raises(UserError, match=r"two\.zip.*found 2 \(a\.csv, b\.csv\)"):
        read_all(Source(uri=str(tmp_path / "two.zip")), mapper)


def mtx_folder(tmp_path: Path, header: str, body: str, *, packed: bool = False) -> Source:
    (tmp_path / "genes.tsv").write_text("ENSMUSG00000000001\tGnai3\nENSMUSG00000000003\tPbsn\n")
    (tmp_path / "barcodes.tsv").write_text("c1\nc2\nc3\n")
    name = "matrix.mtx.gz" if packed else "matrix.mtx"
    write_maybe_gz(tmp_path / name, (header + "\n" + body).encode(), packed=packed)
    return Source(uri=str(tmp_path))


HEADER = "%%MatrixMarket matrix coordinate integer general"


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (HEADER, "2 3 2\n1 1 5\n", "1 entries, but the header says 2"),
        (HEADER, "2 3 1\n1 1 5\n2 2 2\n", "2 entries, but the header says 1"),
        (HEADER, "2 3 1\n3 1 5\n", "feature outside"),
        (HEADER, "2 3 1\n1 4 5\n", "cell outside"),
        (HEADER, "2 3 1\n0 1 5\n", "feature outside"),
        (HEADER, "2 3 1\n1 1 x\n", "not a readable Matrix Market"),
        (HEADER, "2 4 0\n", "2 x 4, but there are 2 features and 3 cells"),
        (HEADER, "", "not a readable Matrix Market"),
        (HEADER.replace("integer", "pattern"), "2 3 1\n1 1\n", "pattern general matrix holds no counts"),
        (HEADER.replace("general", "symmetric"), "2 3 1\n1 1 1\n", "symmetric matrix holds no counts"),
        (HEADER.replace("coordinate", "array"), "2 3\n1\n", "not a sparse Matrix Market"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_matrix_that_does_not_fit(
    tmp_path: Path, mapper: GeneMapper, header: str, body: str, message: str, packed: bool
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_all(mtx_folder(tmp_path, header, body, packed=packed), mapper)
    assert "matrix.mtx" in str(caught.value)


def test_a_matrix_without_entries_is_valid(tmp_path: Path, mapper: GeneMapper) -> None:
    matrix = read_all(mtx_folder(tmp_path, HEADER, "2 3 0\n"), mapper)
    assert matrix.rows(0, 3).shape == (3, 2)
    assert matrix.num_entries == 0


def test_a_folder_that_lacks_a_file_says_which(tmp_path: Path, mapper: GeneMapper) -> None:
    source = mtx_folder(tmp_path, HEADER, "2 3 0\n")
    (tmp_path / "barcodes.tsv").unlink()
    with pytest.raises(UserError, match=r"no barcodes or cells file beside it \(such as barcodes\.tsv"):
        read_all(source, mapper)
    (tmp_path / "second.mtx").write_text("")
    with pytest.raises(UserError, match=r"found 2 \(matrix\.mtx, second\.mtx\)"):
        read_all(source, mapper)


@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_csc", "h5ad_dense", "loom", "tenx_v2", "mtx_v2", "text_cells"])
def test_no_cells_is_valid_and_no_genes_is_refused(name: str, tmp_path: Path, mapper: GeneMapper) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (source,) = expand([WRITERS[name](tmp_path / "a", make_counts(num_cells=0))])
    source = source.model_copy(update={"orientation": "cells_x_genes"})
    matrix = read_all(source, mapper)
    assert (matrix.num_cells, matrix.num_entries, matrix.barcodes()) == (0, 0, [])
    assert matrix.rows(0, 0).shape == (0, len(matrix.features.names))
    assert len(matrix.features.names) >= 40
    assert inspect(source, mapper, Mapping()).num_cells == 0
    full = make_counts()
    bare = Counts(full.values[:, :0], [], [], full.cells, full.obs)
    (source,) = expand([WRITERS[name](tmp_path / "b", bare)])
    with pytest.raises(UserError, match=r"only 0\.0% of|first line is empty|no separator"):
        inspect(source.model_copy(update={"orientation": "cells_x_genes"}), mapper, Mapping())


def test_repeated_cell_names_are_refused(tmp_path: Path, counts: Counts, mapper: GeneMapper) -> None:
    cells = [*counts.cells[:-1], counts.cells[0]]
    twice = Counts(counts.values, counts.ids, counts.symbols, cells, counts.obs)
    (source,) = expand([WRITERS["tenx_v3"](tmp_path, twice)])
    with pytest.raises(UserError, match="'AAA00000-1' occurs more than once"):
        inspect(source, mapper, Mapping())


def h5ad_with(tmp_path: Path, names: list[str], **columns: list[str]) -> Source:
    data = anndata.AnnData(np.ones((2, len(names)), np.float32), var=pd.DataFrame(columns, index=names))
    data.write_h5ad(tmp_path / "x.h5ad")
    return Source(uri=str(tmp_path / "x.h5ad"), species="mouse")


@pytest.mark.parametrize(
    ("prefix", "own"),
    [
        ("mm10_", True),
        ("mm10___", True),
        ("GRCm39_", True),
        ("mm10-3.0.0_premrna_", True),
        ("GRCm38.p6_", True),
        ("mouse_", True),
        ("hg19_", False),
        ("GRCh38______", False),
        ("GRCh38-2020-A_", False),
        ("rn6_", False),
    ],
)
@pytest.mark.parametrize("name", ["Gnai3", "Lyz2", "mt-Co1"])
def test_a_genome_prefix_is_resolved(tmp_path: Path, prefix: str, own: bool, name: str) -> None:
    features = open_source(h5ad_with(tmp_path, [prefix + name, "Sox2"])).features
    assert features.names == [name, "Sox2"]
    assert features.kinds == (None if own else [OTHER_SPECIES, "Gene Expression"])


def test_the_prefix_decides_by_the_declared_species(tmp_path: Path) -> None:
    source = h5ad_with(tmp_path, ["mm10_Ins2", "hg19_INS"])
    human = open_source(source.model_copy(update={"species": "human"})).features
    assert human.kinds == [OTHER_SPECIES, "Gene Expression"]


def test_an_unknown_prefix_stops_the_file_until_it_is_explained(tmp_path: Path) -> None:
    names = [f"refA_Sox{i}" for i in range(5)] + [f"refB_SOX{i}" for i in range(5)]
    source = h5ad_with(tmp_path, names)
    with pytest.raises(UserError, match=r"x\.h5ad: 5 of 10 gene names start with 'refA'"):
        open_source(source)
    told = open_source(source.model_copy(update={"genomes": {"refA": "mouse", "refB": "human"}})).features
    assert told.names[0] == "Sox0"
    assert told.kinds == ["Gene Expression"] * 5 + [OTHER_SPECIES] * 5


def test_a_few_unknown_prefixes_beside_known_ones_stop_the_file(tmp_path: Path) -> None:
    names = [f"mm10_Sox{i}" for i in range(95)] + [f"virus_{i}" for i in range(5)]
    with pytest.raises(UserError, match="'virus'"):
        open_source(h5ad_with(tmp_path, names))


def test_underscores_that_are_no_prefix_pass(tmp_path: Path) -> None:
    names = ["Gnai3", "Pbsn", "00R_Pgap2", "RP23_4H17", "Sox2", "Sox3", "Gcg_ENSMUSG00000000394.15", "Lyz2"]
    assert open_source(h5ad_with(tmp_path, names)).features == Features(names)


def test_ensembl_ids_of_another_species_are_left_out(tmp_path: Path, mapper: GeneMapper) -> None:
    names = ["ENSMUSG00000000001.4", "ENSG00000139618.15", "ENSMUSG00000000003"]
    features = open_source(h5ad_with(tmp_path, names)).features
    assert features.kinds == ["Gene Expression", OTHER_SPECIES, "Gene Expression"]
    assert (mapper.map(features).rows == -2).tolist() == [False, True, False]


def test_a_genome_column_and_feature_types_of_h5ad(tmp_path: Path) -> None:
    source = h5ad_with(
        tmp_path,
        ["Sox2", "SOX2", "CD4"],
        feature_types=["Gene Expression", "Gene Expression", "Antibody Capture"],
        genome=["mm10", "GRCh38", "mm10"],
    )
    assert open_source(source).features.kinds == ["Gene Expression", OTHER_SPECIES, "Antibody Capture"]
    unknown = h5ad_with(tmp_path, ["Sox2", "SOX2"], genome=["mm10", "mine"])
    with pytest.raises(UserError, match="'mine' is none that is known"):
        open_source(unknown)


def test_old_10x_files_name_their_genomes(tmp_path: Path, counts: Counts) -> None:
    source = tenx_v2(tmp_path, counts)
    features = open_source(source).features
    assert (features.kinds or [])[-3:] == [OTHER_SPECIES] * 3
    with h5py.File(source.uri, "r+") as file:
        file["mm9"] = file["mm10"]
    with pytest.raises(UserError, match="which genome is mouse\\? There are hg19, mm10, mm9"):
        open_source(source)
    assert open_source(source.model_copy(update={"layer": "mm9"})).num_cells == len(counts.cells)
    with pytest.raises(UserError, match="no genome 'mm11'"):
        open_source(source.model_copy(update={"layer": "mm11"}))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("h5ad_csr", {"layer": "spliced"}, "no matrix 'spliced'; the file has X"),
        ("h5ad_csr", {"gene_column": "ensembl"}, "no gene column 'ensembl'; there are index, gene_ids"),
        ("loom", {"layer": "spliced"}, "no layer 'spliced'; there are matrix"),
        ("loom", {"gene_column": "id"}, "no gene names among the row attributes; there are Accession, Gene"),
    ],
)
def test_a_setting_that_the_file_cannot_meet(
    name: str, setting: dict[str, str], message: str, tmp_path: Path, counts: Counts
) -> None:
    source = WRITERS[name](tmp_path, counts)
    with pytest.raises(UserError, match=message):
        open_source(source.model_copy(update=setting))


@pytest.mark.parametrize("spoil", ["descending", "beyond", "index"])
@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_csc", "tenx_v3"])
def test_broken_pointers_and_indices_are_refused(
    name: str, spoil: str, tmp_path: Path, counts: Counts, mapper: GeneMapper
) -> None:
    source = WRITERS[name](tmp_path, counts)
    with h5py.File(source.uri, "r+") as file:
        group = file["matrix" if name == "tenx_v3" else "X"]
        where, value = {
            "descending": (("indptr", 5), 10_000_000),
            "beyond": (("indptr", -1), 10_000_000),
            "index": (("indices", 3), 1_000),
        }[spoil]
        values = group[where[0]][:]
        values[where[1]] = value
        group[where[0]][:] = values
    with pytest.raises(UserError, match=Path(source.uri).name):
        read_all(source, mapper)


def test_a_truncated_gzip_names_the_file(tmp_path: Path, mapper: GeneMapper) -> None:
    lines = "g\tc1\n" + "".join(f"Sox{i}\t{i}\n" for i in range(2_000))
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(lines.encode())[:-9])
    with pytest.raises(UserError, match=r"t\.txt\.gz: not a readable table of counts"):
        read_all(Source(uri=str(tmp_path / "t.txt.gz")), mapper)


def test_optional_packages_are_named(
    tmp_path: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch, mapper: GeneMapper
) -> None:
    import sys

    def check(source: Source, message: str, wanted: Callable[[], None]) -> None:
        wanted()
        with pytest.raises(UserError, match=message):
            open_source(source)

    check(
        WRITERS["rdata"](tmp_path, counts),
        "needs the package `rdata`",
        lambda: monkeypatch.setitem(sys.modules, "rdata", None),
    )
    check(
        Source(uri="census://mus_musculus?tissue=lung"),
        "needs its client",
        lambda: monkeypatch.setitem(sys.modules, "cellxgene_census", None),
    )

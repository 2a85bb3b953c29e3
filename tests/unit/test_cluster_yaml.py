"""cluster.yaml and the Kubernetes manifest keep their rules: Ray accepts them, nothing is exposed, nothing drifts."""

import copy
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

Config = dict[str, Any]

# Ray accepts any instance type, so a misspelt one would be found only by a cluster that never grows. vCPUs and GPUs.
INSTANCE_TYPES = {
    "m7i.xlarge": (4, 0),
    "m7i.2xlarge": (8, 0),
    "r7i.2xlarge": (8, 0),
    "r7i.4xlarge": (16, 0),
    "r7i.8xlarge": (32, 0),
    "g6e.xlarge": (4, 1),
    "g6e.12xlarge": (48, 4),
    "p5.48xlarge": (192, 8),
}
IMAGE = re.compile(r"rayproject/ray:(?P<ray>\d+\.\d+\.\d+)-py3(?P<python>\d+)-(?P<platform>cpu|cu\d+)")
EVERYWHERE = re.compile(r"0\.0\.0\.0|::/0|\[::\]")
RAY_START = re.compile(r"\bray start\b")


def ray_pin(repository: Path) -> str:
    """Ray release that pyproject.toml pins."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pins = [m[1] for text in project["dependencies"] if (m := re.fullmatch(r"ray\[.*\]==(\S+)", text))]
    assert len(pins) == 1, "pyproject.toml pins ray to one release"
    return pins[0]


def strings(node: Any) -> Iterator[str]:
    """Yield every string in a parsed YAML document, keys included."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from strings(key)
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)


def images(config: Config) -> Iterator[str]:
    """Yield every container image that a cluster configuration names."""
    for docker in [config["docker"], *(kind.get("docker", {}) for kind in config["available_node_types"].values())]:
        yield from (value for key, value in docker.items() if key in {"image", "head_image", "worker_image"})


def violations(config: Config, ray_version: str) -> list[str]:
    """Return the rules of this repository that a cluster configuration breaks; Ray checks none of them."""
    found = []
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}

    found += [f"open to everywhere: {text}" for text in strings(config) if EVERYWHERE.search(text)]
    head_start = next(text for text in config["head_start_ray_commands"] if RAY_START.search(text))
    if "--dashboard-host=127.0.0.1" not in head_start.split():
        found.append("dashboard not bound to 127.0.0.1")

    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    found += [
        f"ray start without token mode: {text}"
        for text in starts
        if RAY_START.search(text) and "RAY_AUTH_MODE=token ray start" not in text
    ]
    if "--env RAY_AUTH_MODE=token" not in config["docker"].get("run_options", []):
        found.append("container without RAY_AUTH_MODE=token")
    token_path = "/home/ray/.ray/auth_token"
    if config["file_mounts"].get(token_path) != "~/.ray/auth_token":
        found.append("token file not mounted")
    if f"--env RAY_AUTH_TOKEN_PATH={token_path}" not in config["docker"].get("run_options", []):
        found.append("container does not name the token file")
    if any(re.search(r"RAY_AUTH_TOKEN\s*[=:]", text) for text in strings(config)):
        found.append("a token is written into the file")

    if "InstanceMarketOptions" in head["node_config"]:
        found.append("head is not on demand")
    if head["resources"].get("CPU") != 0:
        found.append("head takes tasks")
    for name, kind in workers.items():
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") != "spot":
            found.append(f"{name} is not spot")
        if kind.get("min_workers", 0) != 0:
            found.append(f"{name} never shrinks to nothing")
    for name, kind in types.items():
        if kind["node_config"]["InstanceType"] not in INSTANCE_TYPES:
            found.append(f"{name}: unknown instance type")
        if kind["node_config"].get("MetadataOptions", {}).get("HttpTokens") != "required":
            found.append(f"{name}: instance metadata without a session token")
        if not kind.get("labels"):
            found.append(f"{name}: no labels")

    if config["provider"].get("cache_stopped_nodes") is not False:
        found.append("stopped nodes are kept")
    if not 0 < config["idle_timeout_minutes"] <= 30:
        found.append("idle nodes are kept")
    for image in images(config):
        match = IMAGE.fullmatch(image)
        if not match or match["ray"] != ray_version or match["python"] not in {"11", "12"}:
            found.append(f"image {image} is not Ray {ray_version} on Python 3.11 or 3.12")
    if len({match["python"] for image in images(config) if (match := IMAGE.fullmatch(image))}) > 1:
        found.append("nodes with different Pythons")
    return found


@pytest.fixture(scope="module")
def config(repository: Path) -> Config:
    return yaml.safe_load((repository / "cluster.yaml").read_text())


def prepared(config: Config) -> Config:
    """Merge in Ray's defaults and validate, as `ray up` does before it touches the cloud."""
    result = prepare_config(copy.deepcopy(config))
    validate_config(result)
    return result


def test_ray_accepts_the_file(config: Config) -> None:
    result = prepared(config)
    assert set(result["available_node_types"]) == {"head", "ingest_cpu", "train_gpu"}
    assert result["available_node_types"]["head"]["max_workers"] == 0
    limits = [result["available_node_types"][name]["max_workers"] for name in ("ingest_cpu", "train_gpu")]
    assert sum(limits) <= result["max_workers"], "the common limit starves one worker type"


def test_the_file_keeps_our_rules(config: Config, repository: Path) -> None:
    # On the merged configuration: a key that we leave out may get an open default (0.0.0.0 for the dashboard).
    assert violations(prepared(config), ray_pin(repository)) == []


def test_worker_types_have_what_their_work_needs(config: Config) -> None:
    types = config["available_node_types"]
    assert INSTANCE_TYPES[types["ingest_cpu"]["node_config"]["InstanceType"]][1] == 0
    assert INSTANCE_TYPES[types["train_gpu"]["node_config"]["InstanceType"]][1] > 0
    assert "-cu" in types["train_gpu"]["docker"]["worker_image"]


def test_setup_installs_dependencies_and_no_package_of_ours(config: Config, repository: Path, tmp_path: Path) -> None:
    names = ("head_setup_commands", "worker_setup_commands")
    lists = [config[name] for name in names]
    lists += [kind["worker_setup_commands"] for kind in config["available_node_types"].values() if names[1] in kind]
    for commands in lists:
        assert len(commands) == 2
        assert commands[0].startswith("python -c")
        assert "--requirement /tmp/requirements.txt" in commands[1]
        assert not re.search(r"pip install.*(\s-e\b|\s\.(\s|$))", commands[1])
    # The inline program is the one thing here that the cluster executes: run it on the real pyproject.toml.
    program = re.fullmatch(r'python -c "(.*)" > /tmp/requirements.txt', lists[0][0])
    assert program is not None
    mounted = "/home/ray/mouse-geneformer/pyproject.toml"
    assert config["file_mounts"][mounted] == "pyproject.toml"
    output: list[str] = []
    source = program[1].replace(mounted, str(repository / "pyproject.toml"))
    exec(compile(source, "setup_commands", "exec"), {"print": lambda *a, sep: output.append(sep.join(a))})
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert output[0].splitlines() == project["dependencies"]


def change(*path: str | int, to: Any) -> Callable[[Config], None]:
    """Make a mutation that sets one place of a configuration."""

    def mutate(config: Config) -> None:
        node: Any = config
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return mutate


def drop(*path: str | int) -> Callable[[Config], None]:
    """Make a mutation that removes one place of a configuration."""

    def mutate(config: Config) -> None:
        node: Any = config
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return mutate


NODE = "available_node_types"

REFUSED_BY_RAY = {
    "unknown key at the top": (change("idle_timeout", to=5), "'idle_timeout' was unexpected"),
    "unknown key in a node type": (change(NODE, "ingest_cpu", "spot", to=True), "'spot' was unexpected"),
    "unknown key in docker": (change("docker", "images", to="rayproject/ray"), "'images' was unexpected"),
    "head type that does not exist": (change("head_node_type", to="heads"), "head_node_type"),
    "label that is not a string": (change(NODE, "train_gpu", "labels", to={"gpus": 4}), "not of type 'string'"),
    "text for a number": (change("max_workers", to="many"), "'many' is not of type 'integer'"),
    "region that is not a name": (change("provider", "region", to=1), "1 is not of type 'string'"),
    "commands that are not a list": (change("head_start_ray_commands", to="ray start"), "not of type 'array'"),
}

REFUSED_BY_US = {
    "dashboard to the world": (
        change("head_start_ray_commands", to=["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]),
        "open to everywhere",
    ),
    "start commands left to Ray's defaults": (drop("head_start_ray_commands"), "open to everywhere"),
    "dashboard on the default host": (
        change("head_start_ray_commands", to=["RAY_AUTH_MODE=token ray start --head"]),
        "dashboard not bound",
    ),
    "head without token": (
        change("head_start_ray_commands", to=["ray start --head --dashboard-host=127.0.0.1"]),
        "ray start without token mode",
    ),
    "worker without token": (
        change("worker_start_ray_commands", to=["ray start --address=$RAY_HEAD_IP:6379"]),
        "ray start without token mode",
    ),
    "authentication off in the container": (
        change("docker", "run_options", to=["--env RAY_AUTH_MODE=disabled"]),
        "container without RAY_AUTH_MODE=token",
    ),
    "no token file": (drop("file_mounts", "/home/ray/.ray/auth_token"), "token file not mounted"),
    "token in the file": (change("initialization_commands", to=["export RAY_AUTH_TOKEN=0123"]), "a token is written"),
    "spot head": (change(NODE, "head", "node_config", "InstanceMarketOptions", to={"MarketType": "spot"}), "on demand"),
    "head takes tasks": (change(NODE, "head", "resources", to={}), "head takes tasks"),
    "ingest on demand": (drop(NODE, "ingest_cpu", "node_config", "InstanceMarketOptions"), "ingest_cpu is not spot"),
    "training on demand": (drop(NODE, "train_gpu", "node_config", "InstanceMarketOptions"), "train_gpu is not spot"),
    "misspelt type": (change(NODE, "train_gpu", "node_config", "InstanceType", to="g6e.12xlrage"), "unknown instance"),
    "workers that stay": (change(NODE, "train_gpu", "min_workers", to=1), "never shrinks"),
    "stopped nodes kept": (change("provider", "cache_stopped_nodes", to=True), "stopped nodes are kept"),
    "idle for a day": (change("idle_timeout_minutes", to=1440), "idle nodes are kept"),
    "latest image": (change("docker", "image", to="rayproject/ray:latest"), "image rayproject/ray:latest is not"),
    "another Ray": (
        change(NODE, "train_gpu", "docker", "worker_image", to="rayproject/ray:2.59.0-py312-cu128"),
        "2.59.0-py312-cu128 is not Ray",
    ),
    "another Python": (
        change(NODE, "train_gpu", "docker", "worker_image", to="rayproject/ray:2.60.0-py311-cu128"),
        "different Pythons",
    ),
    "no label": (drop(NODE, "ingest_cpu", "labels"), "ingest_cpu: no labels"),
    "old instance metadata": (drop(NODE, "head", "node_config", "MetadataOptions"), "head: instance metadata"),
}


@pytest.mark.parametrize(("mutate", "reason"), REFUSED_BY_RAY.values(), ids=REFUSED_BY_RAY.keys())
def test_ray_refuses_a_broken_file(config: Config, mutate: Callable[[Config], None], reason: str) -> None:
    broken = copy.deepcopy(config)
    mutate(broken)
    with pytest.raises((jsonschema.ValidationError, ValueError), match=reason):
        prepared(broken)


@pytest.mark.parametrize(("mutate", "reason"), REFUSED_BY_US.values(), ids=REFUSED_BY_US.keys())
def test_our_rules_refuse_what_ray_accepts(
    config: Config, repository: Path, mutate: Callable[[Config], None], reason: str
) -> None:
    broken = copy.deepcopy(config)
    mutate(broken)
    found = violations(prepared(broken), ray_pin(repository))
    assert any(reason in line for line in found), found


# --- Kubernetes and the image ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rayjob(repository: Path) -> Config:
    documents = list(yaml.safe_load_all((repository / "deploy" / "kuberay" / "rayjob.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["ConfigMap", "RayJob"]
    settings = documents[0]["data"]["ingest.toml"]
    assert tomllib.loads(settings)["sources"]
    return documents[1]


def test_rayjob_asks_for_a_token_and_ends_by_itself(rayjob: Config) -> None:
    spec = rayjob["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] > 0
    assert all(group["minReplicas"] == 0 for group in cluster["workerGroupSpecs"])
    assert not any(EVERYWHERE.search(text) for text in strings(rayjob))


def test_rayjob_versions_agree_with_pyproject(rayjob: Config, repository: Path) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray_pin(repository)
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    used = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert {image.rsplit(":", 1)[1] for image in used} == {version}


def test_dockerfile_builds_on_the_pinned_ray(repository: Path, config: Config) -> None:
    text = (repository / "deploy" / "Dockerfile").read_text()
    bases = IMAGE.findall(text)
    assert bases
    assert {ray for ray, _, _ in bases} == {ray_pin(repository)}
    assert {python for _, python, _ in bases} == {IMAGE.fullmatch(config["docker"]["image"])["python"]}
    copied = set(re.findall(r"^COPY .* /home/ray/app/(\w+)$", text, flags=re.MULTILINE))
    assert copied == {"corpus", "ingest", "train", "tune", "evaluate"}

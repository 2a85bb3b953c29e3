"""DeepSpeed as it really runs: every stage, offloading, accumulation, clipping, a user's JSON give one result."""

import json
from pathlib import Path

import pytest
import torch

from tests.worlds import run_world
from train.engine import full_state, start_engine
from train.settings import BatchSettings, EngineSettings, OptimizerSettings
from train.tasks import loss_scale
from train.world import World, single_process

# DeepSpeed uses parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning")

SETTINGS = [
    {"zero_stage": stage, "offload_optimizer": offload}
    for stage in (0, 1, 2, 3)
    for offload in (False, True)
    if stage or not offload
]
PER_STEP = 4  # micro-batches, over all workers


def fit(world: World, settings: dict, *, clip: float = 0.05) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of six steps and the weights after them; each step is four micro-batches, shared among the workers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.LayerNorm(13), torch.nn.Linear(13, 5))
    engine = start_engine(
        model,
        OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, clip=clip),
        EngineSettings.model_validate(settings),
        BatchSettings(accumulation=PER_STEP // world.size),
        "fp32",
        world,
    )
    losses = []
    for step in range(6):
        x, y = torch.randn(2, PER_STEP, 3, 7, generator=torch.Generator().manual_seed(step)).split([1, 1])
        scale = loss_scale(world.size, torch.tensor(3.0 * PER_STEP))
        total = torch.zeros(1)
        for number in range(world.rank, PER_STEP, world.size):
            loss = ((engine(x[0, number]) - y[0, number, :, :5]) ** 2).sum()
            engine.backward(loss * scale, scale_wrt_gas=False)
            engine.step()
            total += loss.detach()
        losses.append(float(world.sum(total)[0]))
    return losses, full_state(engine.module)


@pytest.fixture(scope="module")
def world() -> World:
    return single_process(torch.device("cpu"))


@pytest.fixture(scope="module")
def expected(world) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same by torch alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.LayerNorm(13), torch.nn.Linear(13, 5))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    losses = []
    for step in range(6):
        x, y = torch.randn(2, PER_STEP, 3, 7, generator=torch.Generator().manual_seed(step)).split([1, 1])
        loss = ((model(x[0]) - y[0, ..., :5]) ** 2).sum()
        (loss / (3 * PER_STEP)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert norm > 0.1  # the clip binds
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: tensor.detach() for name, tensor in model.named_parameters()}


def check(found: tuple[list[float], dict[str, torch.Tensor]], expected: tuple[list[float], dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_stage_is_plain_adamw(world, expected, settings):
    check(fit(world, settings), expected)


def test_a_users_json_is_what_deepspeed_runs_by(world, expected, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"gradient_clipping": 0.05, "zero_optimization": {"stage": 2, "reduce_bucket_size": 64}})
    )
    check(fit(world, {"deepspeed_json": str(path)}, clip=0.0), expected)


def of_two(world: World, folder: Path) -> None:
    for number, settings in enumerate(SETTINGS):
        losses, weights = fit(world, settings)
        if world.is_first:
            torch.save({"losses": losses, "weights": weights}, folder / f"{number}.pt")


@pytest.mark.slow
def test_two_workers_do_the_same(expected, tmp_path):
    run_world(2, of_two, tmp_path)
    for number in range(len(SETTINGS)):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        check((found["losses"], found["weights"]), expected)

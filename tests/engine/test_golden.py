"""One seeded plan gives the same losses however it is carried out: 20 steps in fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.engine.kept_checkpoints import checkpoints
from manyhands.engine.run import train
from manyhands.engine.settings import EngineSettings, Logging
from manyhands.plan.resolve import dump_plan, resolve
from manyhands.plan.schema import InnerOptimizer

RANKS = Path(__file__).with_name("ranks.py")
ALONE = ("single", "accumulated", "grids_single", "muon_single", "bf16_single", "qwen3_single", "gpt2_single")
TOGETHER = (
    "ddp",
    "ddp_accumulated",
    "fsdp",
    "fsdp_accumulated",
    "tensor",
    "ddp_resumed",
    "fsdp_resumed",
    "ddp_one_nan",
    "wrong_data",
    "grids_ddp",
    "grids_tensor",
    "qwen3_tensor",
    "gpt2_tensor",
    "muon_ddp",
    "muon_fsdp",
    "bf16_ddp",
    "bf16_fsdp",
)
STEPS = 20


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """mode -> losses of its 20 steps, validation losses, and directory."""
    directory = tmp_path_factory.mktemp("golden")
    (directory / "text.txt").write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}\n" for i in range(2500)))
    plan = resolve(
        {
            "task": {
                "model_type": "llama",
                "model": {
                    "num_hidden_layers": 2,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                },
                "block_size": 16,
                "text": {"path": str(directory / "text.txt")},
                "tokenizer": {"kind": "byte"},
            },
            "local": {"steps": 5, "batch_size": 8, "optimizer": {"lr": 1e-2}},
            "rounds": {"total": 4, "snapshot_every": 2},
            "schedule": {"kind": "cosine", "warmup_steps": 5},
            "evaluation": {"max_batches": 5},
        }
    )
    (directory / "plan.yaml").write_text(dump_plan(plan))
    muon = plan.local.model_copy(update={"optimizer": InnerOptimizer(name="muon", lr=1e-2)})
    (directory / "muon.yaml").write_text(dump_plan(plan.model_copy(update={"local": muon})))
    qwen3 = plan.task.model_copy(update={"model_type": "qwen3", "model": {**plan.task.model, "head_dim": 8}})
    (directory / "qwen3.yaml").write_text(dump_plan(plan.model_copy(update={"task": qwen3})))
    small = {"n_layer": 2, "n_embd": 32, "n_head": 4}
    gpt2 = plan.task.model_copy(update={"model_type": "gpt2", "model": small})
    (directory / "gpt2.yaml").write_text(dump_plan(plan.model_copy(update={"task": gpt2})))
    grids = {
        "task": {
            "name": "grids",
            "size": 8,
            "generated": {"puzzles": 40, "evaluation_puzzles": 9},
            "model": {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1},
        },
        "local": {"steps": 10, "batch_size": 4, "optimizer": {"lr": 1e-2}},
        "rounds": {"total": 1},
        "evaluation": {"max_batches": 20},
    }
    (directory / "grids.yaml").write_text(dump_plan(resolve(grids)))
    _run(directory, 1, ALONE)
    _run(directory, 2, TOGETHER)
    return {
        mode: {**json.loads((directory / f"{mode}.json").read_text()), "directory": directory / mode}
        for mode in (*ALONE, *TOGETHER)
    }


def _run(directory: Path, size: int, modes: tuple[str, ...]) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(directory), str(rank), str(size), *modes],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for rank in ranks:
        _, error = rank.communicate(timeout=300)
        assert rank.returncode == 0, error


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of any step's loss."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def test_it_learns(golden: dict[str, Any]) -> None:
    single = golden["single"]
    assert len(single["losses"]) == STEPS
    assert single["losses"][-1] < 0.8 * single["losses"][0]


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        ("accumulated", 1e-5),
        ("ddp", 1e-5),
        ("ddp_accumulated", 1e-5),
        ("fsdp", 1e-5),
        ("fsdp_accumulated", 1e-5),
        ("tensor", 1e-4),
    ],
)
def test_the_losses_are_those_of_one_process(golden: dict[str, Any], mode: str, tolerance: float) -> None:
    assert difference(golden[mode], golden["single"]) <= tolerance
    for name in ("before", "after"):
        assert golden[mode][name] == pytest.approx(golden["single"][name], rel=tolerance)


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        ("muon_ddp", 1e-3),  # Muon orthogonalizes in bf16
        ("muon_fsdp", 1e-3),
        ("bf16_ddp", 1e-2),
        ("bf16_fsdp", 1e-2),
    ],
)
def test_so_are_those_of_muon_and_of_pure_bf16(golden: dict[str, Any], mode: str, tolerance: float) -> None:
    single = golden[f"{mode.partition('_')[0]}_single"]
    assert difference(golden[mode], single) <= tolerance
    assert single["losses"][-1] < 0.8 * single["losses"][0]
    assert difference(single, golden["single"]) > 1e-3, "it is another optimizer, or precision"


@pytest.mark.slow
def test_data_ranks_times_tensor_ranks(golden: dict[str, Any]) -> None:
    """By four processes. Data ranks shard then, whatever the strategy: DDP knows no tensors that are divided."""
    directory = golden["single"]["directory"].parent
    _run(directory, 4, ("product", "qwen3_product"))
    for mode, single in (("product", "single"), ("qwen3_product", "qwen3_single")):
        assert difference(json.loads((directory / f"{mode}.json").read_text()), golden[single]) <= 1e-4
    middle = checkpoints(directory / "product" / "checkpoints")[0]
    assert len(list((middle / "state").iterdir())) == 4


def test_norms_of_divided_heads_learn_from_all_heads(golden: dict[str, Any]) -> None:
    assert difference(golden["qwen3_tensor"], golden["qwen3_single"]) <= 1e-4


def test_the_default_model_is_divided_but_for_its_attention(golden: dict[str, Any]) -> None:
    assert difference(golden["gpt2_tensor"], golden["gpt2_single"]) <= 1e-4


@pytest.mark.parametrize(("mode", "tolerance"), [("grids_ddp", 1e-5), ("grids_tensor", 1e-4)])
def test_a_task_with_metrics_of_its_own_gives_the_same_too(
    golden: dict[str, Any], mode: str, tolerance: float
) -> None:
    """Its metrics are those of all ranks' samples, counted once."""
    assert difference(golden[mode], golden["grids_single"]) <= tolerance
    for one, other in zip(golden[mode]["metrics"], golden["grids_single"]["metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=0.02)
        assert one["copy_accuracy"] == other["copy_accuracy"], "it depends on the samples alone"


def test_a_rank_with_wrong_data_is_seen(golden: dict[str, Any]) -> None:
    assert difference(golden["wrong_data"], golden["single"]) > 1e-4


@pytest.mark.parametrize("mode", ["single", "ddp", "fsdp", "tensor"])
def test_one_process_goes_on_from_what_any_number_has_saved(
    golden: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    """From the middle, to the last bit where it was one process before."""
    directory = golden[mode]["directory"]
    middle = checkpoints(directory / "checkpoints")[0]
    assert middle.name == "step-00000010"
    sharded = len(list((middle / "state").iterdir())) > 1
    assert sharded == (mode in ("fsdp", "tensor"))
    losses: list[float] = []
    torch.set_num_threads(1)
    result = train(
        resolve_plan(directory),
        tmp_path,
        settings=EngineSettings(logging=Logging(every_steps=1)),
        resume=middle,
        on_event=lambda event: losses.append(event["loss"]) if event["kind"] == "step" else None,
    )
    expected = golden["single"]
    if mode == "single":
        assert losses == golden["single"]["losses"][10:]
        assert result.validation_loss_after == expected["after"]
    else:
        assert losses == pytest.approx(expected["losses"][10:], rel=1e-4)


@pytest.mark.parametrize("mode", ["ddp_resumed", "fsdp_resumed"])
def test_two_processes_go_on_from_what_one_has_saved(golden: dict[str, Any], mode: str) -> None:
    assert golden[mode]["losses"] == pytest.approx(golden["single"]["losses"][10:], rel=1e-5)


def test_all_ranks_leave_out_a_step_that_is_not_finite_on_one(golden: dict[str, Any]) -> None:
    spoilt = golden["ddp_one_nan"]
    assert spoilt["skipped"] == [0, 0, 0] + [1] * (STEPS - 3)
    assert spoilt["warned"] == [
        "left out, since the loss or gradient is not finite: step 3 (samples 24 to 31 in the plan's order)"
    ]
    assert spoilt["losses"][:3] == golden["ddp"]["losses"][:3]
    assert spoilt["losses"][-1] < 0.8 * spoilt["losses"][0], "the ranks have gone on alike"


def resolve_plan(directory: Path) -> Any:
    from manyhands.plan.compose import load_plan

    return load_plan(directory.parent / "plan.yaml")

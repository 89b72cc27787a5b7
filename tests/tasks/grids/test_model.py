from __future__ import annotations

import pytest
import torch

from manyhands.tasks.grids.model import CLASSES, PixelTransformer


@pytest.fixture
def model() -> PixelTransformer:
    torch.manual_seed(0)
    made = PixelTransformer(size=4, width=16, heads=2, encoder_layers=2, decoder_layers=2)
    for parameter in made.parameters():  # first weights are small: differences would be, too
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def arguments(batch: int = 2, pairs: int = 3) -> dict[str, torch.Tensor]:
    return {
        "inputs": torch.randint(CLASSES, (batch, 4, 4)),
        "context_inputs": torch.randint(CLASSES, (batch, pairs, 4, 4)),
        "context_outputs": torch.randint(CLASSES, (batch, pairs, 4, 4)),
        "context_mask": torch.ones(batch, pairs, dtype=torch.bool),
    }


def test_a_vector_of_logits_per_pixel(model: PixelTransformer) -> None:
    logits = model(**arguments())
    assert logits.shape == (2, 4, 4, 11)
    assert list(model.buffers()) == []
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_part_of_a_sample_is_seen_and_samples_are_not_mixed(model: PixelTransformer) -> None:
    given = arguments()
    before = model(**given)
    for name in ("inputs", "context_inputs", "context_outputs"):
        changed = given[name].clone()
        place = (0,) * changed.ndim
        changed[place] = (changed[place] + 1) % CLASSES
        after = model(**{**given, name: changed})
        assert not torch.allclose(after[0], before[0]), name
        torch.testing.assert_close(after[1], before[1])


def test_the_order_of_pairs_changes_nothing_and_absent_ones_are_not_seen(model: PixelTransformer) -> None:
    given = arguments()
    before = model(**given)
    turned = {name: t.flip(1) if name != "inputs" else t for name, t in given.items()}
    torch.testing.assert_close(model(**turned), before)
    mask = torch.tensor([[True, True, False]] * 2)
    without = {name: t[:, :2] if name != "inputs" else t for name, t in given.items()}
    torch.testing.assert_close(model(**{**given, "context_mask": mask}), model(**without))
    assert not torch.allclose(model(**without), before)


def test_rows_and_columns_are_told_apart(model: PixelTransformer) -> None:
    given = arguments()
    turned = {name: t.mT if t.ndim > 2 else t for name, t in given.items()}
    assert not torch.allclose(model(**turned), model(**given).transpose(1, 2))


def test_half_of_the_heads_and_columns_give_their_share_of_the_sum(model: PixelTransformer) -> None:
    """What tensor parallelism does: each device has some heads, and the outputs are added."""
    attention = model.encoder[0].attention
    x = torch.randn(2, 5, 16)
    whole = attention(x, x)
    shares = []
    for part in range(2):
        rows = slice(8 * part, 8 * part + 8)
        half = type(attention)(16, 2)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(half, name).weight = torch.nn.Parameter(getattr(attention, name).weight[rows])
            getattr(half, name).bias = torch.nn.Parameter(getattr(attention, name).bias[rows])
        half.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, rows])
        half.o_proj.bias = torch.nn.Parameter(attention.o_proj.bias / 2)
        shares.append(half(x, x))
    torch.testing.assert_close(shares[0] + shares[1], whole)

"""The blocks by oneDNN are the plain blocks, but for rounding; and where they cannot work they say so."""

from dataclasses import replace

import pytest
import torch
from builders import shared_wan_folder
from test_rollout import SIZE, settings, triplets  # noqa: F401  a fixture
from test_wan import conditions, state

from data_tools.ingest import read_triplets
from data_tools.rollout import Worker
from v4e.data.members import unpack
from v4e.errors import ConfigError
from v4e.models import onednn
from v4e.models.wan import load_backbone
from v4e.nouns import TEXT_TOKENS

FAST = {"fold_text_padding": True, "onednn": True}


def backbone(kind: str):
    """Norms, modulations and biases that a fresh model has at one or zero are drawn."""
    model = load_backbone(shared_wan_folder(kind), attention="native", fold_text_padding=True)
    g = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or "scale_shift" in name:
            weight += 0.3 * torch.randn(weight.shape, generator=g)
    return model


@pytest.mark.parametrize("tokens", [1, 40, 1024])
@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
@torch.no_grad()
def test_a_velocity_is_that_of_the_plain_blocks(kind, tokens, monkeypatch):
    """Prompts of different lengths, in parts of one sample and all at once; asked twice, since keys are remembered."""
    monkeypatch.setattr(onednn, "TOKENS", tokens)
    model, told = backbone(kind), conditions(kind, 4, words=(6, 3, 0, TEXT_TOKENS))
    with model.remembering(onednn=True):
        for sigma in (0.9, 0.3):
            levels = torch.full((4,), sigma)
            fast = model(state(4), levels, told)[0]
            with monkeypatch.context() as patched:
                patched.setattr(model, "_onednn", None)
                plain = model(state(4), levels, told)[0]
            assert not torch.equal(fast, plain)
            assert torch.allclose(fast, plain, atol=2e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("tokens", [1, 40, 1024])
@torch.no_grad()
def test_under_another_prompt_the_first_self_attention_is_not_computed_again(tokens, monkeypatch):
    monkeypatch.setattr(onednn, "TOKENS", tokens)
    model, told = backbone("flf2v"), conditions("flf2v", 3)
    null = replace(told, text_BLE=told.text_BLE[:, :1] + 1, words_B=torch.ones_like(told.words_B))
    x, other, sigma_B = state(3), state(3, 7), torch.full((3,), 0.7)
    asked = [(x, told), (x, null), (other, null), (other, told), (x, told)]
    with model.remembering(onednn=True):
        alone = [model(y.clone(), sigma_B, c)[0] for y, c in asked]
        turns, attend = [], onednn._Block.attend
        monkeypatch.setattr(onednn._Block, "attend", lambda self, *a: turns.append(self) or attend(self, *a))
        for (y, c), v in zip(asked, alone, strict=True):
            assert torch.equal(model(y, sigma_B, c)[0], v)
        first = turns.count(model._onednn.blocks[0])
        assert first * 5 == turns.count(model._onednn.blocks[1]) * 3
    assert not torch.equal(alone[0], alone[1])


@torch.no_grad()
def test_the_plain_blocks_are_taken_outside_and_where_levels_differ_or_states_are_tapped():
    model, told, x = backbone("i2v"), conditions("i2v", 2), state(2)
    mixed, same = torch.tensor([0.9, 0.3]), torch.tensor([0.9, 0.9])
    plain = [model(x, mixed, told)[0], model(x, same, told)[0], model(x, same, told, (1,))[1]]
    with model.remembering(onednn=True):
        assert not torch.equal(model(x, same, told)[0], plain[1])
        assert torch.equal(model(x, mixed, told)[0], plain[0])
        assert torch.equal(model(x, same, told, (1,))[1], plain[2])
    assert torch.equal(model(x, same, told)[0], plain[1])


def test_other_weights_devices_and_settings_are_refused():
    model = backbone("i2v")
    layer = model.blocks[0].ffn.net[2]
    model.blocks[0].ffn.net[2] = torch.nn.Sequential(layer)  # as an adapter wraps it
    with pytest.raises(ConfigError, match="plain layers in fp32"), model.remembering(onednn=True):
        pass
    model.blocks[0].ffn.net[2] = layer.bfloat16()
    with pytest.raises(ConfigError, match="plain layers in fp32"), model.remembering(onednn=True):
        pass
    with pytest.raises(ConfigError, match="not on meta"):
        onednn.require_onednn(torch.device("meta"))
    for change in ({"fold_text_padding": False}, {"dtype": "bf16"}):
        with pytest.raises(ConfigError, match="folded text padding in fp32"):
            settings(**FAST | change)


def test_a_roll_out_is_the_same_but_for_rounding_and_the_same_bytes_again(triplets):  # noqa: F811
    unit = read_triplets(triplets)[:2]

    def rolled(**changes):
        return Worker.load(settings(steps=6, guidance=5.0, **changes), (SIZE, SIZE)).work(unit).made

    plain, fast, again = rolled(), rolled(**FAST), rolled(**FAST)
    assert [made.members for made in fast] == [made.members for made in again]
    for a, b in zip(plain, fast, strict=True):
        a, b = (unpack(made.key, made.members, "").rollout.end_Cthw for made in (a, b))
        assert not torch.equal(a, b) and torch.allclose(a, b, atol=1e-4)


def test_it_is_part_of_what_a_result_is_and_folders_that_do_not_know_it_go_on():
    assert "onednn" not in settings(fold_text_padding=True).settings
    assert settings(**FAST).settings["onednn"] is True

"""Profiles in models: applied by ``extend``, saved with the configuration, refused elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from longswift import Full, InputError, MSSwift, SlidingWindow
from longswift.core.observe import Observed, observe
from longswift.hf import extend, set_attention, set_profile
from longswift.hf.settings import architecture_of, stand_in
from longswift.mechanisms.profile import LayerProfile, Profile
from tests.hf.models import SPARSE, batch, build


def profile_for(model: torch.nn.Module) -> Profile:
    return Profile(
        architecture=architecture_of(model),
        attention=SPARSE,
        layers={
            0: LayerProfile(scale=(1, 0), key_tokens=(8, 0), dense=(False, False)),
            1: LayerProfile(scale=(0, 0), key_tokens=(0, 0), dense=(True, True)),
        },
    )


def mechanisms_run(model: torch.nn.Module, ids: torch.Tensor) -> tuple[list[object], torch.Tensor]:
    calls: list[Observed] = []
    with torch.no_grad(), observe(calls.append):
        logits = model(input_ids=ids).logits
    assert [call.layer for call in calls] == [0, 1]
    return [call.mechanism for call in calls], logits


def test_extend_applies_a_profile_that_saving_keeps(tmp_path: Path) -> None:
    model = build("llama")
    profile = profile_for(model)
    (tmp_path / "profile.json").write_text(profile.to_json())
    ids = batch(150)["input_ids"]
    own, before = model.config._attn_implementation, model(input_ids=ids).logits
    with extend(model, 256, None, profile=tmp_path / "profile.json"):
        ran, logits = mechanisms_run(model, ids)
        assert ran == [profile.mechanism(0), Full()]
        model.save_pretrained(tmp_path / "model")
    assert model.config._attn_implementation == own
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="ms_swift"
    ).eval()
    ran, reloaded = mechanisms_run(again, ids)
    assert ran == [profile.mechanism(0), Full()]
    torch.testing.assert_close(reloaded, logits)


def test_a_profile_of_another_model_is_refused() -> None:
    model = build("llama")
    profile = profile_for(model)
    other = replace(profile, architecture=replace(profile.architecture, head_dim=16))
    before = model.config.to_dict()
    for apply in (lambda: set_profile(model, other), lambda: extend(model, 256, profile=other)):
        with pytest.raises(InputError, match="head_dim"):
            apply()
        assert model.config.to_dict() == before


def test_a_profile_lacks_no_layer_that_sees_everything() -> None:
    model = build("gemma3")
    whole = replace(profile_for(model), architecture=architecture_of(model))
    full = model.config.layer_types.index("full_attention")
    lacking = replace(whole, layers={1 - full: whole.layers[1 - full]})
    with pytest.raises(InputError, match=f"got none for {full}"):
        set_profile(model, lacking)


def test_stand_ins_run_where_the_configured_mechanism_would() -> None:
    model = build("llama")
    set_attention(model, SPARSE)
    ids = batch(100)["input_ids"]
    tried = {0: MSSwift(collect=True), 1: SlidingWindow(window=9)}
    with stand_in(lambda layer: tried[layer or 0]):
        ran, _ = mechanisms_run(model, ids)
    assert ran[0] is tried[0] and ran[1] is tried[1]
    assert mechanisms_run(model, ids)[0] == [SPARSE, SPARSE]

"""Models of more than text: their text models are those of families, wherever their checkpoints place them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import packed as packed_checkpoint
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS, WRAPPERS
from steps import open_engine, step

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.mix import parse_mix
from hybrid.models import model_spec
from hybrid.weights.checkpoints.opening import open_checkpoint

MROPE = {"rope_type": "default", "mrope_section": [4, 4, 4], "mrope_interleaved": True}  # of text it turns as usual
# The family that each is, the word of its text_config, and what that says otherwise.
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", "gemma3_text", {}),
    "gemma4": ("gemma4_text", "gemma4_text", {}),
    "glm4v_moe": ("glm4_moe", "glm4v_moe_text", {"use_qk_norm": False}),
    "glm5_next": ("glm5_next_text", "glm5_next_text", {}),
    "internvl": ("qwen3_moe", "qwen3_moe", {}),
    "kimi_k25": ("deepseek_v3", "kimi_k2", {}),
    "lfm2_vl": ("lfm2", "lfm2", {}),
    "minimax_m3_vl": ("minimax_m3_vl_text", "minimax_m3_vl_text", {}),
    "mistral3": ("mistral", "mistral", {}),
    "qwen2_5_vl": ("qwen2", "qwen2_5_vl_text", {"rope_scaling": MROPE}),
    "qwen2_vl": ("qwen2", "qwen2_vl_text", {"rope_scaling": MROPE}),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_text", {}),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_5_moe_text", {}),
    "qwen3_vl": ("qwen3", "qwen3_vl_text", {"rope_scaling": MROPE}),
    "qwen3_vl_moe": ("qwen3_moe", "qwen3_vl_moe_text", {"rope_scaling": MROPE}),
    "qwen4_exp": ("qwen4_exp_text", "qwen4_exp_text", {}),
    "step3p7": ("step3p5", "step3p5", {}),
}
PLACES = {
    "within the model": ("model.language_model.", "lm_head."),
    "a model itself": ("language_model.model.", "language_model.lm_head."),
}


def nested(wrapper: str, place: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The configuration of the whole, its tensors, and those of the family alone. Qwen3-VL transposes its experts."""
    family, word, changes = PARTS[wrapper]
    plain = {**CONFIGS[family], **changes}
    config = {"model_type": wrapper, "text_config": {**plain, "model_type": word}, "vision_config": {"depth": 2}}
    stacked = wrapper == "qwen3_vl_moe"
    tensors = random_tensors(plain, fused=stacked)
    layers, head = PLACES[place]
    renamed = {
        name.replace("model.", layers, 1) if name.startswith("model.") else name.replace("lm_head.", head): (
            np.ascontiguousarray(array.swapaxes(1, 2)) if stacked and ".experts." in name else array
        )
        for name, array in tensors.items()
    }
    return config, {**renamed, "model.visual.x": np.zeros(2, np.float32), "mtp.x": np.zeros(2, np.float32)}, tensors


def test_every_model_of_more_than_text_is_tried_here() -> None:
    assert tuple(PARTS) == WRAPPERS


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_text_model_within_another_is_the_same(tmp_path: Path, wrapper: str, place: str) -> None:
    """The store of either, byte for byte; what is said of the rest."""
    config, tensors, alone = nested(wrapper, place)
    family, _, changes = PARTS[wrapper]
    whole = open_checkpoint(write_tensors(tmp_path / "whole", config, tensors))
    ours = packed_checkpoint(tmp_path / "whole")
    theirs = packed_checkpoint(write_tensors(tmp_path / "alone", {**CONFIGS[family], **changes}, alone))
    assert list(ours.tensors) == list(theirs.tensors)
    assert all(np.array_equal(ours.array(name), theirs.array(name)) for name in ours.tensors)
    assert whole.spec.model_type == wrapper
    notes = ["note: 1 tensors of visual are not read: the model is served for text alone"]
    assert whole.notes(whole.native) == notes == whole.notes(parse_mix("int8", whole.native))


@pytest.mark.parametrize("wrapper", ["gemma4", "kimi_k25", "qwen3_vl_moe"])
def test_it_makes_the_logits_of_its_family(tmp_path: Path, wrapper: str) -> None:
    config, tensors, alone = nested(wrapper, "within the model")
    family, _, changes = PARTS[wrapper]
    paths = [
        write_tensors(tmp_path / "whole", config, tensors),
        write_tensors(tmp_path / "alone", {**CONFIGS[family], **changes}, alone),
    ]
    logits = []
    for path in paths:
        with open_engine(path, tmp_path / "cache") as engine:
            logits.append(step(engine, (0, 0, np.arange(40))))
    assert logits[0].tobytes() == logits[1].tobytes()


def test_experts_that_are_not_transposed_are_told_by_their_shape(tmp_path: Path) -> None:
    """As transformers 5 saves them."""
    config, tensors, alone = nested("qwen3_vl_moe", "within the model")
    straight = {
        name: np.ascontiguousarray(array.swapaxes(1, 2)) if ".experts." in name else array
        for name, array in tensors.items()
    }
    stores = [
        packed_checkpoint(write_tensors(tmp_path / str(i), config, some)) for i, some in enumerate((tensors, straight))
    ]
    assert all(np.array_equal(stores[0].array(name), stores[1].array(name)) for name in stores[0].tensors)


def test_a_tensor_in_both_places_is_refused(tmp_path: Path) -> None:
    config, tensors, _ = nested("gemma3", "a model itself")
    name = "language_model.model.norm.weight"
    more = {"model.language_model.norm.weight": tensors[name]}
    with pytest.raises(WeightsError, match=r"has tensor language_model\.model\.norm\.weight twice, also as model\."):
        open_checkpoint(write_tensors(tmp_path / "hf", config, tensors | more))


@pytest.mark.parametrize("text", [None, [], {"model_type": "gpt2"}])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_text_model_that_is_none_is_refused(wrapper: str, text: Any) -> None:
    with pytest.raises(ConfigError, match="text_config"):
        model_spec({"model_type": wrapper, "text_config": text})


def test_what_is_wrong_in_it_is_said_to_be_there() -> None:
    text = {**CONFIGS["gemma3_text"], "hidden_size": -1}
    with pytest.raises(ConfigError, match=r"^config\.json: text_config: hidden_size is -1"):
        model_spec({"model_type": "gemma3", "text_config": text})


@pytest.mark.parametrize(("whole", "part", "tied"), [(False, True, False), (True, False, True), (None, True, True)])
def test_what_the_whole_says_of_the_head_holds(whole: bool | None, part: bool, tied: bool) -> None:
    """transformers writes into text_config what is its default there, whatever the model has."""
    assert is_tied("qwen3_vl_moe", whole, part) == tied


def is_tied(wrapper: str, whole: bool | None, part: bool | None) -> bool:
    """Of what the whole and its text say of the head; None: nothing."""
    config, *_ = nested(wrapper, "within the model")
    text = {name: value for name, value in config["text_config"].items() if name != "tie_word_embeddings"}
    text |= {} if part is None else {"tie_word_embeddings": part}
    return model_spec({**config, "text_config": text} | ({} if whole is None else {"tie_word_embeddings": whole})).tied


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_where_the_whole_says_nothing_of_the_head_its_default_holds(wrapper: str) -> None:
    """As the classes of transformers have it, some of which ask the text as well."""
    default = wrapper in ("gemma3", "gemma4", "internvl", "kimi_k25", "lfm2_vl", "mistral3")
    asks = wrapper in ("glm4v_moe", "qwen2_5_vl", "qwen2_vl")
    assert [is_tied(wrapper, None, part) for part in (None, False, True)] == [default, default, True]
    assert [is_tied(wrapper, False, part) for part in (None, False, True)] == [False, False, asks]


def test_a_head_of_its_own_is_used_though_only_the_text_says_that_it_is_tied(tmp_path: Path) -> None:
    config, tensors, _ = nested("qwen2_5_vl", "within the model")
    text = {**config["text_config"], "tie_word_embeddings": True}
    path = write_tensors(tmp_path, {**config, "text_config": text, "tie_word_embeddings": False}, tensors)
    assert not open_checkpoint(path).spec.tied


def test_a_head_of_its_own_is_used_though_both_say_that_it_is_tied(tmp_path) -> None:
    config, tensors, _ = nested("qwen3_vl_moe", "within the model")
    tied = {"tie_word_embeddings": True}
    path = write_tensors(tmp_path, {**config, "text_config": {**config["text_config"], **tied}, **tied}, tensors)
    assert not open_checkpoint(path).spec.tied


def test_fields_of_the_text_may_be_those_of_the_whole() -> None:
    """As Qwen2.5-VL is published."""
    config, *_ = nested("qwen2_5_vl", "within the model")
    rope = {"type": "mrope", "mrope_section": [4, 4, 4]}
    assert model_spec({**config["text_config"], "model_type": "qwen2_5_vl", "rope_scaling": rope}) == model_spec(config)


def test_qwen2_5_vl_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Its text lies where that of a text model would, and its tower beside it."""
    plain = CONFIGS["qwen2"]
    rope = {"type": "mrope", "mrope_section": [4, 4, 4]}
    config = {**plain, "model_type": "qwen2_5_vl", "rope_scaling": rope, "vision_config": {"depth": 2}}
    alone = random_tensors(plain)
    tensors = {**alone, "visual.merger.mlp.0.weight": np.zeros(2, np.float32)}
    whole = open_checkpoint(write_tensors(tmp_path / "whole", config, tensors))
    ours, theirs = (
        packed_checkpoint(tmp_path / "whole"),
        packed_checkpoint(write_tensors(tmp_path / "alone", plain, alone)),
    )
    assert all(np.array_equal(ours.array(name), theirs.array(name)) for name in theirs.tensors)
    assert whole.notes(whole.native) == ["note: 1 tensors of visual are not read: the model is served for text alone"]


def test_names_as_qwen2_5_vl_has_them_beside_ours_are_refused(tmp_path: Path) -> None:
    config, tensors, alone = nested("qwen2_5_vl", "within the model")
    more = {"model.norm.weight": alone["model.norm.weight"]}
    with pytest.raises(WeightsError, match=r"has tensor model\.norm\.weight twice, also as model\.language_model"):
        open_checkpoint(write_tensors(tmp_path / "hf", config, tensors | more))

"""Names that other programs wrap, and ViTs with tokens that I-JEPA's have not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from jepa_kit.errors import CheckpointError
from jepa_kit.interop import hf
from jepa_kit.interop.formats import read_encoder, write
from jepa_kit.interop.names import bare, strip_names

HEADS = 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("norm.weight", "norm.weight"),
        ("module.module._orig_mod.backbone.norm.weight", "norm.weight"),
        ("blocks.0._fsdp_wrapped_module.attn._checkpoint_wrapped_module.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("module", "module"),
        ("submodule.norm", "submodule.norm"),
    ],
)
def test_bare_names(name, expected):
    assert bare(name) == expected


def wrap(name, how):
    if how == "inside":
        head, _, tail = name.partition(".")
        return f"_fsdp_wrapped_module.{head}._fsdp_wrapped_module.{tail}" if tail else f"_fsdp_wrapped_module.{name}"
    return f"{how}{name}"


WRAPS = ("_orig_mod.", "_fsdp_wrapped_module.", "module.module.", "backbone.", "module._orig_mod.backbone.", "inside")


@pytest.mark.parametrize("how", WRAPS)
@pytest.mark.parametrize("format", ["official", "timm", "timm in safetensors", "hf"])
def test_wrapped_weights(make_weights, tmp_path, how, format):
    weights = make_weights()
    path = tmp_path / "a"
    if format == "hf":
        write(weights, path, "hf")
        wrapped = {wrap(f"ijepa.{name}", how): value for name, value in hf.to_names(weights).items()}
        save_file({name: value.contiguous() for name, value in wrapped.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(hf.to_config(weights.architecture)))
    else:
        state = {wrap(name, how): v for name, v in {"pos_embed": weights.table[None], **weights.state}.items()}
        if format == "timm in safetensors":
            save_file(state, path)
        else:
            torch.save({"target_encoder": state} if format == "official" else {"state_dict": state}, path)
    found = read_encoder(path, None, num_heads=HEADS).state
    assert all(torch.equal(found[name], value) for name, value in weights.state.items())


def test_a_prefix_of_the_user(make_weights, tmp_path):
    """Two networks in one file; the one that is asked for."""
    one, other = make_weights(seed=0), make_weights(seed=1)
    state = {f"student.{name}": v for name, v in {"pos_embed": one.table[None], **one.state}.items()}
    state |= {f"teacher.backbone.{name}": v for name, v in {"pos_embed": other.table[None], **other.state}.items()}
    torch.save(state, tmp_path / "flat")
    save_file(state, tmp_path / "safe")
    nested = {"teacher": {name.removeprefix("teacher."): v for name, v in state.items() if name.startswith("teacher.")}}
    torch.save({**nested, "epoch": 3}, tmp_path / "nested")
    for name in ("flat", "safe", "nested"):
        for prefix in ("teacher.", "teacher", "teacher.backbone."):
            found = read_encoder(tmp_path / name, None, num_heads=HEADS, prefix=prefix)
            assert all(torch.equal(found.state[key], value) for key, value in other.state.items())
    assert "left out: student.pos_embed" in read_encoder(tmp_path / "flat", None, num_heads=2, prefix="teacher").about()
    with pytest.raises(
        CheckpointError, match=r"has no name that begins with 'tutor.'; names begin with student, teacher"
    ):
        read_encoder(tmp_path / "flat", None, prefix="tutor.")
    with pytest.raises(CheckpointError, match=r"; prefix='student.' \(--prefix\) selects the names that begin with it"):
        read_encoder(tmp_path / "flat", None)


def test_names_that_become_one():
    with pytest.raises(CheckpointError, match=r"x has both 'a.b' and 'module.a.b', the same name unwrapped"):
        strip_names({"a.b": 1, "module.a.b": 2}, "x")


@pytest.mark.parametrize("token", ["cls_token", "module.class_token", "embeddings.cls_token", "reg_token"])
def test_extra_tokens_are_named(token):
    with pytest.raises(CheckpointError, match=r"x is a ViT with extra tokens \(.*token\), such as DINO's or MAE's; I-"):
        strip_names({"norm.weight": 1, token: 2}, "x")

"""timm's names. timm itself is not needed: its key names and module are written out here, from its documentation."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jepa_kit.errors import CheckpointError
from jepa_kit.interop.formats import read_encoder, write
from jepa_kit.interop.frozen import FrozenEncoder


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weight = torch.softmax(q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5, dim=-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmViT(nn.Module):
    """A ViT with timm's names: class_token=False, global_pool="avg", fc_norm=False."""

    def __init__(self, dim=16, depth=2, heads=2, hidden=40, patch=8, patches=16):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.Sequential(*[Block(dim, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward_features(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.norm(self.blocks(x))


def test_a_vit_with_its_names_gives_our_tokens(make_weights, tmp_path):
    weights = make_weights()
    write(weights, tmp_path / "a", "timm")
    model = TimmViT()
    model.load_state_dict(load_file(tmp_path / "a"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(images)
    assert (FrozenEncoder(weights).forward_features(images) - expected).abs().max() < 1e-5


@pytest.fixture
def plain(make_weights):
    """A state dict as timm has it, without our note."""
    weights = make_weights()
    return {"pos_embed": weights.table[None], **weights.state}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_files_of_another_maker(plain, make_weights, tmp_path, kind, wrapper):
    path = tmp_path / "a.pth"
    if kind == "safetensors":
        save_file(plain, path)
    else:
        prefixed = {f"module.{name}": value for name, value in plain.items()} if wrapper else plain
        torch.save({wrapper: prefixed, "epoch": 3} if wrapper else prefixed, path)
    found = read_encoder(path, None, num_heads=2)
    expected = make_weights()
    assert found.architecture == expected.architecture
    assert all(torch.equal(found.state[name], expected.state[name]) for name in expected.state)
    assert found.provenance.encoder is None


def test_channels_are_those_of_the_weights(make_weights, tmp_path):
    weights = make_weights(in_chans=5)
    save_file({"pos_embed": weights.table[None], **weights.state}, tmp_path / "a")
    assert read_encoder(tmp_path / "a", None, num_heads=2).architecture.in_chans == 5


def test_a_folder_of_the_hub(plain, tmp_path):
    save_file({**plain, "head.weight": torch.zeros(3, 16)}, tmp_path / "model.safetensors")
    known = {"license": "cc-by-nc-4.0", "mean": [0.1, 0.2, 0.3], "std": [1.0, 0.5, 0.25]}
    config = {"architecture": "vit_huge_patch14_gap_224", "pretrained_cfg": known}
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = read_encoder(tmp_path, None, num_heads=2).provenance
    assert (held.licence, held.notes) == ("cc-by-nc-4.0", ("left out: head.weight",))
    assert (held.mean, held.std) == ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has timm's config.json, but no model.safetensors"):
        read_encoder(tmp_path, None)


def test_known_sizes_tell_their_heads(make_weights, tmp_path):
    weights = make_weights(embed_dim=192, depth=12, num_heads=3, mlp_hidden=32)
    save_file({"pos_embed": weights.table[None], **weights.state}, tmp_path / "a")
    assert read_encoder(tmp_path / "a", None).architecture.num_heads == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": torch.zeros(1, 1, 16)}, r"is a ViT with extra tokens \(cls_token\), such as DINO's or MAE's"),
        ({"fc_norm.weight": torch.zeros(16)}, "unexpected: fc_norm.weight"),
        ({"blocks.0.ls1.gamma": torch.zeros(16)}, "unexpected: blocks.0.ls1.gamma"),
        ({"norm.bias": None}, "missing: norm.bias"),
        ({"blocks.1.mlp.fc1.weight": torch.zeros(7, 16)}, r"misshapen: blocks.1.mlp.fc1.weight \(\(7, 16\), not \(40,"),
        (
            {"pos_embed": torch.zeros(2, 16, 16)},
            r"the position table of .* must be \[N, D\] or \[1, N, D\], but is \(2, 16, 16\)",
        ),
        ({"pos_embed": torch.zeros(1, 17, 16)}, "positions for 17 patches, which are no square"),
        ({"pos_embed": None}, "has no position table, so it does not say its image size; give image_size"),
        ({"patch_embed.proj.weight": torch.zeros(16, 192)}, "is not a ViT as I-JEPA has it: patch_embed.proj.weight"),
    ],
)
def test_another_architecture(plain, tmp_path, change, message):
    state = {name: value for name, value in {**plain, **change}.items() if value is not None}
    save_file(state, tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        read_encoder(tmp_path / "a", None, num_heads=2)


def test_a_file_of_other_things(tmp_path):
    torch.save({"epoch": 3, "history": [1.0]}, tmp_path / "a")
    with pytest.raises(CheckpointError, match="a is not a checkpoint of any known layout: it contains epoch, history"):
        read_encoder(tmp_path / "a")
    torch.save({"resnet.conv1.weight": torch.zeros(3)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"b is not a ViT as I-JEPA has it: .* it contains resnet.conv1.weight"):
        read_encoder(tmp_path / "b")

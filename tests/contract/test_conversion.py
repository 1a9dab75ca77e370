"""Conversion: every file format, every layout, both ways; and files that are not what they should be."""

import argparse
import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path

import open_clip.model
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

from conversion import from_clip, to_original
from conversion.checkpoints import (
    CheckpointError,
    UnsafeCheckpointError,
    read_checkpoint,
    save_state_dict,
)
from conversion.clip_layouts import clip_table, from_openai, half_layout, infer_config, round_to_half
from conversion.from_clip import convert_state_dict, expected_state, load_model
from conversion.preprocessing import image_options
from conversion.tables import (
    ConversionError,
    Drop,
    Rename,
    Repeat,
    Split,
    Transpose,
    convert,
    forward_names,
    original_value,
    revert,
)
from hf_vlp.files import whole_folder
from hf_vlp.models.clip.configuration_clip import VlpClipConfig, VlpClipResNetConfig
from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining, VlpClipModel
from tests.contract.weight_files import CallsSystem, read_manifest, same

# torch.jit is on its way out and says so; the published files are what it is.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("vit", "vit_multihead", "vit_fp32_checkpoint", "resnet")
SIZES = {"input_resolution", "context_length", "vocab_size"}
MANIFESTS = sorted((GOLDEN / "manifests").glob("clip_*.json.gz"))


def golden(case: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(GOLDEN / "clip" / case / "checkpoint.pt")


class Node(nn.Module):
    """A module tree with the names of a state dict: what stands in for the published archives' modules."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def module_tree(state: dict[str, torch.Tensor]) -> nn.Module:
    root = Node()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        if tensor.is_floating_point() and not leaf.startswith("running_"):
            node.register_parameter(leaf, nn.Parameter(tensor.clone()))
        else:
            node.register_buffer(leaf, tensor.clone())
    return root


# ------------------------------------------------------------------------------------------------ file formats


def write_zip(state, path):
    torch.save(state, path)


def write_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_protocol_4(state, path):
    torch.save(state, path, pickle_protocol=4)


def write_safetensors(state, path):
    safetensors.torch.save_file(state, path)


def write_wrapped(state, path):
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": wrapped}, path)


def write_wrapped_twice(state, path):
    torch.save({"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}}, path)


def write_scripted(state, path):
    torch.jit.save(torch.jit.script(module_tree(state)), path)


def write_traced(state, path):
    torch.jit.save(torch.jit.trace(module_tree(state), torch.zeros(1)), path)


WRITERS = (
    write_zip,
    write_legacy,
    write_protocol_4,
    write_safetensors,
    write_wrapped,
    write_wrapped_twice,
    write_scripted,
    write_traced,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
@pytest.mark.parametrize("case", ["vit", "vit_fp32_checkpoint", "resnet"])
def test_every_format_gives_the_same_state_dict(case, write, tmp_path):
    state = golden(case)
    write(state, tmp_path / "checkpoint")
    assert same(read_checkpoint(tmp_path / "checkpoint"), state)
    config, ours = convert_state_dict(read_checkpoint(tmp_path / "checkpoint"))
    assert config == convert_state_dict(state)[0]
    assert same(ours, convert_state_dict(state)[1])


def test_archive_equals_what_torch_reads_from_it(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.second = nn.Sequential(nn.BatchNorm2d(4), nn.Linear(5, 5), nn.Linear(5, 5))
            self.second[2].weight = self.second[1].weight  # shared
            self.plain = torch.ones(3)  # an attribute, no part of the state dict
            self.sizes = [1, 2]
            self.names = {"a": 1}
            self.transposed = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
            self.register_parameter("absent", None)
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.plain.sum() + self.sizes[0] + self.names["a"]

    path = tmp_path / "odd.pt"
    torch.jit.save(torch.jit.script(Odd()), path)
    found, expected = read_checkpoint(path), dict(torch.jit.load(path).state_dict())
    assert same(found, expected)
    assert "plain" not in found and "second.2.weight" in found
    assert not same({**found, "flags": ~found["flags"]}, expected)


def test_archives_of_other_machines(tmp_path):
    """Storages saved on a GPU, without a byte order record (older torch), and in the other byte order."""
    state = golden("vit")
    write_scripted(state, tmp_path / "plain.pt")
    for change in ("gpu", "no_byteorder", "big"):
        with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(tmp_path / change, "w") as target:
            for name in source.namelist():
                data = source.read(name)
                if change == "gpu" and name.endswith("data.pkl"):
                    assert b"X\x03\x00\x00\x00cpu" in data
                    data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                if name.endswith("/byteorder"):
                    if change == "no_byteorder":
                        continue
                    data = change.encode() if change == "big" else data
                target.writestr(name, data)
        found = read_checkpoint(tmp_path / change)
        assert same(found, state) == (change != "big")
    swapped = found["logit_scale"][None].view(torch.uint8).flip(0).view(torch.float32)[0]
    assert torch.equal(swapped, state["logit_scale"])


@pytest.mark.parametrize("sharded", [False, True])
def test_folders(sharded, tmp_path):
    state = golden("vit")
    if sharded:
        names, half = list(state), len(state) // 2
        shards = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
        for file, part in shards.items():
            safetensors.torch.save_file({name: state[name] for name in part}, tmp_path / file)
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert same(read_checkpoint(tmp_path), state)
    if sharded:
        (tmp_path / "b.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"b\.safetensors: no such file"):
            read_checkpoint(tmp_path)
        index["weight_map"]["logit_scale"] = "../a.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_checkpoint(tmp_path)


def test_hash_is_checked_before_reading(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(golden("vit"), path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(read_checkpoint(path, sha256=right.upper()), golden("vit"))
    with pytest.raises(CheckpointError, match=f"SHA-256 is {right}, expected 00"):
        read_checkpoint(path, sha256="00" * 32)


# ------------------------------------------------------------------------------------------------ bad files


def evil_zip(evil, path):
    torch.save({"weight": torch.ones(2), "evil": evil}, path)


def evil_protocol_4(evil, path):
    torch.save({"weight": torch.ones(2), "evil": evil}, path, pickle_protocol=4)


def evil_legacy(evil, path):
    torch.save({"weight": torch.ones(2), "evil": evil}, path, _use_new_zipfile_serialization=False)


def evil_pickle(evil, path):
    path.write_bytes(pickle.dumps(evil))


def evil_folder(evil, path):
    path.mkdir()
    evil_zip(evil, path / "pytorch_model.bin")


def evil_archive(evil, path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module_tree(golden("vit"))), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(evil, 2) if name.endswith("/data.pkl") else source.read(name))


@pytest.mark.parametrize("write", [evil_zip, evil_protocol_4, evil_legacy, evil_pickle, evil_folder, evil_archive])
def test_code_in_a_file_is_refused_and_not_run(write, tmp_path):
    trace = tmp_path / "trace"
    write(CallsSystem(trace), tmp_path / "checkpoint")
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system.*nothing was run"):
        read_checkpoint(tmp_path / "checkpoint")
    assert not trace.exists()
    function, arguments = CallsSystem(trace).__reduce__()
    function(*arguments)
    assert trace.exists(), "the payload must be able to leave its trace"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 353976522\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"some words", "unknown file type"),
        (pickle.dumps([1, 2]), "torch.save did not write"),
    ],
)
def test_files_that_are_no_weights(content, reason, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\.pt: .*{reason}.*Remedy: "):
        read_checkpoint(path)


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_safetensors, write_scripted])
def test_truncated_files(write, tmp_path):
    write(golden("vit"), tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for length in (9, 200, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut: .*Remedy: "):
            read_checkpoint(tmp_path / "cut")
    assert len(read_checkpoint(tmp_path / "whole")) == len(golden("vit"))


def test_damaged_archive(tmp_path):
    """A storage of an archive with a flipped bit (zip checksum), and one that is shorter than its tensor says."""
    write_scripted(golden("vit"), tmp_path / "whole")
    data = bytearray((tmp_path / "whole").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole") as archive:
        biggest = max(
            (item for item in archive.infolist() if "/data/" in item.filename), key=lambda item: item.file_size
        )
        data[biggest.header_offset + 4000] ^= 1
        with zipfile.ZipFile(tmp_path / "short", "w") as target:
            for name in archive.namelist():
                target.writestr(name, archive.read(name)[: 8 if name == biggest.filename else None])
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(CheckpointError, match="flipped: .*CRC"):
        read_checkpoint(tmp_path / "flipped")
    with pytest.raises(CheckpointError, match="short: .*has 8 bytes instead of"):
        read_checkpoint(tmp_path / "short")


def test_dictionaries_without_a_state_dict(tmp_path):
    torch.save({"epoch": 1, "opt": argparse.Namespace(a=1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="found opt: Namespace.*Remedy: .*state_dict"):
        read_checkpoint(tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_checkpoint(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ tables

TABLE = [
    Rename("a.*", "b.*"),
    Rename("layer{}.{}.*", "stage.{}.{}.*"),
    Transpose("t", "linear.weight"),
    Split("blocks.{}.qkv", ["layers.{}.q", "layers.{}.k", "layers.{}.v"]),
    Drop("size", "told by the shapes"),
]


def table_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"a.w.x": (2,), "layer3.11.y": (1, 2), "t": (2, 5), "blocks.12.qkv": (6, 2), "size": ()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_tables_are_reversible():
    state = table_state()
    ours = convert(state, TABLE)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        "b.w.x": (2,),
        "stage.3.11.y": (1, 2),
        "linear.weight": (5, 2),
        **{f"layers.12.{part}": (2, 2) for part in "qkv"},
    }
    assert torch.equal(ours["linear.weight"], state["t"].T)
    assert torch.equal(ours["layers.12.k"], state["blocks.12.qkv"][2:4])
    back = revert(ours, TABLE)
    assert same(back, {name: tensor for name, tensor in state.items() if name != "size"})
    assert not same(revert({**ours, "layers.12.k": ours["layers.12.q"]}, TABLE), back)
    meta = convert({name: tensor.to("meta") for name, tensor in state.items()}, TABLE)
    assert {name: tensor.shape for name, tensor in meta.items()} == {
        name: tensor.shape for name, tensor in ours.items()
    }


def test_tables_name_the_parts_of_an_original():
    ours = convert(table_state(), TABLE)
    assert forward_names("blocks.12.qkv", TABLE) == ["layers.12.q", "layers.12.k", "layers.12.v"]
    assert forward_names("size", TABLE) == []
    assert torch.equal(original_value("blocks.12.qkv", ours, TABLE), table_state()["blocks.12.qkv"])
    assert torch.equal(original_value("t", ours, TABLE), table_state()["t"])
    assert original_value("t", {"linear.weight": None}, TABLE) is None
    with pytest.raises(ConversionError, match="no row for other"):
        forward_names("other", TABLE)
    with pytest.raises(ConversionError, match=r"needs layers\.12\.q, .*absent"):
        original_value("blocks.12.qkv", {}, TABLE)


def test_what_an_original_stores_twice_is_one_tensor_of_ours():
    table, state = [*TABLE, Repeat("again", "t")], table_state()
    ours = convert({**state, "again": state["t"]}, table)
    assert same(ours, convert(state, TABLE))
    back = revert(ours, table)
    assert torch.equal(back["again"], state["t"]) and "again" not in revert(ours, TABLE)
    assert torch.equal(original_value("again", ours, table), state["t"])
    assert "again" not in revert({name: ours[name] for name in ours if "linear" not in name}, table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(other=torch.ones(3)), r"checkpoint only \(1\):\n  other \(3,\)"),
        (lambda state: state.pop("t"), r"ours only \(1\):\n  linear.weight"),
        (
            lambda state: state.update({"blocks.12.qkv": torch.ones(7)}),
            r"blocks.12.qkv: shape \(7,\) cannot be cut into 3",
        ),
        (lambda state: state.update(t=torch.ones(7)), r"t: a tensor of shape \(7,\) is no matrix"),
        (lambda state: state.update({"blocks.1x.qkv": torch.ones(6)}), r"checkpoint only \(1\):\n  blocks.1x.qkv"),
    ],
)
def test_tables_are_strict(change, message):
    state = table_state()
    change(state)
    with pytest.raises(ConversionError, match=message):
        convert(state, TABLE)


def test_tables_compare_with_the_model():
    expected = convert(table_state(), TABLE)
    convert(table_state(), TABLE, expected)
    with pytest.raises(ConversionError, match=r"ours only \(1\):\n  layers.13.q \(1,\)"):
        convert(table_state(), TABLE, {**expected, "layers.13.q": torch.ones(1)})
    with pytest.raises(ConversionError, match=r"b\.w\.x: \(2,\), expected \(3,\)"):
        convert(table_state(), TABLE, {**expected, "b.w.x": torch.ones(3)})
    with pytest.raises(ConversionError, match=r"checkpoint only \(1\):\n  b\.w\.x"):
        convert(table_state(), TABLE, {name: tensor for name, tensor in expected.items() if name != "b.w.x"})
    with pytest.raises(ConversionError, match="both become b.w.x"):
        convert(table_state(), [*TABLE[:4], Rename("size", "b.w.x")])
    with pytest.raises(ConversionError, match=r"our model only \(1\):\n  other"):
        revert({**expected, "other": torch.ones(1)}, TABLE)


# ------------------------------------------------------------------------------------------------ CLIP, original layout


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case):
    state = golden(case)
    config, ours = convert_state_dict(state)
    back = revert(ours, clip_table(config))
    assert same(back, {name: tensor for name, tensor in state.items() if name not in SIZES})
    again = convert(back, clip_table(config), expected_state(config))
    assert same(again, ours)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_published_checkpoints_convert_with_nothing_left_over(manifest):
    facts, state = read_manifest(manifest)
    config, ours = convert_state_dict(state)
    with torch.device("meta"):
        model = VlpClipModel(config)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vision = sum(size for name, size in sizes.items() if name.startswith(("vision_model.", "visual_projection.")))
    counts = facts["parameters"]
    assert (sum(sizes.values()), vision) == (counts["total"], counts["vision"])
    assert f"{counts['total']:,}" in from_clip.summary(model) and f"{counts['text_and_rest']:,}" in from_clip.summary(
        model
    )

    expected, vision_config, text_config = facts["config"], config.vision_config, config.text_config
    assert config.projection_dim == expected["embed_dim"]
    assert (text_config.vocab_size, text_config.max_position_embeddings) == (expected["vocab_size"], 77)
    assert text_config.eos_token_id == 49407 and text_config.bos_token_id == 49406
    assert text_config.num_attention_heads == expected["transformer_heads"]
    assert vision_config.num_attention_heads == expected["vision_heads"]
    assert vision_config.image_size == expected["image_resolution"]
    layers = vision_config.layers if isinstance(vision_config, VlpClipResNetConfig) else vision_config.num_hidden_layers
    assert layers == expected["vision_layers"]

    back = half_layout(revert(ours, clip_table(config)))
    assert {name: tensor.dtype for name, tensor in back.items()} == {
        name: tensor.dtype for name, tensor in state.items() if name not in SIZES
    }


def test_all_nine_manifests_are_there():
    assert len(MANIFESTS) == 9


def test_rounding_to_half():
    state = golden("vit_fp32_checkpoint")
    rounded = round_to_half(state)
    changed = {name for name in state if not torch.equal(rounded[name], state[name])}
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    assert "visual.proj" in changed and "transformer.resblocks.0.attn.in_proj_weight" in changed
    kept = ("ln_", "embedding", "logit_scale")
    assert not any(word in name for name in changed for word in kept)
    exact, half = load_model(state), load_model(state, round_to_half=True)
    assert torch.equal(half.visual_projection.weight, state["visual.proj"].half().float().T)
    assert torch.equal(exact.visual_projection.weight, state["visual.proj"].T)
    assert not torch.equal(exact.visual_projection.weight, half.visual_projection.weight)


def test_models_of_both_classes_and_precisions():
    state = golden("vit")
    base = load_model(state)
    assert isinstance(base, VlpClipModel) and not base.training and base.dtype == torch.float32
    head = load_model(state, model_class=VlpClipForPreTraining)
    assert same(dict(head.clip.state_dict()), dict(base.state_dict()))
    assert load_model(state, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(state, pooling="largest_id").config.text_config.pooling == "largest_id"
    assert base.config.text_config.pooling == "eos"


@pytest.mark.parametrize("case", CASES)
def test_folder_and_back_to_the_file(case, tmp_path, capsys):
    source = GOLDEN / "clip" / case
    arguments = ["--checkpoint", str(source / "checkpoint.pt"), "--output", str(tmp_path / "ours"), "--check"]
    told = ["--hidden-act", "quick_gelu"] if case == "vit_fp32_checkpoint" else []
    from_clip.main([*arguments, *told])
    printed = capsys.readouterr().out
    total = sum(
        t.numel() for n, t in golden(case).items() if n not in SIZES and "running_" not in n and "tracked" not in n
    )
    assert f"{total:,}" in printed and "largest difference 0" in printed
    half = ["--half"] if case != "vit_fp32_checkpoint" else []
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pt"), *half])
    back, state = read_checkpoint(tmp_path / "back.pt"), golden(case)
    assert same({name: tensor for name, tensor in back.items() if name in state}, state)
    assert back.keys() - state.keys() <= SIZES
    assert int(back["context_length"]) == len(state["positional_embedding"])


def test_check_compares_a_forward_with_stored_outputs(tmp_path, capsys):
    source = GOLDEN / "clip" / "vit"
    arguments = ["--checkpoint", str(source / "checkpoint.pt"), "--output", str(tmp_path / "ours")]
    from_clip.main([*arguments, "--pooling", "largest_id", "--check", str(source)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forward")]
    assert len(lines) == 3 and all(float(line.split()[-1]) < 2e-5 for line in lines)
    from_clip.main(
        [*arguments, "--pooling", "largest_id", "--check", str(source), "--hidden-act", "gelu", "--overwrite"]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forward")]
    assert all(float(line.split()[-1]) > 1e-3 for line in lines)


# ------------------------------------------------------------------------------------------------ open_clip

OPEN_CLIP = {
    "vit": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32},
    "resnet": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 4, "head_width": 32},
}
OPEN_CLIP_TEXT = {"context_length": 12, "vocab_size": 60, "width": 64, "heads": 2, "layers": 2}


def open_clip_model(tower: str, custom: bool, quick_gelu: bool) -> nn.Module:
    torch.manual_seed(0)
    model_class = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    model = model_class(24, dict(OPEN_CLIP[tower]), dict(OPEN_CLIP_TEXT), quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero and one, so that every tensor matters
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def feature_difference(model: VlpClipModel, theirs: nn.Module, size: int) -> float:
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    text = torch.tensor([[58, 5, 9, 59] + [0] * 8, [58, 30, 2, 7, 11, 59] + [0] * 6])
    images = (model.encode_image(image) - theirs.encode_image(image)).abs().max()
    texts = (model.encode_text(text) - theirs.encode_text(text)).abs().max()
    return max(images.item(), texts.item())


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_open_clip_models_compute_the_same(tower, custom, quick_gelu, tmp_path):
    theirs = open_clip_model(tower, custom, quick_gelu)
    vision = OPEN_CLIP[tower]
    width = vision["width"] * (32 if tower == "resnet" else 1)
    options = {"vision_heads": width // 32, "text_heads": 2, "hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    ours = load_model(theirs.state_dict(), **options)
    assert feature_difference(ours, theirs, vision["image_size"]) < 2e-5
    other = load_model(theirs.state_dict(), **{**options, "hidden_act": "gelu" if quick_gelu else "quick_gelu"})
    assert feature_difference(other, theirs, vision["image_size"]) > 1e-4

    # the same from the folder that open_clip publishes, which tells heads and activation itself
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": OPEN_CLIP_TEXT, "quick_gelu": quick_gelu}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    assert feature_difference(load_model(tmp_path), theirs, vision["image_size"]) < 2e-5


def test_the_command_line_does_not_guess_the_activation(tmp_path, capsys):
    torch.save(open_clip_model("vit", False, False).state_dict(), tmp_path / "theirs.pt")
    arguments = ["--checkpoint", str(tmp_path / "theirs.pt"), "--output", str(tmp_path / "ours")]
    with pytest.raises(SystemExit):
        from_clip.main(arguments)
    assert "does not tell its activation: give --hidden-act gelu" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    from_clip.main([*arguments, "--hidden-act", "gelu"])
    assert AutoModel.from_pretrained(tmp_path / "ours").config.text_config.hidden_act == "gelu"
    # OpenAI's files are known by their sizes or by their precisions, and the functions go on guessing
    bare = {name: tensor for name, tensor in golden("vit").items() if name not in SIZES}
    torch.save(bare, tmp_path / "bare.pt")
    assert from_clip.read(tmp_path / "bare.pt", guess_activation=False)[0].text_config.hidden_act == "quick_gelu"
    sized = {**golden("vit_fp32_checkpoint"), "input_resolution": golden("vit")["input_resolution"]}
    assert from_openai(sized) and not from_openai(golden("vit_fp32_checkpoint"))
    assert load_model(tmp_path / "theirs.pt").config.text_config.hidden_act == "quick_gelu"


def test_open_clip_settings_that_leave_no_trace_are_refused(tmp_path):
    torch.save(open_clip_model("vit", False, True).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    text = {**OPEN_CLIP_TEXT, "no_causal_mask": True}
    settings = {"embed_dim": 24, "vision_cfg": {**OPEN_CLIP["vit"], "pool_type": "tok"}, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(ConversionError, match=r"sets text_cfg\.no_causal_mask, which"):
        load_model(tmp_path)


def test_back_to_open_clip(tmp_path, capsys):
    theirs = open_clip_model("vit", False, False)
    ours = load_model(theirs.state_dict(), vision_heads=2, text_heads=2, hidden_act="gelu")
    ours.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pt"), "--layout", "open_clip"])
    assert "vision_config.num_attention_heads 2, it takes 1" in capsys.readouterr().out
    assert same(read_checkpoint(tmp_path / "back.pt"), dict(theirs.state_dict()))
    open_clip_model("vit", False, False).load_state_dict(read_checkpoint(tmp_path / "back.pt"))
    with pytest.raises(SystemExit):
        to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "no.pt")])
    assert "hidden_act gelu, it takes quick_gelu" in capsys.readouterr().err
    assert not (tmp_path / "no.pt").exists()


def test_sigmoid_models_keep_their_bias(tmp_path):
    assert infer_config(golden("vit")).contrastive_loss == "softmax"
    state = {**golden("vit"), "logit_bias": torch.tensor(-9.5)}
    model = load_model(state, model_class=VlpClipForPreTraining)
    assert model.logit_bias.weight.item() == -9.5
    model.save_pretrained(tmp_path / "ours")
    back = to_original.to_state_dict(*to_original.read_folder(tmp_path / "ours"), layout="open_clip")
    assert back["logit_bias"].item() == -9.5
    with pytest.raises(ConversionError, match="logit_bias, which it does not know"):
        to_original.to_state_dict(*to_original.read_folder(tmp_path / "ours"))


# ------------------------------------------------------------------------------------------------ transformers


def transformers_model(eos_token_id: int) -> CLIPModel:
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**text, "hidden_size": 48, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    text |= {"vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": eos_token_id, "bos_token_id": 58}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


@torch.no_grad()
def logit_difference(left: nn.Module, right: nn.Module, text: torch.Tensor) -> float:
    image = torch.randn(len(text), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pair = [model(input_ids=text, pixel_values=image).logits_per_image for model in (left, right)]
    return (pair[0] - pair[1]).abs().max().item()


TEXT = torch.tensor([[58, 5, 9, 59, 0, 0], [58, 30, 2, 7, 11, 59]])
WITHOUT_END = torch.tensor([[58, 5, 9, 3, 0, 0], [58, 30, 2, 7, 11, 59]])


@pytest.mark.parametrize("eos_token_id", [2, 59])
def test_transformers_folders_both_ways(eos_token_id, tmp_path):
    theirs = transformers_model(eos_token_id)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.text_config.eos_token_id == 59
    assert ours.config.text_config.pooling == ("largest_id" if eos_token_id == 2 else "eos")
    assert logit_difference(ours, theirs, TEXT) < 2e-5
    if eos_token_id == 2:
        assert logit_difference(ours, theirs, WITHOUT_END) < 2e-5
    else:
        with pytest.raises(ValueError, match="59"):
            logit_difference(ours, theirs, WITHOUT_END)

    ours.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--layout", "transformers"])
    back = CLIPModel.from_pretrained(tmp_path / "back").eval()
    assert same(dict(back.state_dict()), dict(theirs.state_dict()))
    assert back.config.text_config.eos_token_id == eos_token_id
    assert logit_difference(back, ours, TEXT) < 2e-5
    assert logit_difference(back, transformers_model(eos_token_id), TEXT) == 0
    back.text_model.final_layer_norm.weight.data.mul_(-1)
    assert logit_difference(back, ours, TEXT) > 1e-3


def test_original_to_transformers_computes_the_same(tmp_path):
    """The golden with several heads, as in the specification's section 1.9."""
    ours = load_model(golden("vit_multihead"), pooling="largest_id")
    config, state = to_original.to_transformers(ours.config, dict(ours.state_dict()))
    assert config.text_config.eos_token_id == 2
    theirs = CLIPModel(config).eval()
    theirs.load_state_dict(state)
    stored = safetensors.torch.load_file(GOLDEN / "clip" / "vit_multihead" / "outputs.safetensors")
    inputs = safetensors.torch.load_file(GOLDEN / "clip" / "vit_multihead" / "inputs.safetensors")
    with torch.no_grad():
        found = theirs(input_ids=inputs["text"], pixel_values=inputs["image"]).logits_per_image
    assert (found - stored["logits_per_image"]).abs().max() < 2e-5


def test_old_transformers_files_with_position_ids(tmp_path):
    theirs = transformers_model(2)
    state = dict(theirs.state_dict()) | {
        f"{tower}.embeddings.position_ids": torch.arange(12)[None] for tower in ("text_model", "vision_model")
    }
    theirs.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert logit_difference(load_model(tmp_path), theirs, TEXT) < 2e-5
    with pytest.raises(ConversionError, match=r"config\.json"):
        load_model(tmp_path / "pytorch_model.bin")


def test_resnets_do_not_go_to_transformers(tmp_path, capsys):
    load_model(golden("resnet")).save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit):
        to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "no"), "--layout", "transformers"])
    assert "no ResNet tower" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------ what does not fit


def test_other_architectures_are_named():
    others = {
        "BERT": ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"],
        "ViLT": ["text_embeddings.position_ids", "transformer.blocks.0.attn.qkv.weight"],
        "ALBEF": ["visual_encoder.blocks.0.attn.qkv.weight", "temp"],
        "ViLBERT": ["bert.encoder.c_layer.0.biattention.query1.weight"],
        "VSE-infinity": ["img_enc.fc.weight"],
        "already converted": list(load_model(golden("vit")).state_dict()),
        "no layout known": ["some.weight"],
    }
    for family, names in others.items():
        with pytest.raises(
            ConversionError, match=rf"(?s)looks like .*{family}.*- found .*{names[0]}.*\+ expected.*visual\.conv1"
        ):
            convert_state_dict({name: torch.ones(2) for name in names})


@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_left_over_and_missing_entries_are_listed(case):
    state = golden(case)
    removed = "transformer.resblocks.0.mlp.c_proj.bias"
    del state[removed]
    state["visual.transformer_extra"] = torch.ones(3)
    with pytest.raises(ConversionError) as error:
        convert_state_dict(state)
    assert "visual.transformer_extra (3,)" in str(error.value)
    assert "text_model.encoder.layers.0.mlp.fc2.bias (64,)" in str(error.value)


def test_sizes_that_make_no_sense():
    state = golden("vit")
    with pytest.raises(ConversionError, match="text_projection is missing"):
        convert_state_dict({name: tensor for name, tensor in state.items() if name != "text_projection"})
    with pytest.raises(ConversionError, match="has 16 rows, not one more than a square"):
        convert_state_dict({**state, "visual.positional_embedding": torch.ones(16, 64)})
    with pytest.raises(ConversionError, match=r"norm1\.weight: \(63,\), expected \(64,\)"):
        convert_state_dict({**state, "visual.transformer.resblocks.1.ln_1.weight": torch.ones(63)})


@pytest.mark.parametrize("name", sorted(SIZES))
def test_stated_sizes_must_be_those_of_the_weights(name):
    state = golden("vit")
    assert convert_state_dict({**state, name: state[name].clone()})[0] == convert_state_dict(state)[0]
    with pytest.raises(ConversionError, match=f"{name} says 7, the shapes"):
        convert_state_dict({**state, name: torch.tensor(7)})


@pytest.mark.parametrize("name", ["visual.proj", "transformer.resblocks.0.attn.in_proj_weight", "logit_scale"])
def test_weights_that_are_no_numbers(name):
    state = golden("vit")
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ConversionError, match=f"{name} is {dtype}"):
            convert_state_dict({**state, name: state[name].to(dtype)})
    for value in (float("nan"), float("inf")):
        broken = state[name].clone().reshape(-1)
        broken[-1] = value
        with pytest.raises(ConversionError, match=f"{name} holds infinities or NaN"):
            convert_state_dict({**state, name: broken.reshape(state[name].shape)})
    meta = {key: tensor.to("meta") for key, tensor in state.items()}
    convert_state_dict(meta)
    with pytest.raises(ConversionError, match="int8"):
        convert_state_dict({**meta, name: meta[name].to(torch.int8)})


def test_foreign_towers_have_no_original_layout():
    config = VlpClipConfig(text_config={"model_type": "bert"})
    with pytest.raises(ConversionError, match="text tower is a bert"):
        clip_table(config)


def test_nothing_half_written_stays_behind(tmp_path, capsys):
    good = ["--checkpoint", str(GOLDEN / "clip" / "vit" / "checkpoint.pt"), "--output", str(tmp_path / "ours")]
    (tmp_path / "cut.pt").write_bytes((GOLDEN / "clip" / "vit" / "checkpoint.pt").read_bytes()[:5000])
    with pytest.raises(SystemExit):
        from_clip.main(["--checkpoint", str(tmp_path / "cut.pt"), "--output", str(tmp_path / "ours")])
    assert "cut short" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cut.pt"]
    from_clip.main(good)
    before = sorted(path.name for path in (tmp_path / "ours").iterdir())
    with pytest.raises(SystemExit):
        from_clip.main(good)
    assert "not an empty folder" in capsys.readouterr().err
    from_clip.main([*good, "--overwrite"])
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == before
    with pytest.raises(RuntimeError, match="in between"), whole_folder(tmp_path / "other"):
        raise RuntimeError("in between")
    with pytest.raises(FileExistsError):
        save_state_dict({}, tmp_path / "cut.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.pt", "ours"]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), VlpClipModel)


# ------------------------------------------------------------------------------------------------ processors

MERGES = GOLDEN / "clip" / "tokenizer_small" / "merges.txt.gz"


def with_vocabulary(size: int) -> dict[str, torch.Tensor]:
    """The golden ViT with another vocabulary."""
    table = torch.randn(size, 64, generator=torch.Generator().manual_seed(0))
    return {name: tensor for name, tensor in golden("vit").items() if name != "vocab_size"} | {
        "token_embedding.weight": table
    }


def test_the_vocabulary_travels_with_the_model(tmp_path, capsys):
    case = json.loads((GOLDEN / "clip" / "tokenizer_small" / "cases.json").read_text("utf-8"))[0]
    size = len(json.loads((GOLDEN / "clip" / "tokenizer_small" / "vocab.json").read_text("utf-8")))
    torch.save(with_vocabulary(size), tmp_path / "checkpoint.pt")
    from_clip.main(
        [
            "--checkpoint",
            str(tmp_path / "checkpoint.pt"),
            "--vocabulary",
            str(MERGES),
            "--output",
            str(tmp_path / "ours"),
        ]
    )
    processor, model = AutoProcessor.from_pretrained(tmp_path / "ours"), AutoModel.from_pretrained(tmp_path / "ours")
    batch = processor(
        text=[case["text"], "two dogs"], images=[Image.new("RGB", (80, 50))] * 2, padding=True, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["input_ids"][0].tolist() == [size - 2, *case["ids"], size - 1]
    assert model.config.text_config.eos_token_id == size - 1
    assert model(**batch).logits_per_image.shape == (2, 2)
    assert "without a processor" not in capsys.readouterr().out

    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "theirs"), "--layout", "transformers"])
    theirs = AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert (
        theirs(text=["a cat"])["input_ids"][0]
        == processor(text=["a cat"], return_tensors="pt")["input_ids"][0].tolist()
    )
    from_clip.main(["--checkpoint", str(tmp_path / "theirs"), "--output", str(tmp_path / "again")])
    again = AutoProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(again(text=[case["text"]], return_tensors="pt")["input_ids"], batch["input_ids"][:1])


def test_the_vocabulary_of_another_model_is_refused(tmp_path, capsys):
    torch.save(with_vocabulary(300), tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        from_clip.main(
            [
                "--checkpoint",
                str(tmp_path / "checkpoint.pt"),
                "--vocabulary",
                str(MERGES),
                "--output",
                str(tmp_path / "ours"),
            ]
        )
    assert "another model's vocabulary" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def write_preparation(folder: Path, name: str, content: dict) -> Path:
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))
    return folder


def test_pictures_are_prepared_as_open_clips_folder_says(tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    said = {"mean": mean, "std": std, "size": [48, 48], "interpolation": "bicubic", "resize_mode": "shortest"}
    folder = write_preparation(tmp_path / "all", "open_clip_config.json", {"preprocess_cfg": said})
    square = {"height": 48, "width": 48}
    expected = {"image_mean": mean, "image_std": std, "size": {"shortest_edge": 48}, "crop_size": square}
    assert image_options(folder, 32) == expected
    folder = write_preparation(tmp_path / "none", "open_clip_config.json", {"model_cfg": {}})
    assert image_options(folder, 48) == {"size": {"shortest_edge": 48}, "crop_size": square}
    for place, (key, value) in enumerate(
        [("interpolation", "bilinear"), ("resize_mode", "squash"), ("mode", "L"), ("size", [48, 40])]
    ):
        folder = write_preparation(
            tmp_path / str(place), "open_clip_config.json", {"preprocess_cfg": {**said, key: value}}
        )
        with pytest.raises(ConversionError, match=rf"preprocess_cfg\.{key}"):
            image_options(folder, 32)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pictures_are_prepared_as_a_transformers_folder_says(name, tmp_path):
    said = {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}, "resample": 2}
    said |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_center_crop": False}
    stored = {**said, "image_processor_type": "CLIPImageProcessor"}
    content = {"image_processor": stored} if name.startswith("processor") else stored
    assert image_options(write_preparation(tmp_path / "all", name, content), 32) == said
    old = write_preparation(tmp_path / "old", name, {"size": 40, "image_mean": None})
    assert image_options(old, 32) == {"size": 40}
    none = write_preparation(tmp_path / "none", name, {})
    assert image_options(none, 32)["crop_size"] == {"height": 32, "width": 32}


def test_the_preparation_travels_both_ways(tmp_path):
    size = len(json.loads((GOLDEN / "clip" / "tokenizer_small" / "vocab.json").read_text("utf-8")))
    torch.save(with_vocabulary(size), tmp_path / "checkpoint.pt")
    ours = str(tmp_path / "ours")
    from_clip.main(["--checkpoint", str(tmp_path / "checkpoint.pt"), "--vocabulary", str(MERGES), "--output", ours])
    processor = AutoProcessor.from_pretrained(ours)
    processor.image_processor.image_mean, processor.image_processor.resample = (0.5, 0.4, 0.3), 2
    processor.save_pretrained(ours)
    to_original.main([ours, "--output", str(tmp_path / "theirs"), "--layout", "transformers"])
    from_clip.main(["--checkpoint", str(tmp_path / "theirs"), "--output", str(tmp_path / "again")])
    again = AutoProcessor.from_pretrained(tmp_path / "again").image_processor
    assert list(again.image_mean) == [0.5, 0.4, 0.3] and again.resample == 2
    assert again.size.shortest_edge == 64 and again.crop_size.height == 64

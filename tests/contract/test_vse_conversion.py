"""Conversion of VSE-infinity: both branches, regions and grids, the CNNs they start from, both ways; and files that do not fit."""

import argparse
import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, BertConfig

from conversion import from_clip, from_vse, to_original
from conversion.checkpoints import CheckpointError, UnsafeCheckpointError, read_content
from conversion.from_vse import Original, convert_state_dict, expected_state, load_model, load_pooling, read_original
from conversion.tables import ConversionError, convert, find_row
from conversion.torchscript import HarmlessUnpickler
from conversion.vse_layouts import (
    COPIES,
    GRAPHS_OF_SOURCES,
    infer_grid_config,
    to_checkpoint,
    usual_heads,
    usual_source,
    vse_table,
    without_copies,
)
from hf_vlp.inputs.word_tokenizer import VlpWordTokenizer
from hf_vlp.models.vse.configuration_vse import VlpVseConfig, VlpVseGridConfig, VlpVseGruConfig
from hf_vlp.models.vse.modeling_vse import VlpVseForPreTraining, VlpVseGridModel, VlpVseModel
from tests.contract.weight_files import CallsSystem, read_manifest, same

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = (
    "region_bert",
    "region_bert_nonorm",
    "region_bigru",
    "grid_detector_bert",
    "grid_wsl_bert",
    "grid_detector_bigru",
)
BRIEF = ("region_bert", "region_bigru", "grid_wsl_bert")
PAIRS = sorted(path for path in (GOLDEN / "manifests").glob("vse_*.json.gz") if "backbone" not in path.name)
UPDOWN = GOLDEN / "manifests" / "vse_original_updown_backbone.json.gz"
WORDS = 11354  # rows of the BiGRU's table where a manifest has -1; set by the vocabulary file
UNUSED_NORM, POOLER, CLASSIFIER = 2 * 1024, 768 * 768 + 768, 2_049_000


def path_of(case: str) -> Path:
    return GOLDEN / "vse" / case / "checkpoint.pth"


def told_of(case: str) -> dict:
    return json.loads((GOLDEN / "vse" / case / "config.json").read_text("utf-8"))


def converted(case: str) -> tuple[VlpVseConfig, dict[str, torch.Tensor]]:
    original = read_original(path_of(case))
    return convert_state_dict(original.state, original.options, told_of(case))


def flat(content: dict) -> dict[str, torch.Tensor]:
    """A checkpoint's two state dicts as one, every name as it stands there."""
    return {f"{side}.{name}": tensor for side, part in enumerate(content["model"]) for name, tensor in part.items()}


def unused(name: str) -> bool:
    return any(part in name for part in (".bert.pooler.", ".resnet.fc.", "position_ids"))


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case):
    content = read_content(path_of(case))
    config, ours = converted(case)
    back = to_checkpoint(config, ours, content["opt"].backbone_source)
    assert back.keys() == content.keys()
    theirs = {name: tensor for name, tensor in flat(content).items() if not unused(name)}
    never_called = {name: tensor for name, tensor in flat(back).items() if "mlp.bns.1." in name}
    assert same({**flat(back), **{name: theirs[name] for name in never_called}}, theirs)
    assert bool(never_called) == case.startswith("region")
    for name, tensor in never_called.items():
        assert (tensor == (1 if name.endswith(("weight", "_var")) else 0)).all()
    carried = ("margin", "max_violation", "embed_size", "img_dim", "no_imgnorm", "no_txtnorm", "precomp_enc_type")
    carried += ("backbone_source", "input_scale_factor", "vocab_size")
    carried += ("word_dim", "num_layers") if "bigru" in case else ()
    assert all(vars(back["opt"])[name] == vars(content["opt"])[name] for name in carried)
    assert vars(back["opt"]).keys() == vars(content["opt"]).keys()
    changed = {**ours, "visual_projection.bias": ours["visual_projection.bias"] + 1}
    assert not same(flat(to_checkpoint(config, changed)), flat(back))


@pytest.mark.parametrize("case", CASES)
def test_command_lines_there_and_back(case, tmp_path, capsys):
    source, ours, back = GOLDEN / "vse" / case, tmp_path / "ours", tmp_path / "back.pth"
    arguments = ["--checkpoint", str(path_of(case)), "--config", str(source / "config.json"), "--output", str(ours)]
    from_vse.main([*arguments, "--check", str(source)])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("forward")]
    assert len(lines) == 3 and all(float(line.split()[-1]) < 2e-5 for line in lines)
    assert "largest difference 0" in printed and "without a processor" in printed
    model = AutoModel.from_pretrained(ours)
    assert isinstance(model, VlpVseModel) and f"{model.num_parameters():,}" in printed

    to_original.main([str(ours), "--output", str(back)])
    told = "num_attention_heads" in capsys.readouterr().out
    assert told == ("bert" in case)  # the released code knows the heads of bert-base alone
    again = read_original(back)
    assert same(convert_state_dict(again.state, again.options, told_of(case))[1], converted(case)[1])
    with pytest.raises(SystemExit):
        to_original.main([str(ours), "--output", str(back)])
    assert "exists" in capsys.readouterr().err
    to_original.main([str(ours), "--output", str(back), "--overwrite"])


def test_a_training_class_goes_back_too(tmp_path):
    model = load_model(path_of("region_bigru"), model_class=VlpVseForPreTraining)
    model.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pth")])
    assert same(dict(load_model(tmp_path / "back.pth").state_dict()), dict(model.vse.state_dict()))


@pytest.mark.parametrize("case", BRIEF)
def test_the_prefix_is_where_the_branch_has_it(case):
    names = list(flat(to_checkpoint(*converted(case))))
    assert all((".module." in name) == (case != "region_bigru") for name in names)
    content = read_content(path_of(case))
    content["model"] = [
        {f"module.{name.removeprefix('module.')}": tensor for name, tensor in part.items()} for part in content["model"]
    ]
    bare = copy.copy(content)
    bare["model"] = [{name.removeprefix("module."): value for name, value in part.items()} for part in content["model"]]
    for kind in (content, bare):
        assert same(convert_state_dict(original_of(kind), vars(kind["opt"]), told_of(case))[1], converted(case)[1])


def original_of(content: dict) -> dict[str, torch.Tensor]:
    return {
        f"{side}.{name.removeprefix('module.')}": tensor
        for side, part in zip(("img_enc", "txt_enc"), content["model"])
        for name, tensor in part.items()
    }


# ------------------------------------------------------------------------------------------------ published files


def test_all_eleven_manifests_are_there():
    assert len(PAIRS) == 10 and UPDOWN.exists()


@pytest.mark.parametrize("manifest", PAIRS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_published_checkpoints_convert_with_nothing_left_over(manifest):
    facts, tensors = read_manifest(manifest, unknown=WORDS)
    sides = {"model[0]/": "img_enc.", "model[1]/": "txt_enc."}
    state = {}
    for name, tensor in tensors.items():
        side, _, rest = name.partition("/")
        state[sides[f"{side}/"] + rest.removeprefix("module.")] = tensor
    assert len(state) == len(tensors)
    grid, words = "grid" in manifest.name, "bigru" in manifest.name
    source = "wsl" if "wsl" in manifest.name else "detector"
    config, ours = convert_state_dict(state, {"backbone_source": source, "input_scale_factor": 2.0})
    with torch.device("meta"):
        model = VlpVseModel(config)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    text = sum(size for name, size in sizes.items() if name.startswith("text_"))
    image = sum(sizes.values()) - text
    assert image + (CLASSIFIER if grid else UNUSED_NORM) == facts["parameters"]["image_encoder_unique"]
    if words:
        assert text == facts["text_parameters_without_word_embedding"] + 300 * WORDS
        assert config.text_config.vocab_size == WORDS and config.text_config.num_hidden_layers == 1
    else:
        assert text + POOLER == facts["parameters"]["text_encoder"]
        assert text + image + POOLER + (CLASSIFIER if grid else UNUSED_NORM) == facts["parameters"]["total_unique"]
        assert config.text_config.num_attention_heads == 12
    if grid:
        vision = config.vision_config
        assert (vision.graph, vision.groups, vision.image_size) == (
            ("torchvision", 32, 512) if source == "wsl" else ("caffe", 1, 512)
        )
        assert vision.depths == [3, 4, 23, 3]
    back = to_checkpoint(config, ours, source)
    module = {f"{side.rstrip('/')}/{name}" for side, part in zip(sides, back["model"]) for name in part}
    assert module == {name for name in tensors if not unused(name)}


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("vse_coco_butd_region_bert", 3_688_352, 110_282_400),
        ("vse_coco_butd_grid_bert", 46_660_040, 110_282_400),
        ("vse_f30k_wsl_grid_bert", 90_902_216, 110_282_400),
        ("vse_f30k_butd_region_bigru", 3_688_352, None),
    ],
)
def test_the_manifests_agree_with_the_table_of_sizes(name, image, text):
    facts, _ = read_manifest(GOLDEN / "manifests" / f"{name}.json.gz", unknown=WORDS)
    assert facts["parameters"]["image_encoder_unique"] == image
    assert facts["parameters"]["text_encoder"] == text
    assert facts.get("text_parameters_without_word_embedding") == (8_159_648 if text is None else None)


def test_the_detectors_cnn_converts_and_goes_back():
    _, tensors = read_manifest(UPDOWN)
    state = {name.replace("/", "."): tensor for name, tensor in tensors.items()}
    config, ours = convert_state_dict(state, {"backbone_source": "detector"})
    assert isinstance(config, VlpVseGridConfig) and config.graph == "caffe" and config.depths == [3, 4, 23, 3]
    assert ours.keys() == expected_state(config).keys() and len(ours) == len(state)
    assert sum(tensor.numel() for name, tensor in ours.items() if "running_" not in name and "num_" not in name) == (
        46_660_040
        - CLASSIFIER
        - 12_704
        - 2048 * 1024
        - 1024  # the image encoder less classifier, pooling and projection
    )
    halves = to_original.to_backbone(config, ours)
    assert {f"{half}.{name}" for half, part in halves.items() for name in part} == state.keys()


# ------------------------------------------------------------------------------------------------ file formats


def write_zip(content, path):
    torch.save(content, path)


def write_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_protocol_4(content, path):
    torch.save(content, path, pickle_protocol=4)


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_protocol_4])
@pytest.mark.parametrize("plain", [False, True], ids=["namespace", "dict"])
def test_every_format_and_kind_of_options(write, plain, tmp_path):
    content = read_content(path_of("region_bigru"))
    options = vars(content["opt"])
    content["opt"] = dict(options) if plain else argparse.Namespace(**options)
    write(content, tmp_path / "checkpoint")
    found = read_original(tmp_path / "checkpoint")
    assert found.options == options and found.options["embed_size"] == 32
    assert same(found.state, read_original(path_of("region_bigru")).state)


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_protocol_4])
def test_code_in_the_options_is_refused_and_not_run(write, tmp_path):
    trace = tmp_path / "trace"
    content = read_content(path_of("region_bigru"))
    write({**content, "opt": argparse.Namespace(margin=0.2, data_name=CallsSystem(trace))}, tmp_path / "checkpoint")
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system.*nothing was run"):
        read_original(tmp_path / "checkpoint")
    assert not trace.exists()
    write({**content, "opt": argparse.Namespace(margin=0.2, data_name="coco")}, tmp_path / "harmless")
    assert read_original(tmp_path / "harmless").options == {"margin": 0.2, "data_name": "coco"}


def test_a_pickle_cannot_alter_the_class_of_the_options():
    # BUILD with a pair sets attributes of whatever lies beneath it, here of the class itself
    program = b"\x80\x02cargparse\nNamespace\nN}X\x06\x00\x00\x00marginX\x03\x00\x00\x00bigs\x86b."
    altered = HarmlessUnpickler(io.BytesIO(program)).load()
    assert altered.margin == "big", "the program must do what it is meant to"
    assert not hasattr(argparse.Namespace, "margin")
    assert pickle.loads(b"\x80\x02cargparse\nNamespace\n.") is argparse.Namespace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"].append({}), "`model` is a list of 3"),
        (lambda content: content.update(opt=7), "`opt` is a int"),
        (lambda content: content.update(model=[{}, {}]), "no plain state dict"),
        (lambda content: content["model"][0].update(note="words"), "note: str"),
    ],
)
def test_wrappers_that_do_not_fit(change, message, tmp_path):
    content = read_content(path_of("region_bigru"))
    change(content)
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=message):
        read_original(tmp_path / "checkpoint.pth")


# ------------------------------------------------------------------------------------------------ what the file tells


def test_settings_come_from_the_options():
    original = read_original(path_of("grid_wsl_bert"))
    told = told_of("grid_wsl_bert")
    without = {"bert": told["bert"]}
    config, _ = convert_state_dict(original.state, original.options, without)
    assert (config.margin, config.normalize_image, config.hardest_negatives) == (0.2, True, 1.0)
    assert (config.vision_config.graph, config.vision_config.image_size, config.vision_config.groups) == (
        "torchvision",
        512,
        4,
    )
    assert config.vision_config.depths == [1, 1, 2, 1] and config.region_norm_rows == "all"
    others = {"margin": 0.5, "no_imgnorm": True, "no_txtnorm": True, "max_violation": False, "input_scale_factor": 1.3}
    others |= {"backbone_source": "vg_detector_v2"}
    config, _ = convert_state_dict(original.state, original.options | others, without)
    assert (config.margin, config.normalize_image, config.normalize_text, config.hardest_negatives) == (
        0.5,
        False,
        False,
        0.0,
    )
    assert (config.vision_config.graph, config.vision_config.image_size) == ("caffe", 332)
    config, _ = convert_state_dict(
        original.state, original.options | others, told
    )  # what is told goes before the source
    assert config.vision_config.graph == "torchvision"


def test_each_source_has_its_graph():
    graphs = {source: graph for source, graph in GRAPHS_OF_SOURCES.items() if graph == "torchvision"}
    assert set(graphs) == {"wsl", "imagenet_resnext"}
    state = {name.removeprefix("img_enc.backbone.resnet."): value for name, value in grid_state().items()}
    for source, graph in GRAPHS_OF_SOURCES.items():
        assert infer_grid_config(state, {"backbone_source": source}).graph == graph
    with pytest.raises(ConversionError, match="'vgg' is unknown: the original has detector"):
        infer_grid_config(state, {"backbone_source": "vgg"})
    with pytest.raises(ConversionError, match="give --backbone-source, one of detector, wsl"):
        infer_grid_config(state)


def grid_state() -> dict[str, torch.Tensor]:
    state = without_copies(read_original(path_of("grid_detector_bert")).state)
    return {name: value for name, value in state.items() if name.startswith("img_enc.backbone.resnet.")}


def test_sources_of_our_cnns():
    shallow = VlpVseGridConfig(depths=[3, 4, 6, 3])
    assert usual_source(shallow) == "detector" and usual_source(shallow, "bgr") == "detector"
    assert usual_source(shallow, "rgb") == "imagenet_res50" and usual_source(VlpVseGridConfig(), "rgb") == "imagenet"
    assert usual_source(VlpVseGridConfig(graph="torchvision"), "rgb") == "wsl"
    config, ours = converted("grid_wsl_bert")
    with pytest.raises(ConversionError, match="builds another graph for backbone_source 'detector' than 'torchvision'"):
        to_checkpoint(config, ours, "detector")


def test_heads_cannot_be_seen():
    assert [usual_heads(width) for width in (768, 1024, 128, 48)] == [12, 16, 2, 1]
    original = read_original(path_of("region_bert"))
    config, _ = convert_state_dict(original.state, original.options)
    assert config.text_config.num_attention_heads == 1
    config, _ = convert_state_dict(original.state, original.options, {"bert": {"num_attention_heads": 3}})
    assert config.text_config.num_attention_heads == 3
    with pytest.raises(ConversionError, match="num_attention_heads 5 does not divide the width 48"):
        convert_state_dict(original.state, original.options, {"bert": {"num_attention_heads": 5}})


def test_a_file_of_settings(tmp_path):
    path = tmp_path / "config.json"
    BertConfig(hidden_size=48, num_attention_heads=4).save_pretrained(tmp_path)
    assert from_vse.read_told(path)["bert"]["num_attention_heads"] == 4
    path.write_text('{"backbone": {"graph": "caffe"}}')
    assert from_vse.read_told(path) == {"backbone": {"graph": "caffe"}} and from_vse.read_told(None) == {}
    for text, message in (("{}", "tells nothing"), ("[", "cannot be read as JSON")):
        path.write_text(text)
        with pytest.raises(ConversionError, match=message):
            from_vse.read_told(path)


@pytest.mark.parametrize(
    ("case", "options", "told", "message"),
    [
        ("region_bert", {"embed_size": 64}, {}, r"opt\.embed_size says 64, the shapes of the weights 32"),
        ("grid_wsl_bert", {"img_dim": 2048}, {}, r"opt\.img_dim says 2048"),
        ("region_bigru", {"vocab_size": 11354}, {}, r"opt\.vocab_size says 11354"),
        ("region_bigru", {"num_layers": 2}, {}, r"opt\.num_layers says 2"),
        ("region_bert", {"margin": "wide"}, {}, r"opt\.margin is 'wide', which is no number"),
        ("grid_wsl_bert", {"backbone_source": 3}, {}, r"opt\.backbone_source is 3, which is no text"),
        ("region_bert", {}, {"bert": {"intermediate_size": 3072}}, r"bert\.intermediate_size says 3072"),
        ("grid_wsl_bert", {}, {"backbone": {"groups": 32}}, r"backbone\.groups says 32, the shapes of the weights 4"),
    ],
)
def test_options_that_do_not_fit_the_weights(case, options, told, message):
    original = read_original(path_of(case))
    with pytest.raises(ConversionError, match=message):
        convert_state_dict(original.state, original.options | options, told)
    convert_state_dict(original.state, original.options)


# ------------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(("place", "name"), [("base.4", "layer1"), ("base.6", "layer3"), ("top.0", "layer4")])
def test_copies_must_agree(place, name):
    original = read_original(path_of("grid_wsl_bert"))
    first, second = (f"img_enc.backbone.{part}.0.conv2.weight" for part in (f"resnet.{name}", place))
    assert torch.equal(original.state[first], original.state[second])
    changed = {**original.state, second: original.state[second] + 1e-3}
    with pytest.raises(ConversionError, match=rf"{first} and {second} are the same tensor"):
        convert_state_dict(changed, original.options)
    with pytest.raises(ConversionError, match=f"{second} are the same"):
        convert_state_dict({**original.state, second: original.state[second].half()}, original.options)


def test_one_copy_is_enough():
    original, (_, ours) = read_original(path_of("grid_wsl_bert")), converted("grid_wsl_bert")
    second = {name: value for name, value in original.state.items() if ".backbone.resnet." not in name}
    first = {name: value for name, value in original.state.items() if find_row(name, COPIES) is None}
    assert len(second) < len(original.state) and len(first) < len(original.state)
    for state in (first, second):
        assert same(convert_state_dict(state, original.options, told_of("grid_wsl_bert"))[1], ours)


@pytest.mark.parametrize("case", BRIEF)
def test_left_over_and_missing_entries_are_listed(case):
    original = read_original(path_of(case))
    state = {name: value for name, value in original.state.items() if not name.endswith("gpool.gru.bias_hh_l0")}
    state["txt_enc.extra"] = torch.ones(3)
    with pytest.raises(ConversionError) as error:
        convert_state_dict(state, original.options)
    assert "txt_enc.extra (3,)" in str(error.value) and "visual_pooling.gru.bias_hh_l0 (96,)" in str(error.value)


def test_other_architectures_are_named(tmp_path, capsys):
    for name, family in (("bert.encoder.layer.0.attention.self.query.weight", "BERT"), ("visual.conv1.weight", "CLIP")):
        with pytest.raises(ConversionError, match=rf"(?s)looks like {family}.*- found .*{name}.*\+ expected"):
            convert_state_dict({name: torch.ones(2)})
    with pytest.raises(SystemExit):
        from_clip.main(["--checkpoint", str(path_of("region_bert")), "--output", str(tmp_path / "ours")])
    assert "holds no plain state dict" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["img_enc.fc.weight", "txt_enc.gpool.linear.weight"])
def test_weights_that_are_no_numbers(name):
    original = read_original(path_of("region_bigru"))
    for value in (original.state[name].to(torch.int8), torch.full_like(original.state[name], torch.nan)):
        with pytest.raises(ConversionError, match="is torch.int8|infinities or NaN"):
            convert_state_dict({**original.state, name: value}, original.options)


def test_old_files_with_position_ids():
    original, (_, ours) = read_original(path_of("region_bert")), converted("region_bert")
    state = {**original.state, "txt_enc.bert.embeddings.position_ids": torch.arange(48)[None]}
    assert same(convert_state_dict(state, original.options, told_of("region_bert"))[1], ours)


def test_foreign_towers_have_no_original_layout(tmp_path, capsys):
    text, vision = VlpVseGruConfig(hidden_size=1024), {"model_type": "resnet"}
    with pytest.raises(ConversionError, match="image tower is a resnet"):
        vse_table(VlpVseConfig(text_config=text, vision_config=vision))
    with pytest.raises(ConversionError, match="text tower is a distilbert"):
        vse_table(VlpVseConfig(text_config={"model_type": "distilbert"}))
    vse_table(VlpVseConfig(text_config=text))
    load_model(path_of("region_bigru")).save_pretrained(tmp_path / "ours")
    for more in (["--layout", "transformers"], ["--half"], ["--layout", "open_clip"]):
        with pytest.raises(SystemExit):
            to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "no.pth"), *more])
        assert "transformers has no class" in (said := capsys.readouterr().err) or "one layout" in said
    with pytest.raises(SystemExit):
        to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "no.safetensors")])
    assert not (tmp_path / "no.pth").exists()


def test_settings_that_the_released_code_would_not_see(tmp_path, capsys):
    bert = BertConfig(hidden_size=768, num_hidden_layers=1, intermediate_size=8, vocab_size=9, num_attention_heads=6)
    config = VlpVseConfig(text_config=bert, region_size=8, projection_dim=8)
    VlpVseModel(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(SystemExit):
        to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pth")])
    assert "num_attention_heads 6, it takes 12" in capsys.readouterr().err
    config.text_config.num_attention_heads = 12
    VlpVseModel(config).save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pth")])
    assert "tell" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ CNNs and pooling alone


def theirs(groups: int) -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.resnet.Bottleneck
    model = torchvision.models.resnet.ResNet(block, [1, 2, 1, 1], num_classes=5, groups=groups, width_per_group=16)
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0, 0.1)
        elif "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("counters", [True, False], ids=["counters", "before torch 0.4.1"])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_torchvisions_networks_compute_the_same(groups, counters, tmp_path, capsys):
    network = theirs(groups)
    state = {name: value for name, value in network.state_dict().items() if counters or "num_batches" not in name}
    torch.save(state, tmp_path / "cnn.pth")
    pixels = torch.randn(2, 3, 65, 96, generator=torch.Generator().manual_seed(1))
    features = nn.Sequential(*list(network.children())[:-2])(pixels)
    ours = load_model(tmp_path / "cnn.pth", backbone_source="wsl")
    assert isinstance(ours, VlpVseGridModel) and ours.config.groups == groups
    assert (ours(pixels).last_hidden_state - features).abs().max() < 2e-5 * features.abs().max()
    caffe = load_model(tmp_path / "cnn.pth", backbone_source="imagenet")(pixels).last_hidden_state
    assert caffe.shape != features.shape or (caffe - features).abs().max() > 1e-3  # the same weights in the other graph

    arguments = ["--checkpoint", str(tmp_path / "cnn.pth"), "--output", str(tmp_path / "ours")]
    with pytest.raises(SystemExit):
        from_vse.main(arguments)
    assert "give --backbone-source" in capsys.readouterr().err
    for folder, reason in (
        (tmp_path / "nowhere", "no inputs.safetensors"),
        (GOLDEN / "vse/grid_wsl_bert", "CNN alone"),
    ):
        with pytest.raises(SystemExit):
            from_vse.main([*arguments, "--backbone-source", "imagenet_resnext", "--check", str(folder)])
        assert reason in capsys.readouterr().err and not (tmp_path / "ours").exists()
    from_vse.main([*arguments, "--backbone-source", "imagenet_resnext", "--check"])
    assert f"{sum(value.numel() for value in ours.parameters()):,}" in capsys.readouterr().out
    assert AutoImageProcessor.from_pretrained(tmp_path / "ours").channel_order == "rgb"
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pth")])
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    result = theirs(groups).load_state_dict(back, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys


@pytest.mark.parametrize("zipped", [True, False])
def test_a_score_of_numpy_beside_the_weights_is_a_number(zipped, tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"best_rsum": np.float64(3.5)}, path, _use_new_zipfile_serialization=zipped)
    assert read_content(path) == {"best_rsum": 3.5} and type(read_content(path)["best_rsum"]) is float
    torch.save({"best_rsum": np.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="numpy"):
        read_content(path)


def test_the_detectors_file(tmp_path):
    config = VlpVseGridConfig(
        embedding_size=4, depths=[1] * 4, hidden_sizes=[16, 32, 64, 128], bottleneck_sizes=[4, 8, 16, 32]
    )
    torch.manual_seed(0)
    model = VlpVseGridModel(config)
    model.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "updown.pth")])
    content = torch.load(tmp_path / "updown.pth", weights_only=True)
    assert set(content) == {"base", "top"}
    assert "4.0.conv1.weight" in content["base"] and "0.0.bn1.bias" in content["top"]
    from_vse.main(
        [
            "--checkpoint",
            str(tmp_path / "updown.pth"),
            "--backbone-source",
            "detector",
            "--output",
            str(tmp_path / "again"),
        ]
    )
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert same(dict(again.state_dict()), dict(model.state_dict())) and again.config.graph == "caffe"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert processor.channel_order == "bgr" and processor.size.height == again.config.image_size


def test_the_pooling_alone(tmp_path):
    path = GOLDEN / "vse" / "gpo" / "checkpoint.pth"
    pooling, state = load_pooling(path), read_original(path).state
    assert same(dict(pooling.state_dict()), state)
    with pytest.raises(ConversionError, match="`load_pooling` reads it"):
        load_model(path)
    with pytest.raises(ConversionError, match="`load_model` reads it"):
        load_pooling(path_of("region_bert"))
    with pytest.raises(ConversionError, match="does not fit"):
        load_pooling({name: value for name, value in state.items() if name != "linear.weight"})


# ------------------------------------------------------------------------------------------------ processors


def with_vocabulary(case: str, size: int, path: Path) -> Path:
    """A golden checkpoint with a table of another vocabulary."""
    content = read_content(path_of(case))
    names = [name for name in content["model"][1] if name.endswith(("word_embeddings.weight", "embed.weight"))]
    width = content["model"][1][names[0]].shape[1]
    content["model"][1][names[0]] = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    content["opt"].vocab_size = size
    torch.save(content, path)
    return path


BERT_WORDS = GOLDEN / "vse" / "caption_processing_bert" / "vocab.txt"
GRU_WORDS = GOLDEN / "vse" / "caption_processing_bigru" / "vocab.json"
VOCABULARIES = {
    "region_bert": BERT_WORDS,
    "grid_detector_bert": BERT_WORDS,
    "grid_wsl_bert": BERT_WORDS,
    "region_bigru": GRU_WORDS,
}


def size_of(vocabulary: Path) -> int:
    if vocabulary.suffix == ".json":
        return len(VlpWordTokenizer.from_vocabulary_json(vocabulary))
    return len(vocabulary.read_text("utf-8").splitlines())


@pytest.mark.parametrize("case", VOCABULARIES)
def test_the_vocabulary_travels_with_the_model(case, tmp_path, capsys):
    vocabulary = VOCABULARIES[case]
    checkpoint = with_vocabulary(case, size_of(vocabulary), tmp_path / "checkpoint.pth")
    arguments = ["--checkpoint", str(checkpoint), "--vocabulary", str(vocabulary), "--output", str(tmp_path / "ours")]
    from_vse.main(arguments)
    assert "without a processor" not in capsys.readouterr().out
    processor, model = AutoProcessor.from_pretrained(tmp_path / "ours"), AutoModel.from_pretrained(tmp_path / "ours")
    text = ["a dog [MASK] <mask>", "a man"]
    if case.startswith("region"):
        batch = processor(regions=[torch.randn(3, 40), torch.randn(2, 40)], text=text)
    else:
        processor.image_processor.size = {"height": 64, "width": 64}
        batch = processor(images=[torch.zeros(3, 40, 50, dtype=torch.uint8)] * 2, text=text)
        expected = "bgr" if "detector" in case else "rgb"
        assert processor.image_processor.channel_order == expected
    assert (
        processor.tokenizer.mask_token_id not in batch["input_ids"]
    )  # "[MASK]" in a caption is text, as in the original
    assert model(**batch).logits_per_image.shape == (2, 2)
    if case.startswith("grid"):
        to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.pth")])
        assert read_original(tmp_path / "back.pth").options["backbone_source"] == case.split("_")[1]


@pytest.mark.parametrize(
    ("case", "vocabulary", "message"),
    [
        ("region_bert", BERT_WORDS, "another model's vocabulary"),
        ("region_bigru", GRU_WORDS, "another model's vocabulary"),
        ("region_bert", GRU_WORDS, "its text encoder needs vocab.txt"),
        ("region_bigru", BERT_WORDS, "its text encoder needs vocab.json"),
        ("region_bigru", GOLDEN / "vse" / "region_bigru" / "config.json", "has no table word2idx"),
        ("region_bert", GOLDEN / "none.txt", "is no vocabulary of this model"),
    ],
)
def test_vocabularies_that_do_not_fit(case, vocabulary, message, tmp_path, capsys):
    arguments = [
        "--checkpoint",
        str(path_of(case)),
        "--vocabulary",
        str(vocabulary),
        "--output",
        str(tmp_path / "ours"),
    ]
    with pytest.raises(SystemExit):
        from_vse.main(arguments)
    assert message in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_models_of_every_class_and_precision():
    path = path_of("region_bigru")
    base, head = load_model(path), load_model(path, model_class=VlpVseForPreTraining)
    assert isinstance(base, VlpVseModel) and not base.training
    assert same(dict(head.vse.state_dict()), dict(base.state_dict()))
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(path, margin=0.4).config.margin == 0.4
    original = read_original(path)
    assert same(dict(load_model(Original(original.state, original.options)).state_dict()), dict(base.state_dict()))
    state = convert(original.state, vse_table(base.config))
    assert same(state, dict(base.state_dict()))

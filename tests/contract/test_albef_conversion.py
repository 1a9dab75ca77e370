"""Conversion of ALBEF: the released layouts of pre-training, retrieval and grounding, both ways, and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from conversion import from_albef, to_original
from conversion.albef_layouts import infer_config, to_checkpoint, to_state_dict
from conversion.checkpoints import CheckpointError, UnsafeCheckpointError, read_content
from conversion.from_albef import Original, convert_all, for_task, load_model, read_options, read_original
from conversion.tables import ConversionError
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from tests.contract.weight_files import CallsSystem, read_manifest, same

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {"pretrain_alpha04": VlpAlbefForPreTraining, "retrieval_finetune": VlpAlbefForImageTextRetrieval}
CASES |= {"gradcam": VlpAlbefForImageTextRetrieval}
MANIFESTS = {  # published file -> class, trained parameters, resolution, whether it has momentum copies
    "albef_14M": (VlpAlbefForPreTraining, 209_937_725, 256, True),
    "albef_4M": (VlpAlbefForPreTraining, 209_937_725, 256, True),
    "albef_mscoco": (VlpAlbefForImageTextRetrieval, 209_560_835, 384, False),
    "albef_flickr30k": (VlpAlbefForImageTextRetrieval, 209_560_835, 384, False),
    "albef_refcoco": (VlpAlbefForImageTextRetrieval, 209_560_835, 384, False),
}
WITH_COPIES = 419_873_911


def path_of(case: str) -> Path:
    return GOLDEN / "albef" / case / "checkpoint.pth"


def options_of(case: str) -> dict:
    return read_options(GOLDEN / "albef" / case / "config.json")


def facts_of(state) -> dict:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case):
    model = load_model(path_of(case), options=options_of(case))
    assert type(model) is CASES[case] and not model.training
    assert same(to_state_dict(model.config, model.state_dict()), read_original(path_of(case)).state)
    assert model.config.momentum_teacher == (case != "gradcam")
    back = to_checkpoint(model.config, model.state_dict())
    assert (back["config"]["alpha"], back["config"]["distill"]) == (0.4, True)
    with torch.no_grad():
        model.albef.text_model.encoder.layers[0].attention.k_proj.weight[0, 0] += 1
    assert not same(to_state_dict(model.config, model.state_dict()), read_original(path_of(case)).state)


def test_layers_go_to_the_half_that_they_are_of():
    original = read_original(path_of("pretrain_alpha04")).state
    model = load_model(path_of("pretrain_alpha04"), options=options_of("pretrain_alpha04"))
    first = model.config.text_config.num_hidden_layers
    theirs = original[f"text_encoder.bert.encoder.layer.{first}.attention.self.key.weight"]
    assert torch.equal(model.albef.fusion_model.layers[0].attention.k_proj.weight, theirs)
    assert not torch.equal(model.teacher.albef.fusion_model.layers[0].attention.k_proj.weight, theirs)
    assert not torch.equal(model.albef.text_model.encoder.layers[0].attention.k_proj.weight, theirs)
    assert torch.equal(model.queue.image_features, original["image_queue"].t())
    assert not torch.equal(model.queue.image_features, original["text_queue"].t())
    tied = model.mlm_head.decoder.weight, model.albef.get_input_embeddings().weight
    assert tied[0] is tied[1]


@pytest.mark.parametrize("case", [*CASES, "backbone"])
def test_command_lines_there_and_back(case, tmp_path, capsys):
    ours, back, config = tmp_path / "ours", tmp_path / "back.pth", GOLDEN / "albef" / case / "config.json"
    check = ["--check", str(GOLDEN / "albef" / case)] if case == "backbone" else ["--check"]
    from_albef.main(["--checkpoint", str(path_of(case)), "--config", str(config), "--output", str(ours), *check])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("forward")]
    compared = ["image_feat:", "text_feat:", "multimodal_last_hidden:", "itm_logits:"]
    assert [line.split()[1] for line in lines] == (compared if case == "backbone" else [])
    assert all(float(line.split()[-1]) < 2e-5 for line in lines)
    assert "largest difference 0" in printed and "without a processor: give --vocabulary" in printed
    assert "left out" not in printed

    to_original.main([str(ours), "--output", str(back)])
    told = capsys.readouterr().out
    assert "num_attention_heads 4, it has 12" in told and ("no momentum copies" in told) == (case == "gradcam")
    assert same(read_original(back).state, read_original(path_of(case)).state)
    with pytest.raises(SystemExit):
        to_original.main([str(ours), "--output", str(back)])
    assert "exists" in capsys.readouterr().err
    for wrong in (["--half"], ["--layout", "transformers"]):
        with pytest.raises(SystemExit):
            to_original.main([str(ours), "--output", str(tmp_path / "other"), *wrong])
        assert "ALBEF has one layout" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_vocabulary_makes_the_processor(tmp_path, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(115))]
    vocabulary, ours = tmp_path / "vocab.txt", tmp_path / "ours"
    vocabulary.write_text("\n".join(words), "utf-8")
    arguments = ["--checkpoint", str(path_of("gradcam")), "--config", str(GOLDEN / "albef" / "gradcam" / "config.json")]
    from_albef.main([*arguments, "--vocabulary", str(vocabulary), "--output", str(ours)])
    assert "without a processor" not in capsys.readouterr().out
    assert json.loads((ours / "processor_config.json").read_text("utf-8"))["processor_class"] == "VlpAlbefProcessor"
    processor = from_albef.build_processor(AutoConfig.from_pretrained(ours), vocabulary)
    assert processor.image_processor.size["height"] == 48
    assert processor(text="Word3 word7!")["input_ids"].tolist() == [[2, 8, 12]]
    vocabulary.write_text("\n".join(words[:-1]), "utf-8")
    with pytest.raises(SystemExit):
        from_albef.main([*arguments, "--vocabulary", str(vocabulary), "--output", str(tmp_path / "other")])
    assert "another model's vocabulary" in capsys.readouterr().err and not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------ tasks


def test_pretraining_becomes_retrieval_and_the_model_alone():
    options = options_of("pretrain_alpha04")
    config, ours, unused = convert_all(read_original(path_of("pretrain_alpha04")).state, options)
    whole = for_task(config, ours, unused)
    retrieval, base = (for_task(config, ours, unused, task) for task in ("retrieval", "model"))
    assert whole.model_class is VlpAlbefForPreTraining and not whole.left_out
    assert retrieval.model_class is VlpAlbefForImageTextRetrieval
    assert {name.removeprefix("teacher.").partition(".")[0] for name in retrieval.left_out} == {"mlm_head"}
    assert torch.equal(retrieval.state["queue.image_ids"], torch.full((16,), -100))
    assert "teacher.albef.visual_projection.weight" in retrieval.state
    assert base.model_class is VlpAlbefModel and same(
        base.state, {name.removeprefix("albef."): ours[name] for name in ours if name.startswith("albef.")}
    )
    back = to_state_dict(config, retrieval.state)
    assert {name for name in back if "queue" in name} == {"image_queue", "text_queue", "idx_queue", "queue_ptr"}
    assert "text_encoder_m.embeddings.word_embeddings.weight" in back
    for converted in (base, retrieval):
        again = for_task(*convert_all(to_state_dict(config, converted.state), options))
        assert again.model_class is converted.model_class and same(again.state, converted.state)
    bare = read_original(path_of("gradcam"))
    with pytest.raises(ConversionError, match=r"mlm_head\.dense\.weight.*leave --task out"):
        for_task(*convert_all(bare.state, options_of("gradcam")), "pretraining")


@pytest.mark.parametrize("gone", ["_m.", "queue"])
def test_copies_without_a_queue_and_the_reverse_are_left_out(gone):
    original = read_original(path_of("retrieval_finetune"))
    state = {name: tensor for name, tensor in original.state.items() if gone not in name}
    config, ours, unused = convert_all(state, options_of("retrieval_finetune"))
    assert not config.momentum_teacher and unused
    assert all(("queue" in name) != (gone == "queue") for name in unused)
    assert not any(name.startswith(("teacher.", "queue.")) for name in ours)


# ------------------------------------------------------------------------------------------------ published files


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_checkpoints_convert_with_nothing_left_over(name):
    _, state = read_manifest(GOLDEN / "manifests" / f"{name}.json.gz")
    kind, trained, resolution, copies = MANIFESTS[name]
    converted = for_task(*convert_all(state))
    config = converted.config
    assert converted.model_class is kind and not converted.left_out and config.momentum_teacher == copies
    with torch.device("meta"):
        model = kind(config)
    assert {key: tensor.shape for key, tensor in converted.state.items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == trained
    assert model.num_parameters() == (WITH_COPIES if copies else trained)
    assert (config.vision_config.image_size, config.queue_size, config.projection_dim) == (resolution, 65536, 256)
    assert config == VlpAlbefConfig(vision_config=config.vision_config, momentum_teacher=copies)
    assert facts_of(to_state_dict(config, converted.state)) == facts_of(state)
    without = {key: tensor for key, tensor in state.items() if key != "visual_encoder.norm.bias"}
    with pytest.raises(ConversionError, match=r"albef\.vision_model\.norm\.bias"):
        convert_all(without)
    with pytest.raises(ConversionError, match="extra"):
        convert_all({**state, "extra": torch.empty(1, device="meta")})


# ------------------------------------------------------------------------------------------------ files that do not fit


def test_what_does_not_fit_is_refused(tmp_path):
    original = read_original(path_of("pretrain_alpha04"))
    options, state = options_of("pretrain_alpha04"), original.state
    decoder = "text_encoder.cls.predictions.decoder.weight"
    for wrong, said in (
        ({decoder: state[decoder] + 1}, "one tensor in the released code"),
        ({"temp": torch.tensor(torch.nan)}, "infinities or NaN"),
        ({"visual_encoder.pos_embed": torch.zeros(1, 12, 32)}, "12 rows, not one more than a square"),
        ({"queue_ptr": torch.zeros(2, dtype=torch.long)}, "queue_ptr"),
    ):
        with pytest.raises(ConversionError, match=said):
            convert_all({**state, **wrong}, options)
    with pytest.raises(ConversionError, match="it looks like"):
        convert_all({"transformer.blocks.0.norm.weight": torch.zeros(2)})
    with pytest.raises(
        ConversionError, match="fusion_layer of the configuration is 3, the shapes of the weights say 2"
    ):
        infer_config(state, {"bert_config": {**options["bert_config"], "fusion_layer": 3}})
    with pytest.raises(ConversionError, match="no ALBEF has these sizes"):
        infer_config(state, {"bert_config": {"num_attention_heads": 5}})
    assert infer_config(state).text_config.num_attention_heads == 1
    assert infer_config(state, options).text_config.num_attention_heads == 4
    assert infer_config(state, {"yaml": {"alpha": 0.3, "distill": False}}).distillation_weight == 0


def test_settings_that_the_released_code_has_not_are_refused():
    converted = for_task(*convert_all(read_original(path_of("gradcam")).state, options_of("gradcam")))
    fields = converted.config.to_dict()
    for part, name, value in (
        ("vision_config", "layer_norm_eps", 1e-5),
        ("multimodal_config", "num_attention_heads", 2),
    ):
        other = VlpAlbefConfig(**{**fields, part: {**fields[part], name: value}})
        with pytest.raises(ConversionError, match=rf"another model.*{part}\.{name}"):
            to_state_dict(other, converted.state)


def test_nothing_of_a_file_is_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "checkpoint.pth"
    content = read_content(path_of("gradcam"))
    torch.save({"model": content, "epoch": CallsSystem(trace)}, path)
    with pytest.raises(UnsafeCheckpointError):
        read_original(path)
    assert not trace.exists()
    torch.save({"model": content, "config": [1]}, path)
    with pytest.raises(CheckpointError, match="`config` holds a list"):
        read_original(path)
    torch.save({"model": content, "config": {"alpha": 0.25}}, path)
    assert same(read_original(path).state, content)
    assert read_original(path).options == {"yaml": {"alpha": 0.25}}


def test_configurations_are_read_from_json(tmp_path):
    path = tmp_path / "config_bert.json"
    path.write_text(json.dumps({"num_attention_heads": 4, "fusion_layer": 2}), "utf-8")
    assert read_options(path) == {"bert_config": {"num_attention_heads": 4, "fusion_layer": 2}}
    path.write_text(json.dumps({"vit": {"num_heads": 4}, "task": "x"}), "utf-8")
    assert read_options(path) == {"vit": {"num_heads": 4}}
    assert read_options(None) == {}
    for content, said in (("[1]", "holds a list"), ("{", "cannot be read as JSON")):
        path.write_text(content, "utf-8")
        with pytest.raises(ConversionError, match=said):
            read_options(path)
    unchanged = Original(read_original(path_of("gradcam")).state)
    assert load_model(unchanged).config.text_config.num_attention_heads == 1

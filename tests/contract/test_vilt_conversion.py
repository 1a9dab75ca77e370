"""Conversion of ViLT: the released layout and transformers', both ways; tasks, processors and files that do not fit."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, AutoProcessor, ViltConfig

from conversion import from_vilt, from_vse, to_original
from conversion.checkpoints import CheckpointError, UnsafeCheckpointError, read_content
from conversion.from_vilt import (
    CLASSES,
    Original,
    convert_all_heads,
    convert_transformers,
    for_task,
    load_model,
    read_answers,
    read_options,
    read_original,
)
from conversion.tables import ConversionError
from conversion.vilt_layouts import POSITION_IDS, heads_of, infer_config, to_checkpoint, to_transformers
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.modeling_vilt import VlpViltForPreTraining, VlpViltModel
from hf_vlp.models.vilt.tasks_vilt import (
    VlpViltForImageTextRetrieval,
    VlpViltForMaskedLM,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)
from tests.contract.weight_files import CallsSystem, read_manifest, same

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY = GOLDEN / "vilt" / "text_processing" / "vocab.txt"
CASES = {
    "pretrain_mlm_itm": VlpViltForPreTraining,
    "pretrain_mpp": VlpViltForPreTraining,
    "vqa": VlpViltForVisualQuestionAnswering,
    "nlvr2": VlpViltForVisualReasoning,
    "irtr": VlpViltForImageTextRetrieval,
}
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}  # without matching nothing reads it, and ours has none
MANIFESTS = {  # published file -> class, parameters, of which heads
    "vilt_200k_mlm_itm": (VlpViltForPreTraining, 135_660_092, 24_065_084),
    "vilt_vqa": (VlpViltForVisualQuestionAnswering, 117_588_537, 5_993_529),
    "vilt_nlvr2": (VlpViltForVisualReasoning, 113_962_754, 2_366_978 + 768),
    "vilt_irtr_coco": (VlpViltForImageTextRetrieval, 111_597_315, 1_538 + 769),
    "vilt_irtr_f30k": (VlpViltForImageTextRetrieval, 111_597_315, 1_538 + 769),
}
BACKBONE = 111_595_008


def path_of(case: str) -> Path:
    return GOLDEN / "vilt" / case / "checkpoint.ckpt"


def options_of(case: str) -> dict:
    return json.loads((GOLDEN / "vilt" / case / "config.json").read_text("utf-8"))


def exported(model) -> dict[str, torch.Tensor]:
    return to_checkpoint(model.config, model.state_dict())["state_dict"]


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case):
    content, model = read_content(path_of(case)), load_model(path_of(case))
    assert type(model) is CASES[case] and not model.training
    back = to_checkpoint(model.config, model.state_dict())
    theirs = dict(content["state_dict"])
    lost = theirs.keys() - back["state_dict"].keys()
    assert lost == (POOLER if case == "pretrain_mpp" else set())
    assert same(back["state_dict"], {name: theirs[name] for name in theirs.keys() - lost})
    assert back.keys() == content.keys()
    ours, before = (part["hyper_parameters"]["config"] for part in (back, content))
    assert ours.keys() == before.keys()
    other = {"num_workers", "precision", "max_image_len", "draw_false_text", "get_recall_metric", "lr_mult", "vit"}
    other |= {"draw_false_image"}
    assert {name for name in ours if ours[name] != before[name]} <= other
    with torch.no_grad():
        model.vilt.encoder.layers[0].attention.k_proj.weight[0, 0] += 1
    assert not same(exported(model), back["state_dict"])


@pytest.mark.parametrize("case", [*CASES, "irtr_eval", "backbone_forward"])
def test_command_lines_there_and_back(case, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back.ckpt"
    compared = {"backbone_forward": "infer.pooled", "pretrain_mlm_itm": "mlm_logits", "irtr_eval": "scores"}
    compared |= {"vqa": "vqa_logits", "nlvr2": "nlvr2_logits"}
    check = ["--check", str(GOLDEN / "vilt" / case)] if case in compared else ["--check"]
    from_vilt.main(["--checkpoint", str(path_of(case)), "--output", str(ours), *check])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("forward")]
    assert [line.split()[1] for line in lines] == [f"{compared[case]}:"] if case in compared else not lines
    assert all(float(line.split()[-1]) < 2e-5 for line in lines)
    assert "largest difference 0" in printed and "without a processor: give --vocabulary" in printed
    assert ("left out" in printed) == (case == "pretrain_mpp")
    assert f"{load_model(path_of(case)).num_parameters():,}" in printed

    to_original.main([str(ours), "--output", str(back)])
    assert "num_attention_heads" in capsys.readouterr().out  # the released code builds ViT-B/32 alone
    assert read_original(back).options["num_heads"] == options_of(case)["num_heads"]
    assert same(dict(load_model(back).state_dict()), dict(load_model(path_of(case)).state_dict()))
    with pytest.raises(SystemExit):
        to_original.main([str(ours), "--output", str(back)])
    assert "exists" in capsys.readouterr().err
    for wrong in (["--half"], ["--layout", "open_clip"]):
        with pytest.raises(SystemExit):
            to_original.main([str(ours), "--output", str(tmp_path / "other"), *wrong])
        assert "ViLT has the layout" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_the_transformer_alone_and_a_head_without_its_rest(tmp_path):
    state = read_original(path_of("vqa")).state
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("vqa_")}
    model = load_model(Original(bare, options_of("vqa")))
    assert type(model) is VlpViltModel
    assert same(exported(model), bare)
    assert same(dict(load_model(Original(state, options_of("vqa")), "model").state_dict()), dict(model.state_dict()))
    model.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--output", str(tmp_path / "back.ckpt")])
    assert same(read_original(tmp_path / "back.ckpt").state, bare)


# ------------------------------------------------------------------------------------------------ published files


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_checkpoints_convert_with_nothing_left_over(name):
    facts, state = read_manifest(GOLDEN / "manifests" / f"{name}.json.gz")
    kind, total, heads = MANIFESTS[name]
    converted = for_task(*convert_all_heads(state))
    assert converted.model_class is kind and not converted.left_out
    with torch.device("meta"):
        model = kind(converted.config)
    assert {key: tensor.shape for key, tensor in converted.state.items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert model.num_parameters() == total == facts["parameters"]
    own = sum(weight.numel() for key, weight in model.named_parameters() if not key.startswith("vilt."))
    assert own == heads and total - own == BACKBONE
    config = converted.config
    assert (config.num_attention_heads, config.image_size, config.max_position_embeddings) == (12, 384, 40)
    assert (config.mlm_weight, config.itm_weight, config.wpa_weight, config.mpp_weight) == (1.0, 1.0, 0.1, 0.0)
    assert config.num_labels == (3129 if "vqa" in name else 2)
    back = to_checkpoint(config, converted.state)["state_dict"]
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in back.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in state.items()
    }
    without = {key: tensor for key, tensor in state.items() if key != "transformer.norm.bias"}
    with pytest.raises(ConversionError, match=r"vilt\.norm\.bias"):
        convert_all_heads(without)
    with pytest.raises(ConversionError, match="extra"):
        convert_all_heads({**state, "extra": torch.empty(1, device="meta")})


# ------------------------------------------------------------------------------------------------ transformers

PEERS = {
    "model": transformers.ViltModel,
    "mlm": transformers.ViltForMaskedLM,
    "vqa": transformers.ViltForQuestionAnswering,
    "nlvr2": transformers.ViltForImagesAndTextClassification,
    "retrieval": transformers.ViltForImageAndTextRetrieval,
}
SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 12, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
ANSWERS = {0: "yes", 1: "no", 2: "two", 3: "red", 4: "net"}


def batch_for(task: str) -> dict[str, torch.Tensor]:
    """Texts and pictures of mixed sizes, two pictures a text for nlvr2."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 90, (3, 9), generator=draw)
    lengths, sizes = torch.tensor([9, 4, 6]), [(24, 32), (32, 16), (8, 32)]
    masks = torch.zeros(3, 32, 32, dtype=torch.long)
    for row, (height, width) in enumerate(sizes):
        masks[row, :height, :width] = 1
    pixels = torch.randn(3, 3, 32, 32, generator=draw) * masks[:, None]
    if task == "nlvr2":
        pixels, masks = torch.stack([pixels, pixels.flip(0)], dim=1), torch.stack([masks, masks.flip(0)], dim=1)
    attention = (torch.arange(9)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": attention, "pixel_values": pixels, "pixel_mask": masks}


@torch.no_grad()
def answer(model, task: str) -> torch.Tensor:
    """What does not depend on the order of patches, which transformers draws anew in every call."""
    batch = batch_for(task)
    output = model.eval()(**batch)
    if task == "model":
        return output.pooler_output
    return output.logits[batch["attention_mask"].bool()] if task == "mlm" else output.logits


def close(left: torch.Tensor, right: torch.Tensor, bound: float) -> bool:
    return left.shape == right.shape and bool((left - right).abs().max() <= bound * right.abs().max())


def our_model(task: str, **fields):
    torch.manual_seed(1)
    names = {"id2label": ANSWERS} if task == "vqa" else {}
    model = CLASSES[task](VlpViltConfig(**SIZES, **names, **fields)).eval()
    with torch.no_grad():  # as initialised, norms and biases would hide a wrong name
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model


@pytest.mark.parametrize("task", PEERS)
def test_transformers_computes_the_same_of_ours(task, tmp_path, capsys):
    model = our_model(task, layer_norm_eps=1e-5, text_layer_norm_eps=1e-5)
    model.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--layout", "transformers", "--output", str(tmp_path / "theirs")])
    said = capsys.readouterr().out
    assert ("itm_head, which ViltForImageAndTextRetrieval has not" in said) == (task == "retrieval")
    assert "layer_norm_eps" not in said
    theirs, info = PEERS[task].from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    assert close(answer(theirs, task), answer(model, task), 1e-5)
    assert theirs.config.modality_type_vocab_size == (3 if task == "nlvr2" else 2)
    with torch.no_grad():
        theirs.get_parameter(next(name for name, _ in theirs.named_parameters() if "value.weight" in name)).add_(0.1)
    assert not close(answer(theirs, task), answer(model, task), 1e-3)
    # and back
    from_vilt.main(["--checkpoint", str(tmp_path / "theirs"), "--output", str(tmp_path / "again"), "--check"])
    again = type(model).from_pretrained(tmp_path / "again")
    lost = {"itm_head.weight", "itm_head.bias"} if task == "retrieval" else set()
    state = dict(again.state_dict())
    assert all((state[name] == 0).all() for name in lost)
    assert same({**state, **{name: model.state_dict()[name] for name in lost}}, dict(model.state_dict()))
    assert again.config.layer_norm_eps == again.config.text_layer_norm_eps == 1e-5
    if task == "vqa":
        assert again.config.id2label == theirs.config.id2label == ANSWERS


@pytest.mark.parametrize("task", PEERS)
def test_ours_computes_the_same_of_transformers(task, tmp_path):
    names = {"id2label": ANSWERS, "label2id": {answer: label for label, answer in ANSWERS.items()}}
    images = {"modality_type_vocab_size": 3, "num_images": 2} if task == "nlvr2" else names if task == "vqa" else {}
    torch.manual_seed(2)
    theirs = PEERS[task](ViltConfig(**SIZES, **images, hidden_dropout_prob=0.1)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is CLASSES[task] and model.config.hidden_dropout_prob == 0.1
    assert close(answer(model, task), answer(theirs, task), 1e-5)
    if task == "mlm":  # tied there, so stored once
        tied = model.mlm_head.decoder.weight, model.vilt.text_embeddings.word_embeddings.weight
        assert torch.equal(*tied) and tied[0].data_ptr() != tied[1].data_ptr()
    if task == "retrieval":
        batch = batch_for(task)
        assert torch.equal(model.match_probability(**batch), torch.full((3,), 0.5))
    with pytest.raises(ConversionError, match="is a folder"):
        from_vilt.read(tmp_path, options={"num_heads": 4})


def test_one_eps_of_two_costs_little(tmp_path, capsys):
    model = our_model("vqa")
    model.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--layout", "transformers", "--output", str(tmp_path / "theirs")])
    assert "layer_norm_eps 1e-06 in the blocks, it takes 1e-12" in capsys.readouterr().out
    theirs = transformers.ViltForQuestionAnswering.from_pretrained(tmp_path / "theirs")
    assert close(answer(theirs, "vqa"), answer(model, "vqa"), 1e-4)
    with pytest.raises(ConversionError, match="hidden_act is 'relu'"):
        to_transformers(VlpViltConfig(**SIZES, hidden_act="relu"), model.state_dict())


def test_pretraining_becomes_their_masked_words(tmp_path, capsys):
    model = our_model("pretraining")
    model.save_pretrained(tmp_path / "ours")
    to_original.main([str(tmp_path / "ours"), "--layout", "transformers", "--output", str(tmp_path / "theirs")])
    assert "itm_head, which ViltForMaskedLM has not" in capsys.readouterr().out
    theirs = transformers.ViltForMaskedLM.from_pretrained(tmp_path / "theirs")
    decoder, words = theirs.mlm_score.decoder.weight, theirs.vilt.embeddings.text_embeddings.word_embeddings.weight
    assert torch.equal(decoder, model.mlm_head.decoder.weight) and not torch.equal(decoder, words)
    assert close(theirs.vilt(**batch_for("mlm")).pooler_output, model.vilt(**batch_for("mlm")).pooler_output, 1e-4)


def test_a_bias_stored_twice():
    config = ViltConfig(**SIZES)
    state = {name: tensor.clone() for name, tensor in transformers.ViltForMaskedLM(config).state_dict().items()}
    state |= {"vilt.embeddings.text_embeddings.position_ids": torch.arange(12)[None]}
    bias = torch.arange(90.0)
    bare = {name: tensor for name, tensor in state.items() if name != "mlm_score.decoder.bias"}
    for old in ({"mlm_score.bias": bias}, {"mlm_score.bias": bias, "mlm_score.decoder.bias": bias.clone()}):
        assert torch.equal(convert_transformers({**bare, **old}, config)[1]["mlm_head.decoder.bias"], bias)
    with pytest.raises(ConversionError, match="are one tensor there and differ"):
        convert_transformers({**state, "mlm_score.bias": bias}, config)


def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="num_images is 3"):
        convert_transformers({}, ViltConfig(**SIZES, num_images=3))
    with pytest.raises(ConversionError, match=r"(?s)names do not fit.*classifier\.weight"):
        tokens = transformers.ViltForTokenClassification(config := ViltConfig(**SIZES))
        convert_transformers(tokens.state_dict(), config)
    for fields, message in (({"qkv_bias": False}, "qkv_bias is False"), ({"image_size": [32, 40]}, "image_size")):
        with pytest.raises(ConversionError, match=message):
            convert_transformers({}, ViltConfig(**{**SIZES, **fields}))
    answering = transformers.ViltForQuestionAnswering(config := ViltConfig(**SIZES, hidden_act="relu"))
    with pytest.raises(ConversionError, match="hidden_act is 'relu'; the classifiers of transformers have gelu alone"):
        convert_transformers(answering.state_dict(), config)
    convert_transformers(answering.vilt.state_dict(), config)
    transformers.BertModel(
        transformers.BertConfig(vocab_size=9, hidden_size=12, num_hidden_layers=1, intermediate_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="holds a bert model, not a ViLT"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------ tasks


def test_retrieval_from_pretraining_ranks_by_the_match():
    before, model = load_model(path_of("pretrain_mlm_itm")), load_model(path_of("pretrain_mlm_itm"), "retrieval")
    assert torch.equal(model.rank_head.weight, before.itm_head.weight[1:])
    assert torch.equal(model.rank_head.bias, before.itm_head.bias[1:])
    assert model.rank_head.weight.data_ptr() != model.itm_head.weight.data_ptr()
    tuned = load_model(path_of("irtr"))
    assert not torch.equal(tuned.rank_head.weight, tuned.itm_head.weight[1:])
    assert not any(weight.requires_grad for weight in tuned.itm_head.parameters())
    batch = {"input_ids": torch.tensor([[101, 7, 102]]), "pixel_values": torch.randn(1, 3, 48, 48)}
    assert torch.allclose(model.score_pairs(**batch), before.score_pairs(**batch), atol=1e-6)


def test_two_modalities_become_three():
    original = read_original(path_of("nlvr2"))
    name = "token_type_embeddings.weight"
    assert original.state[name].shape[0] == 3
    assert torch.equal(load_model(original).second_image_embedding, original.state[name][2:])
    grown = load_model(Original({**original.state, name: original.state[name][:2]}, original.options))
    assert torch.equal(grown.second_image_embedding, original.state[name][1:2])
    with pytest.raises(ConversionError, match="has 4 rows"):
        convert_all_heads({**original.state, name: torch.randn(4, 48)}, original.options)
    assert load_model(original).config.id2label == {0: "False", 1: "True"}


@pytest.mark.parametrize(
    ("case", "task"),
    [("vqa", "nlvr2"), ("vqa", "retrieval"), ("nlvr2", "mlm"), ("nlvr2", "pretraining"), ("irtr", "vqa")],
)
def test_a_task_needs_its_head(case, task):
    with pytest.raises(ConversionError, match=rf"{CLASSES[task].__name__} needs \(heads of the file"):
        load_model(path_of(case), task)


def test_heads_of_several_tasks_need_a_choice(tmp_path):
    content = read_content(path_of("pretrain_mlm_itm"))
    answers = {name: tensor for name, tensor in read_original(path_of("vqa")).state.items() if name.startswith("vqa_")}
    content["state_dict"] |= answers
    torch.save(content, tmp_path / "both.ckpt")
    with pytest.raises(ConversionError, match="heads of several tasks: choose one with --task, of vqa, pretraining"):
        load_model(tmp_path / "both.ckpt")
    for task in ("vqa", "pretraining", "mlm", "retrieval"):
        assert type(load_model(tmp_path / "both.ckpt", task)) is CLASSES[task]
    assert type(load_model(path_of("irtr"))) is CLASSES["retrieval"]  # a matching head beside it is no second task


def test_masked_words_alone():
    whole, words = load_model(path_of("pretrain_mlm_itm")), load_model(path_of("pretrain_mlm_itm"), "mlm")
    assert type(words) is VlpViltForMaskedLM
    kept = {name: tensor for name, tensor in whole.state_dict().items() if name in words.state_dict()}
    assert same(dict(words.state_dict()), kept) and len(kept) < len(whole.state_dict())
    content = to_checkpoint(words.config, words.state_dict())
    assert heads_of(content["state_dict"]) == {"mlm"}
    assert content["hyper_parameters"]["config"]["loss_names"]["itm"] == 0
    again = load_model(Original(content["state_dict"], content["hyper_parameters"]["config"]))
    assert same(dict(again.state_dict()), dict(words.state_dict()))


def test_weights_of_objectives_follow_the_heads():
    told = {case: load_model(path_of(case)).config for case in ("pretrain_mpp", "pretrain_mlm_itm", "vqa")}
    weights = {
        case: (config.mlm_weight, config.itm_weight, config.wpa_weight, config.mpp_weight)
        for case, config in told.items()
    }
    assert weights["pretrain_mpp"] == (0, 0, 0, 1) and weights["pretrain_mlm_itm"] == (1, 1, 0.1, 0)
    assert weights["vqa"] == (1, 1, 0.1, 0)  # those of pre-training that is to come, not of the file
    mask = {"transformer.mask_token": torch.ones(1, 1, 48)}  # without the objective it has no place
    original = read_original(path_of("vqa"))
    converted = for_task(*convert_all_heads({**original.state, **mask}, original.options))
    assert converted.left_out == ["vilt.image_embeddings.mask_token"]


# ------------------------------------------------------------------------------------------------ what the file tells


def test_heads_are_told_by_the_options_or_by_the_width(tmp_path):
    original = read_original(path_of("vqa"))
    assert original.options["num_heads"] == 4 == load_model(original).config.num_attention_heads
    assert infer_config(original.state).num_attention_heads == 1
    assert load_model(original, options={"num_heads": 2}).config.num_attention_heads == 2
    wide = {name: tensor.to("meta") for name, tensor in original.state.items()}
    wide["text_embeddings.word_embeddings.weight"] = torch.empty(128, 256, device="meta")
    assert infer_config(wide).num_attention_heads == 4
    for text in ('{"num_heads": 3}', '{"config": {"num_heads": 3}}'):
        (tmp_path / "options.json").write_text(text)
        assert read_options(tmp_path / "options.json") == {"num_heads": 3}
    assert read_options(None) == {}
    for text, message in (("[1]", "holds a list"), ("{", "cannot be read as JSON")):
        (tmp_path / "options.json").write_text(text)
        with pytest.raises(ConversionError, match=message):
            read_options(tmp_path / "options.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 768}, "hidden_size of the configuration is 768, the shapes of the weights say 48"),
        ({"num_layers": 12}, "num_layers of the configuration is 12"),
        ({"max_text_len": 50}, "max_text_len of the configuration is 50"),
        ({"num_heads": 5}, "num_attention_heads"),
        ({"num_heads": "four"}, "num_heads of the configuration is 'four', which is no number"),
        ({"drop_rate": None}, "drop_rate of the configuration is None"),
        ({"max_image_len": True}, "max_image_len of the configuration is True"),
    ],
)
def test_options_that_do_not_fit_the_weights(options, message):
    original = read_original(path_of("vqa"))
    with pytest.raises(ConversionError, match=message):
        convert_all_heads(original.state, original.options | options)


def test_limits_of_patches_and_dropout_come_along():
    original = read_original(path_of("pretrain_mlm_itm"))
    config = infer_config(original.state, original.options)
    assert (config.max_image_length, config.hidden_dropout_prob) == (200, 0.0)
    config = infer_config(original.state, {"max_image_len": -1, "num_heads": 4})
    assert (config.max_image_length, config.hidden_dropout_prob) == (None, 0.1)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act relu, it takes gelu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05, it takes 1e-06"),
        ({"text_layer_norm_eps": 1e-6}, "text_layer_norm_eps 1e-06, it takes 1e-12"),
        ({"hidden_size": 768, "num_attention_heads": 6, "intermediate_size": 3072}, "num_attention_heads 6, vit_base"),
    ],
)
def test_what_the_released_code_would_not_see_is_refused(field, message):
    with pytest.raises(ConversionError, match=message):
        to_checkpoint(VlpViltConfig(**SIZES | field), {})
    model = VlpViltModel(VlpViltConfig(**SIZES))
    assert to_checkpoint(model.config, model.state_dict())["hyper_parameters"]["config"]["mlp_ratio"] == 1.5


# ------------------------------------------------------------------------------------------------ file formats


@pytest.fixture
def lightning(monkeypatch):
    """A callback class of a Lightning that is not installed, gone again when files are read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].ModelCheckpoint = callback
    yield callback


def full_checkpoint(callbacks: dict) -> dict:
    """What a trainer saves beside the weights."""
    moments = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    rest = {"optimizer_states": [moments], "lr_schedulers": [{"lr_lambdas": [None], "last_epoch": 3}]}
    return {**read_content(path_of("vqa")), "callbacks": callbacks, **rest, "native_amp_scaling_state": {"scale": 2.0}}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_full_checkpoints_are_read_without_lightning(options, lightning, monkeypatch, tmp_path):
    path = tmp_path / "full.ckpt"
    torch.save(
        full_checkpoint({lightning: {"best_model_score": torch.tensor(0.7), "dirpath": "result"}}), path, **options
    )
    made = full_checkpoint({lightning: lightning()})
    torch.save(made, tmp_path / "made.ckpt", **options)
    for part in [part for part in sys.modules if part.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, part)
    assert same(read_original(path).state, read_original(path_of("vqa")).state)
    assert read_original(path).options == read_original(path_of("vqa")).options
    (callback,) = read_content(path)["callbacks"]
    assert callback is not lightning and isinstance(callback, type)
    with pytest.raises(Exception, match="ModelCheckpoint"):
        callback()
    with pytest.raises(CheckpointError, match="ModelCheckpoint"):
        read_original(tmp_path / "made.ckpt")
    assert not any(part.startswith("pytorch_lightning") for part in sys.modules)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_code_among_the_callbacks_is_refused_and_not_run(options, lightning, tmp_path):
    trace = tmp_path / "trace"
    torch.save(full_checkpoint({lightning: CallsSystem(trace)}), tmp_path / "evil.ckpt", **options)
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system.*nothing was run"):
        read_original(tmp_path / "evil.ckpt")
    assert not trace.exists()
    function, arguments = CallsSystem(trace).__reduce__()
    function(*arguments)
    assert trace.exists()


class Calls:
    """Pickles to a call of a class."""

    def __init__(self, called: type):
        self.called = called

    def __reduce__(self):
        return self.called, ()


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_classes_of_lightning_may_be_named_alone_and_no_others(options, lightning, tmp_path):
    path, name = tmp_path / "full.ckpt", r"pytorch_lightning\.callbacks\.model_checkpoint\.ModelCheckpoint"
    torch.save(full_checkpoint({lightning: {}}), path, **options)
    read_original(path)
    for made in (Calls(lightning), lightning()):
        torch.save(full_checkpoint({lightning: made}), path, **options)
        with pytest.raises(UnsafeCheckpointError, match=f"asks to call {name}.*nothing was run"):
            read_original(path)
    torch.save(full_checkpoint({Calls: {}}), path, **options)
    with pytest.raises(UnsafeCheckpointError, match=r"asks to call tests\.contract\.test_vilt_conversion\.Calls"):
        read_original(path)


def test_a_forged_class_of_lightning_is_not_imported(monkeypatch, tmp_path):
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trap = type("Trap", (), {"__module__": "pytorch_lightning"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.SimpleNamespace(Trap=trap))
    torch.save(full_checkpoint({trap: {}}), tmp_path / "forged.ckpt")
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert len(read_original(tmp_path / "forged.ckpt").state) == 45
    assert not (tmp_path / "trace").exists()
    __import__("pytorch_lightning")
    assert (tmp_path / "trace").exists()
    monkeypatch.delitem(sys.modules, "pytorch_lightning")


def test_wrappers_and_architectures_that_do_not_fit(tmp_path):
    content = read_content(path_of("vqa"))
    bare = tmp_path / "bare.pt"
    torch.save({f"module.{name}": tensor for name, tensor in content["state_dict"].items()}, bare)
    assert same(read_original(bare).state, read_original(path_of("vqa")).state) and not read_original(bare).options
    for wrong in (3, {"config": [1]}):
        torch.save({**content, "hyper_parameters": wrong}, tmp_path / "wrong.ckpt")
        with pytest.raises(CheckpointError, match="`hyper_parameters` holds a"):
            read_original(tmp_path / "wrong.ckpt")
    with pytest.raises(ConversionError, match=r"(?s)looks like VSE-infinity.*- found .*\+ expected"):
        convert_all_heads(from_vse.read_original(GOLDEN / "vse" / "region_bert" / "checkpoint.pth").state)
    deit = {**content["state_dict"], "transformer.pos_embed": torch.randn(1, 38, 48)}
    with pytest.raises(ConversionError, match="38 rows, not one more than a square"):
        convert_all_heads(deit)
    for value in (torch.full((48,), torch.nan), torch.zeros(48, dtype=torch.int8)):
        with pytest.raises(ConversionError, match=r"vilt\.norm\.bias (holds infinities|is torch\.int8)"):
            convert_all_heads({**content["state_dict"], "transformer.norm.bias": value})


# ------------------------------------------------------------------------------------------------ processors and answers


def with_vocabulary(case: str, path: Path) -> Path:
    """A golden checkpoint with a table of the shared vocabulary's size."""
    content = read_content(path_of(case))
    size = len(VOCABULARY.read_text("utf-8").splitlines())
    words = torch.randn(
        size, content["state_dict"]["pooler.dense.bias"].shape[0], generator=torch.Generator().manual_seed(0)
    )
    content["state_dict"]["text_embeddings.word_embeddings.weight"] = words
    content["hyper_parameters"]["config"]["vocab_size"] = size
    torch.save(content, path)
    return path


def test_vocabulary_and_answers_travel_with_the_model(tmp_path, capsys):
    checkpoint = with_vocabulary("vqa", tmp_path / "checkpoint.ckpt")
    names = {str(label): f"answer {label}" for label in range(37)}
    (tmp_path / "vqa_dict.json").write_text(json.dumps(names))
    (tmp_path / "options.json").write_text('{"config": {"image_size": 64}}')
    arguments = ["--checkpoint", str(checkpoint), "--vocabulary", str(VOCABULARY), "--output", str(tmp_path / "ours")]
    arguments += ["--answers", str(tmp_path / "vqa_dict.json"), "--config", str(tmp_path / "options.json"), "--check"]
    from_vilt.main(arguments)
    assert "without a processor" not in capsys.readouterr().out
    processor, model = AutoProcessor.from_pretrained(tmp_path / "ours"), AutoModel.from_pretrained(tmp_path / "ours")
    batch = processor([torch.zeros(3, 70, 100, dtype=torch.uint8)] * 2, ["a [MASK]", "a red dog " * 30])
    assert processor.tokenizer.model_max_length == 40 == batch["input_ids"].shape[1]
    assert processor.tokenizer.mask_token_id in batch["input_ids"]
    assert batch["pixel_values"].shape == (2, 3, 64, 88)  # whole patches of 8
    assert model(**batch).pooler_output.shape == (2, 48)
    tuned = VlpViltForVisualQuestionAnswering.from_pretrained(tmp_path / "ours")
    assert tuned.config.id2label[36] == "answer 36" and tuned.config.label2id["answer 3"] == 3

    to_original.main([str(tmp_path / "ours"), "--layout", "transformers", "--output", str(tmp_path / "theirs")])
    theirs = transformers.ViltProcessor.from_pretrained(tmp_path / "theirs")
    same_pixels = theirs(
        images=[torch.zeros(3, 70, 100, dtype=torch.uint8)] * 2, text=["a dog"] * 2, return_tensors="pt"
    )
    assert torch.equal(same_pixels["pixel_values"], batch["pixel_values"])
    from_vilt.main(["--checkpoint", str(tmp_path / "theirs"), "--output", str(tmp_path / "again")])
    again = AutoProcessor.from_pretrained(tmp_path / "again")
    assert again.image_processor.size == processor.image_processor.size and again.image_processor.size_divisor == 8
    assert again.tokenizer.model_max_length == 40
    assert (
        VlpViltForVisualQuestionAnswering.from_pretrained(tmp_path / "again").config.id2label == tuned.config.id2label
    )


def test_answers_of_every_form(tmp_path):
    path = tmp_path / "answers.json"
    wanted = {0: "net", 1: "red", 2: "yes"}
    for content in ({"1": "red", "0": "net", "2": "yes"}, ["net", "red", "yes"], {"red": 1, "net": 0, "yes": 2}):
        path.write_text(json.dumps({"id2answer": content}))
        assert read_answers(path, 3) == wanted
        path.write_text(json.dumps(content))
        assert read_answers(path, 3) == wanted
    for content in (
        ["net", "red"],
        {"0": "net", "1": "red", "3": "yes"},
        ["net", "red", "red"],
        [1, 2, 3],
        {"a": "b"},
        3,
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConversionError, match="from 0 to 2"):
            read_answers(path, 3)


@pytest.mark.parametrize(
    ("case", "more", "message"),
    [
        ("vqa", ["--vocabulary", str(VOCABULARY)], "another model's vocabulary"),
        ("vqa", ["--vocabulary", str(GOLDEN / "none.txt")], "is no vocabulary of this model"),
        ("vqa", ["--answers", str(GOLDEN / "vilt" / "vqa" / "config.json")], "the model has 37 answers"),
        ("nlvr2", ["--answers", str(GOLDEN / "vilt" / "vqa" / "config.json")], "gives no answers"),
        ("irtr", ["--check", str(GOLDEN / "vilt" / "irtr")], "none of its outputs"),
        ("vqa", ["--sha256", "00"], "SHA-256 is"),
    ],
)
def test_command_lines_that_do_not_fit(case, more, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        from_vilt.main(["--checkpoint", str(path_of(case)), "--output", str(tmp_path / "ours"), *more])
    assert message in capsys.readouterr().err


def test_models_of_every_precision():
    path = path_of("vqa")
    assert load_model(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in read_original(path).state.items()
    }
    model = load_model(Original(half, options_of("vqa")))
    assert model.dtype == torch.float32 and torch.equal(model.vilt.norm.bias, half["transformer.norm.bias"].float())
    assert exported(model)[POSITION_IDS].tolist() == [list(range(40))]

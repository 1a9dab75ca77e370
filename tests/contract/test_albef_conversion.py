"""Conversion of ALBEF: the layouts of every stage and task, both ways, and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from conversion import from_albef, to_original
from conversion.albef_layouts import infer_config, to_checkpoint, to_state_dict
from conversion.albef_task_layouts import task_of, untold_of_task
from conversion.checkpoints import CheckpointError, UnsafeCheckpointError, read_content
from conversion.from_albef import (
    Original,
    build_model,
    convert_all,
    for_task,
    load_model,
    read_answers,
    read_options,
    read_original,
    with_answers,
)
from conversion.tables import ConversionError
from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForMaskedLM,
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
)
from tests.contract.weight_files import CallsSystem, read_manifest, same

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {"pretrain_alpha04": VlpAlbefForPreTraining, "retrieval_finetune": VlpAlbefForImageTextRetrieval}
CASES |= {"gradcam": VlpAlbefForImageTextRetrieval}
TASKS = {
    "ve": VlpAlbefForVisualEntailment,
    "vqa_rank_answer": VlpAlbefForVisualQuestionAnswering,
    "nlvr_finetune": VlpAlbefForVisualReasoning,
    "nlvr_pretrain_ta": VlpAlbefForTextAssignment,
}
COMPARED = {"backbone": ["image_feat:", "text_feat:", "multimodal_last_hidden:", "itm_logits:"]}
COMPARED |= {"ve": ["prediction_eval:"], "nlvr_finetune": ["prediction_eval:"], "nlvr_pretrain_ta": ["loss:"]}
COMPARED |= {"vqa_rank_answer": ["topk_probs:"]}
UNREAD = ["temp", "text_proj.weight", "text_proj.bias"]  # of text assignment
MANIFESTS = {  # published file -> class, trained parameters, resolution, whether it has momentum copies
    "albef_14M": (VlpAlbefForPreTraining, 209_937_725, 256, True),
    "albef_4M": (VlpAlbefForPreTraining, 209_937_725, 256, True),
    "albef_mscoco": (VlpAlbefForImageTextRetrieval, 209_560_835, 384, False),
    "albef_flickr30k": (VlpAlbefForImageTextRetrieval, 209_560_835, 384, False),
    "albef_refcoco": (VlpAlbefForImageTextRetrieval, 209_560_835, 384, False),
    "albef_vqa": (VlpAlbefForVisualQuestionAnswering, 290_336_058, 384, True),
    "albef_VE_checkpoint_best": (VlpAlbefForVisualEntailment, 209_758_467, 384, True),
    "albef_NLVR_checkpoint_XX": (VlpAlbefForVisualReasoning, 259_381_250, 384, True),
    "albef_pretrain_model_nlvr": (VlpAlbefForTextAssignment, 258_545_667, 256, False),
}
# With momentum copies; text assignment has none, and a projection of images that is not trained.
WITH_COPIES = {VlpAlbefForPreTraining: 419_873_911, VlpAlbefForVisualQuestionAnswering: 580_672_116}
WITH_COPIES |= {VlpAlbefForVisualEntailment: 419_516_934, VlpAlbefForVisualReasoning: 518_762_500}
WITH_COPIES |= {VlpAlbefForTextAssignment: 258_742_531}


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


@pytest.mark.parametrize("case", TASKS)
def test_round_trip_of_a_task_is_exact(case):
    original, options = read_original(path_of(case)).state, options_of(case)
    config, ours, unused = convert_all(original, options)
    converted = for_task(config, ours, unused)
    assert converted.model_class is TASKS[case] and converted.left_out == (UNREAD if "ta" in case else [])
    assert config.momentum_teacher == (case != "nlvr_pretrain_ta")
    back = to_state_dict(config, converted.state)
    read = {name: original[name] for name in original if name not in UNREAD}
    assert facts_of(back) == facts_of(original) and same({name: back[name] for name in read}, read)
    assert len(read) + 3 * (case == "nlvr_pretrain_ta") == len(original)
    changed = "albef.fusion_model.layers.0.mlp.fc1.weight"
    back = to_state_dict(config, {**converted.state, changed: converted.state[changed] + 1})
    assert not same({name: back[name] for name in read}, read)


def test_layers_of_two_images_alternate():
    original = read_original(path_of("nlvr_finetune")).state
    model = load_model(path_of("nlvr_finetune"), options=options_of("nlvr_finetune"))
    parts = model.albef.fusion_model.layers, model.second_layers, model.teacher.second_layers
    for number in range(12):
        layer = parts[number % 2][number // 2]
        theirs = f"text_encoder.encoder.layer.{6 + number}"
        assert torch.equal(layer.cross_attention.q_proj.weight, original[f"{theirs}.crossattention.self.query.weight"])
        shared = parts[0][number // 2].cross_attention.v_proj.weight
        assert torch.equal(shared, original[f"{theirs}.crossattention.self.value.weight"])
        assert not torch.equal(parts[2][number // 2].mlp.fc1.weight, original[f"{theirs}.intermediate.dense.weight"])
    assert (len(parts[0]), len(parts[1]), parts[1][0].cross_attention.v_proj) == (6, 6, None)
    assert not torch.equal(parts[0][1].cross_attention.v_proj.weight, parts[0][0].cross_attention.v_proj.weight)


@pytest.mark.parametrize("case", [*CASES, *TASKS, "backbone"])
def test_command_lines_there_and_back(case, tmp_path, capsys):
    ours, back, config = tmp_path / "ours", tmp_path / "back.pth", GOLDEN / "albef" / case / "config.json"
    check = ["--check", str(GOLDEN / "albef" / case)] if case in COMPARED else ["--check"]
    from_albef.main(["--checkpoint", str(path_of(case)), "--config", str(config), "--output", str(ours), *check])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("forward")]
    assert [line.split()[1] for line in lines] == COMPARED.get(case, [])
    assert all(float(line.split()[-1]) < 2e-5 for line in lines)
    assert "largest difference 0" in printed and "without a processor: give --vocabulary" in printed
    assert ("left out" in printed) == ("text_proj.bias" in printed) == (case == "nlvr_pretrain_ta")
    assert ("no list of answers" in printed) == (case == "vqa_rank_answer")

    to_original.main([str(ours), "--output", str(back)])
    told = capsys.readouterr().out
    heads = json.loads((ours / "config.json").read_text("utf-8"))["text_config"]["num_attention_heads"]
    assert f"num_attention_heads {heads}, it has 12" in told and ("no momentum copies" in told) == (case == "gradcam")
    found, original = read_original(back).state, read_original(path_of(case)).state
    assert facts_of(found) == facts_of(original)
    for state in (found, original) if case == "nlvr_pretrain_ta" else ():
        assert [state.pop(name).numel() > 0 for name in UNREAD]
    assert same(found, original)
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


def test_a_list_of_answers_is_saved_with_a_model_of_questions(tmp_path, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(115))]
    vocabulary, listed, ours = tmp_path / "vocab.txt", tmp_path / "answer_list.json", tmp_path / "ours"
    vocabulary.write_text("\n".join(words), "utf-8")
    listed.write_text(json.dumps(["word7", "word1 word2 word3", "word7 word9"]), "utf-8")
    config = ["--config", str(GOLDEN / "albef" / "vqa_rank_answer" / "config.json")]
    arguments = [
        "--checkpoint",
        str(path_of("vqa_rank_answer")),
        *config,
        "--answers",
        str(listed),
        "--output",
        str(ours),
    ]
    with pytest.raises(SystemExit):
        from_albef.main(arguments)
    assert "needs --vocabulary" in capsys.readouterr().err and not ours.exists()
    from_albef.main([*arguments, "--vocabulary", str(vocabulary), "--check"])
    assert "3 answers to choose from" in capsys.readouterr().out
    model = VlpAlbefForVisualQuestionAnswering.from_pretrained(ours)
    assert model.config.id2label == {0: "word7", 1: "word1 word2 word3", 2: "word7 word9"}
    assert model.config.label2id["word7 word9"] == 2 and model.answer_ids.shape == (3, 32)
    assert model.answer_ids[:, :6].tolist() == [
        [2, 12, 3, -100, -100, -100],
        [2, 6, 7, 8, 3, -100],
        [2, 12, 14, 3, -100, -100],
    ]
    assert model(torch.tensor([[2, 9, 8]]), torch.ones(1, 3).long(), torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)
    saved = json.loads((ours / "processor_config.json").read_text("utf-8"))
    assert (saved["text_cleaning"], saved["max_words"]) == ("question", 50)

    long = " ".join(["word1"] * 29)
    converted = for_task(*convert_all(read_original(path_of("ve")).state))
    processor = from_albef.build_processor(model.config, vocabulary)
    with pytest.raises(ConversionError, match="VisualEntailment gives no answers"):
        with_answers(converted, ["word1"], processor)
    converted = for_task(*convert_all(read_original(path_of("vqa_rank_answer")).state))
    assert build_model(with_answers(converted, [long, "word2"], processor)).answer_ids.shape == (2, 32)
    with pytest.raises(ConversionError, match="33 tokens"):
        with_answers(converted, [f"{long} word1 word1"], processor)
    for content, said in (
        ('{"word1": 0}', "is not a list of texts"),
        ("[]", "is not a list of texts"),
        ('["word1", " "]', "is not a list of texts"),
        ('["word1", "word2", "word1"]', "record 2, field 'answer': 'word1' stood at 0 already"),
        ("[", "is not JSON"),
    ):
        listed.write_text(content, "utf-8")
        with pytest.raises(ConversionError, match=said):
            read_answers(listed)


# ------------------------------------------------------------------------------------------------ tasks


def test_the_heads_tell_the_task():
    names = {"ve": "entailment", "vqa_rank_answer": "vqa", "nlvr_finetune": "nlvr2", "nlvr_pretrain_ta": "assignment"}
    names |= {"pretrain_alpha04": "pretraining", "gradcam": "retrieval"}
    for case, task in names.items():
        state = read_original(path_of(case)).state
        assert task_of(state) == task_of(convert_all(state)[1]) == task
    whole = for_task(*convert_all(read_original(path_of("pretrain_alpha04")).state), task="mlm")
    assert whole.model_class is VlpAlbefForMaskedLM and "itm_head.weight" in whole.left_out
    back = to_state_dict(whole.config, whole.state)
    again = for_task(*convert_all(back))
    assert again.model_class is VlpAlbefForMaskedLM and same(again.state, whole.state) and not again.left_out


def test_what_is_fixed_in_a_task_is_not_read_from_the_options():
    run = {"yaml": {"momentum": 0.9, "alpha": 0.3, "k_test": 17}}
    entailment, questions, statements, pretraining = (
        infer_config(read_original(path_of(case)).state, run)
        for case in ("ve", "vqa_rank_answer", "nlvr_finetune", "pretrain_alpha04")
    )
    assert entailment.momentum == questions.momentum == statements.momentum == 0.995 != pretraining.momentum
    assert {one.distillation_weight for one in (entailment, questions, statements, pretraining)} == {0.3}
    assert questions.answer_candidates == 17 and pretraining.answer_candidates == 128 and questions.answer_layers == 6
    assert entailment.id2label == {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert statements.id2label == {0: "False", 1: "True"} and statements.num_labels == 2
    counts = [statements.text_config.num_hidden_layers, statements.multimodal_config.num_hidden_layers]
    assert counts == [6, 6] and not infer_config(read_original(path_of("nlvr_pretrain_ta")).state).momentum_teacher
    assert "momentum 0.9, it has 0.995 for this task" in untold_of_task(pretraining, "entailment")
    assert not untold_of_task(entailment, "entailment")


def test_two_images_without_a_head_are_told_by_what_their_layers_share(tmp_path, capsys):
    state = read_original(path_of("nlvr_pretrain_ta")).state
    bare = {name: tensor for name, tensor in state.items() if "ta_head" not in name}
    config, ours, _ = convert_all(bare, options_of("nlvr_pretrain_ta"))
    assert task_of(bare) == "assignment" and not ours["assignment_head.weight"].any()
    whole = convert_all(state, options_of("nlvr_pretrain_ta"))[1]
    assert same({**ours, **{name: whole[name] for name in whole if "assignment" in name}}, whole)
    assert whole["assignment_head.weight"].any()
    model = build_model(for_task(config, ours, []))
    assert "zeros: the file has none" in from_albef.summary(model, [])
    key = "text_encoder.encoder.layer.7.crossattention.self.key.weight"
    assert task_of({**bare, key: bare[key] + 1}) == "model"
    with pytest.raises(ConversionError, match=r"layer\.6\.crossattention.*and.*layer\.7.*differ here"):
        convert_all({**state, key: state[key] + 1})
    odd = {name: tensor for name, tensor in state.items() if "layer.17." not in name}
    with pytest.raises(ConversionError, match="11 layers .* they come in pairs"):
        convert_all(odd)


def test_momentum_copies_of_a_task_need_no_queue():
    state = read_original(path_of("ve")).state
    without = {name: tensor for name, tensor in state.items() if "_m." not in name}
    config, ours, unused = convert_all(without, options_of("ve"))
    assert not config.momentum_teacher and not unused and same(to_state_dict(config, ours), without)
    with pytest.raises(ConversionError, match=r"(?s)ours only.*teacher\.classifier\.fc2\.bias"):
        convert_all({name: tensor for name, tensor in state.items() if name != "cls_head_m.2.bias"})
    state = read_original(path_of("nlvr_pretrain_ta")).state  # a task without copies
    config, _, unused = convert_all({**state, "visual_encoder_m.norm.bias": state["visual_encoder.norm.bias"]})
    assert not config.momentum_teacher and unused == ["visual_encoder_m.norm.bias", *UNREAD]


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
    assert converted.model_class is kind and config.momentum_teacher == copies
    assert sorted(converted.left_out) == (sorted(UNREAD) if kind is VlpAlbefForTextAssignment else [])
    with torch.device("meta"):
        model = kind(config)
    assert {key: tensor.shape for key, tensor in converted.state.items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == trained
    assert model.num_parameters() == WITH_COPIES.get(kind, trained)
    assert (config.vision_config.image_size, config.queue_size, config.projection_dim) == (resolution, 65536, 256)
    named = {"id2label": config.id2label, "label2id": config.label2id}
    assert config == VlpAlbefConfig(vision_config=config.vision_config, momentum_teacher=copies, **named)
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
    undistilled = {"yaml": {"alpha": 0.3, "distill": False}}
    assert infer_config(state, undistilled).distillation_weight == 0.3  # pre-training has no such switch
    behind = {name: tensor for name, tensor in state.items() if ".cls." not in name}
    assert infer_config(behind, undistilled).distillation_weight == 0


@pytest.mark.parametrize(
    ("case", "fields", "said"),
    [
        ("nlvr_finetune", {"shared_image_keys": False}, "shared_image_keys False"),
        ("ve", {"id2label": {0: "no", 1: "yes"}}, "num_labels 2, it takes 3"),
        ("vqa_rank_answer", {"count_first_token_twice": False}, "count_first_token_twice False"),
    ],
)
def test_settings_that_a_task_of_the_released_code_has_not_are_refused(case, fields, said):
    converted = for_task(*convert_all(read_original(path_of(case)).state))
    assert to_state_dict(converted.config, converted.state)
    with pytest.raises(ConversionError, match=said):
        to_state_dict(VlpAlbefConfig(**{**converted.config.to_dict(), **fields}), converted.state)
    assert to_state_dict(VlpAlbefConfig(**{**converted.config.to_dict(), "momentum": 0.5}), converted.state)


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

"""Questions for a model that writes its answers: items, batches, the lists they are read from, and a fine-tuning to its end."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

from hf_vlp.data.readers import read_records
from hf_vlp.data.record import RecordError
from hf_vlp.data.tasks import WrittenAnswerCollator, WrittenAnswers
from hf_vlp.evaluation.tasks import evaluate_vqa
from hf_vlp.inputs.vocabulary import train_wordpiece_tokenizer, without_end_mark
from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.image_processing_albef import VlpAlbefImageProcessor
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForPreTraining
from hf_vlp.models.albef.processing_albef import VlpAlbefProcessor

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = ("red", "green", "blue", "white")
PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def prepare(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def question(number, *answers):
    given = [{"answer": answer, "score": score} for answer, score in answers]
    picture = Image.new("RGB", (32, 32), (40 * number, 0, 0))
    return {"image": picture, "question": f"what is {number}?", "answers": given, "image_id": number}


RECORDS = [
    question(0, ("red", 0.75), ("a dark red", 0.25)),
    question(1),
    question(2, ("blue", 0.0)),
    question(3, ("green", 0.5), ("gone", 0.0)),
]


def build_processor():
    words = ["what is 0 1 2 3 colour of the square in this picture", "a dark red green blue white yes no"]
    tokenizer = without_end_mark(train_wordpiece_tokenizer(3 * words, 200, 25))
    return VlpAlbefProcessor(VlpAlbefImageProcessor(size=32), tokenizer, text_cleaning="question")


def test_a_question_has_all_its_answers_with_their_weights():
    dataset = WrittenAnswers(RECORDS, prepare, progress=False)
    assert len(dataset) == 2 and dataset.report()["unanswered"] == 2
    first, second = dataset[0], dataset[1]
    assert first["text"] == "what is 0?" and first["answers"] == ["red", "a dark red"]
    assert first["answer_weights"].tolist() == [0.75, 0.25]
    # what scores nothing is not learnt
    assert (second["answers"], second["answer_weights"].tolist()) == (["green"], [0.5])
    with pytest.raises(RecordError, match="none of 2 questions has an answer that scores"):
        WrittenAnswers(RECORDS[1:3], prepare, progress=False)
    bad = RECORDS[0] | {"answers": [{"answer": "red", "score": 2}]}
    with pytest.raises(RecordError, match="record 1, field 'answers': the score of answer 0 is 2"):
        WrittenAnswers([RECORDS[0], bad], prepare, progress=False)
    kept = WrittenAnswers([RECORDS[0], bad], prepare, on_bad_record="skip", progress=False)
    assert len(kept) == 1 and kept.report()["skipped"] == 1


def test_the_answers_of_a_batch_follow_one_another_with_their_questions():
    processor, dataset = build_processor(), WrittenAnswers(RECORDS, prepare, progress=False)
    batch = WrittenAnswerCollator(processor)([dataset[1], dataset[0]])
    assert batch["answer_rows"].tolist() == [0, 1, 1] and batch["answer_weights"].tolist() == [0.5, 0.75, 0.25]
    assert batch["answer_ids"].equal(processor.encode_answers(["green", "red", "a dark red"])["answer_ids"])
    assert batch["answer_mask"].sum(1).tolist() == [3, 3, 5] and batch["answer_mask"].dtype == torch.int64
    alone = processor(text=["what is 3?", "what is 0?"])
    assert batch["input_ids"].equal(alone["input_ids"]) and batch["pixel_values"].shape == (2, 3, 32, 32)
    turned = WrittenAnswerCollator(processor)([dataset[0], dataset[1]])
    assert turned["answer_rows"].tolist() == [0, 0, 1] and not turned["answer_ids"].equal(batch["answer_ids"])


# ------------------------------------------------------------------------------------------------ lists


def write_pictures(folder: Path) -> None:
    for name in COLOURS:
        (folder / "vqa").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), name).save(folder / "vqa" / f"{name}.png")
        Image.new("RGB", (20, 32), name).save(folder / f"{name}.png")


def entries():
    """A question about each picture: two annotators of three see its colour; of another data set one is enough."""
    rows = []
    for number, colour in enumerate(COLOURS):
        row = {"image": f"{colour}.png", "question": "what colour is the square?", "question_id": 7 + number}
        rows.append(row | {"dataset": "vqa", "answer": [colour, "no", colour]})
        rows.append(row | {"dataset": "vg", "question": "is it a square?", "question_id": number, "answer": "yes"})
    return rows


def test_lists_of_questions_are_known_by_what_they_hold(tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "lists").mkdir()
    rows = entries()
    (tmp_path / "lists" / "one.json").write_text(json.dumps(rows[:3]))
    (tmp_path / "lists" / "two.json").write_text(json.dumps(rows[3:]))
    needed = ("image", "question", "answers")
    records = read_records(tmp_path / "lists" / "*.json", image_root=tmp_path / "pictures", required=needed)
    assert len(records) == 8 and records["question_id"][:3] == [7, 0, 8]
    assert records[0]["image"].size == (40, 32)  # of the folder that has the data set's name
    assert records[1]["image"].size == (20, 32)  # there is none
    assert records[0]["answers"] == [{"answer": "red", "score": 2 / 3}, {"answer": "no", "score": 1 / 3}]
    assert records[1]["answers"] == [{"answer": "yes", "score": 0.5}]
    two = read_records(tmp_path / "lists" / "two.json", image_root=tmp_path / "pictures", required=needed)
    assert two["question_id"][:] == records["question_id"][3:]
    with pytest.raises(ValueError, match="without splits, split='val'"):
        read_records(tmp_path / "lists" / "two.json", split="val", required=needed)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_records(tmp_path / "lists" / "absent*.json", required=needed)
    plain = [{"question": "what?", "image": "red.png", "more": 1}]
    (tmp_path / "pictures" / "plain.json").write_text(json.dumps(plain))
    assert "more" in read_records(tmp_path / "pictures" / "plain.json", required=("image", "question")).column_names


def test_lists_of_captions_may_mix_one_and_several(tmp_path):
    write_pictures(tmp_path)
    rows = [{"image": "red.png", "caption": "a red one"}, {"image": "blue.png", "caption": ["blue", "a blue one"]}]
    file = tmp_path / "list.json"
    file.write_text(json.dumps(rows))
    records = read_records(file)
    assert records["captions"][:] == [["a red one"], ["blue", "a blue one"]] and records[1]["image"].size == (20, 32)
    assert records["image_id"][:] == ["red.png", "blue.png"]
    file.write_text(json.dumps([{"image": "red.png", "caption": "a red one", "source": "here"}]))
    assert read_records(file)["source"][:] == ["here"]  # a list of one's own keeps what it has


# ------------------------------------------------------------------------------------------------ to the end


@pytest.fixture
def finetune(tmp_path, monkeypatch, capsys):
    """Fine-tunes a tiny pre-trained folder on the lists, in an empty folder; returns what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script
    write_pictures(tmp_path / "pictures")
    Path("questions.json").write_text(json.dumps(entries()))
    Path("asked.json").write_text(json.dumps([{k: v for k, v in row.items() if k != "answer"} for row in entries()]))
    processor = build_processor()
    vision = PART | {"image_size": 32, "patch_size": 16}
    text = PART | {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 32}
    torch.manual_seed(0)
    config = VlpAlbefConfig(
        vision_config=vision,
        text_config=text,
        multimodal_config=PART,
        projection_dim=8,
        queue_size=4,
        answer_layers=1,
        answer_length=8,
    )
    VlpAlbefForPreTraining(config).save_pretrained("runs/first")
    processor.save_pretrained("runs/first")
    recipe = {
        "task": "vqa",
        "model": {"from_pretrained": "runs/first"},
        "data": {
            **dict.fromkeys(("train", "test"), "questions.json"),
            "image_root": "pictures",
            "augmentation": {"name": "random_augment", "scale": [0.5, 1.0]},
        },
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "ramps": {"distillation_weight": {"unit": "steps", "shape": "linear", "at": [0, 2], "values": [0.0, 0.4]}},
        "training": {"steps": 4, "batch_size": 4, "save_every": 2, "log_every": 1, "threads": 1},
    }
    Path("vqa.yaml").write_text(yaml.safe_dump(recipe))

    def run(script, *words):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(sys, "argv", [f"examples/{script}", *words])
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return lambda *words, script="finetune.py": run(
        script, *(("--config", "vqa.yaml") if script == "finetune.py" else ()), *words
    )


def test_a_model_learns_to_write_and_its_folder_answers_from_its_list(finetune):
    shown = finetune("--training.steps", "60", "--save_every", "60")
    assert "8 of 8 records to train on, 5 classes" in shown  # "no" is never the answer of most
    losses = [json.loads(line) for line in Path("runs/vqa/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model, loaded = AutoModelForVisualQuestionAnswering.from_pretrained("runs/vqa", output_loading_info=True)
    assert type(model) is VlpAlbefForVisualQuestionAnswering and not loaded["missing_keys"]
    processor = AutoProcessor.from_pretrained("runs/vqa")
    answers = [model.config.id2label[number] for number in range(5)]
    assert answers == ["red", "yes", "green", "blue", "white"]
    listed = processor.encode_answers(answers)
    assert model.answer_ids[:, :3].equal(listed["answer_ids"]) and model.answer_ids[:, 3:].eq(-100).all()
    records = read_records("questions.json", image_root="pictures", required=("image", "question"))
    report = evaluate_vqa(model, processor, records, progress=False)
    (written,) = json.loads(Path("runs/vqa/results.json").read_text())
    assert report.metrics == pytest.approx(written["metrics"]) and written["task"] == "vqa"
    # "is it a square?" is learnt at once
    assert report.answers[1::2] == 4 * ["yes"] and report.metrics["accuracy"] >= 25.0

    words = ["runs/vqa", "--task", "vqa", "--image-root", "pictures"]
    shown = finetune(*words, "--data", "questions.json", script="evaluate.py")
    assert f"{written['metrics']['accuracy']:.1f} %" in shown
    finetune(*words, "--data", "asked.json", "--submission", "server.json", script="evaluate.py")
    served = json.loads(Path("server.json").read_text())
    expected = [{"question_id": row["question_id"], "answer": answer} for row, answer in zip(entries(), report.answers)]
    assert served == expected
    with pytest.raises(SystemExit, match="has no weights answer_ids of VlpAlbefForVisualQuestionAnswering"):
        finetune("runs/first", *words[1:], "--data", "questions.json", script="evaluate.py")


def test_what_is_written_is_learnt_whatever_there_is_to_choose_from(finetune):
    Path("given.json").write_text(json.dumps(["no", "yes"]))
    finetune("--output", "own")
    finetune("--output", "given", "--data.answers.file", "given.json")
    own, given = (load_file(f"{name}/model.safetensors") for name in ("own", "given"))
    assert {name for name in own if not own[name].equal(given[name])} == {"answer_ids"}
    assert (len(own["answer_ids"]), len(given["answer_ids"])) == (5, 2)
    # it goes on with its answers, or with others
    finetune("--output", "again", "--model.from_pretrained", "given", "--training.steps", "1", "--lr", "0")
    again = load_file("again/model.safetensors")
    moved = {name for name in again if not again[name].equal(given[name])}
    assert again["answer_ids"].equal(given["answer_ids"]) and all(name.startswith("teacher.") for name in moved)
    more = ["--model.from_pretrained", "given", "--minimum_seen", "1", "--training.steps", "1"]
    finetune("--output", "more", *more)
    assert load_file("more/model.safetensors")["answer_ids"].equal(own["answer_ids"])
    Path("long.json").write_text(json.dumps(["yes", 9 * "no "]))
    with pytest.raises(SystemExit, match="data.answers: an answer has 11 tokens, the list has room for 8"):
        finetune("--output", "long", "--data.answers.file", "long.json")
    assert not Path("long").exists()


def test_fine_tuning_goes_on_as_if_it_had_never_stopped(finetune):
    finetune("--output", "whole")
    shutil.copytree("whole", "parts")
    finetune("--output", "parts", "--resume", "parts/checkpoints/step-00000002")
    whole, parts, earlier = (
        load_file(f"{name}/model.safetensors") for name in ("whole", "parts", "whole/checkpoints/step-00000002")
    )
    assert all(tensor.equal(parts[name]) for name, tensor in whole.items())
    assert any(not tensor.equal(earlier[name]) for name, tensor in whole.items())

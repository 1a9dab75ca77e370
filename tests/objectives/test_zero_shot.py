"""Zero-shot classification against the stored outputs of the original procedure and by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from hf_vlp.evaluation.zero_shot import (
    build_classifier,
    classifier_from_features,
    classify,
    evaluate_zero_shot,
    fill_template,
    mean_per_class_accuracy,
    top_k_accuracy,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "clip" / "zeroshot"


def test_logits_and_accuracies_of_the_stored_run():
    outputs, inputs = load_file(GOLDEN / "outputs.safetensors"), load_file(GOLDEN / "inputs.safetensors")
    logits = classify(outputs["image_features"], outputs["classifier"])
    torch.testing.assert_close(logits, outputs["logits"], atol=1.1e-4, rtol=0)
    torch.testing.assert_close(logits.softmax(dim=1), outputs["probs"], atol=2e-5, rtol=0)
    assert torch.equal(logits.topk(5, dim=1).indices, outputs["top5_indices"])
    assert top_k_accuracy(logits, inputs["target"], 1) == pytest.approx(float(outputs["top1_percent"]), abs=1e-4)
    assert top_k_accuracy(logits, inputs["target"], 5) == pytest.approx(float(outputs["top5_percent"]), abs=1e-4)
    assert (classify(outputs["image_features"], outputs["classifier"], scale=1.0) - logits).abs().max() > 1


def test_each_prompt_is_normalised_before_the_mean():
    features = torch.tensor([[[3.0, 0.0], [0.0, 0.1]], [[0.0, 2.0], [0.0, 5.0]]])
    expected = torch.tensor([[0.5**0.5, 0.0], [0.5**0.5, 1.0]])
    torch.testing.assert_close(classifier_from_features(features), expected)
    naive = normalize(features.mean(dim=1), dim=1).T
    assert (naive - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"\[K, T, E\]"):
        classifier_from_features(features[0])


class Model(torch.nn.Module):
    """Text features depend on the words alone, image features are the picture's."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))

    def get_text_features(self, input_ids, attention_mask):
        return (self.table[input_ids] * attention_mask[..., None]).sum(dim=1)

    def get_image_features(self, pixel_values):
        return pixel_values


class Processor:
    words: dict = {}

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        lines = [[self.words.setdefault(word, len(self.words)) for word in line.split()] for line in text]
        longest = max(map(len, lines))
        mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in lines])
        return {
            "input_ids": torch.tensor([line + [0] * (longest - len(line)) for line in lines]),
            "attention_mask": mask,
        }


def test_classifier_from_names_is_the_one_from_features():
    model, processor = Model(), Processor()
    templates = ["a photo of a {}.", "{} , drawn", "art : {label}"]
    names = ["cat", "very big dog", "bird"]
    prompts = [[fill_template(template, name) for template in templates] for name in names]
    assert prompts[1] == ["a photo of a very big dog.", "very big dog , drawn", "art : very big dog"]
    features = torch.stack([model.get_text_features(**processor(text=row)) for row in prompts]).detach()
    found = build_classifier(model, processor, names, templates, batch_size=2, progress=False)
    torch.testing.assert_close(found, classifier_from_features(features))
    torch.testing.assert_close(found.norm(dim=0), torch.ones(3))
    assert not torch.allclose(found, build_classifier(model, processor, names, templates[:1], progress=False))


def test_several_names_of_a_class_are_averaged_together():
    model, processor = Model(), Processor()
    found = build_classifier(model, processor, [["cat", "kitten"], "dog"], ["a {}", "the {}"], progress=False)
    texts = ["a cat", "the cat", "a kitten", "the kitten"]
    features = torch.cat([model.get_text_features(**processor(text=[text])) for text in texts]).detach()
    torch.testing.assert_close(found[:, :1], classifier_from_features(features[None]))


def test_names_and_templates_that_cannot_be_used():
    assert fill_template("{0.__class__} {}", "x") == "{0.__class__} x"  # nothing but the name is filled in
    with pytest.raises(ValueError, match="no place for the class name"):
        fill_template("a photo", "cat")
    for names, templates in (([], ["{}"]), (["a"], []), (["a", " "], ["{}"]), ([[]], ["{}"])):
        with pytest.raises(ValueError, match="at least one|no name"):
            build_classifier(Model(), Processor(), names, templates)


def test_accuracies_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    labels = torch.tensor([0, 2, 0, 1])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3, 9)] == [50.0, 75.0, 100.0, 100.0]
    assert mean_per_class_accuracy(logits, labels) == pytest.approx(100 / 3)  # 2 of 2, 0 of 1, 0 of 1
    assert mean_per_class_accuracy(logits[:3], labels[:3]) == 50.0  # class 1 does not occur
    with pytest.raises(ValueError, match="classes from 0 to 2"):
        top_k_accuracy(logits, labels + 1)
    with pytest.raises(ValueError, match=r"\[N, K\] and \[N\]"):
        mean_per_class_accuracy(logits, labels[:2])


def test_evaluation_of_records():
    model, processor = Model(), Processor()
    names = ["cat", "dog", "bird"]
    classifier = build_classifier(model, processor, names, ["{}"], progress=False)
    labels = [2, 0, 1, 1, 2]
    records = [{"image": 7 * classifier[:, label]} for label in labels]
    report = evaluate_zero_shot(model, processor, records, labels, names, ["{}"], batch_size=2, progress=False)
    assert report.metrics == {"top1": 100.0, "top5": 100.0, "mean_per_class": 100.0}
    assert report.counts == {"images": 5, "classes": 3, "templates": 1} and "mean per class" in report.table()
    wrong = evaluate_zero_shot(model, processor, records, [0, 1, 2, 2, 0], names, ["{}"], progress=False)
    assert wrong.metrics["top1"] == 0.0 and wrong.metrics["top5"] == 100.0
    with pytest.raises(ValueError, match="one label each"):
        evaluate_zero_shot(model, processor, records, labels[:2], names)

"""ALBEF's losses and answers at other sizes and options than the golden ones, against a plain second implementation on torch alone.

It reads one text without padding with one image at a time, in float64; weights have our names, sums and draws are those of the paper.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_vlp.models.albef.answering_albef import VlpAlbefForVisualQuestionAnswering
from hf_vlp.models.albef.configuration_albef import VlpAlbefConfig
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForImageTextRetrieval, VlpAlbefForPreTraining
from hf_vlp.models.albef.tasks_albef import (
    VlpAlbefForTextAssignment,
    VlpAlbefForVisualEntailment,
    VlpAlbefForVisualReasoning,
)

VOCABULARY, START, END, PATCH, GRID = 31, 2, 3, 4, 3
VISION_HEADS, TEXT_HEADS, MOMENTUM, KEPT = 3, 4, 0.9, 7
LENGTHS = (6, 3, 9, 4, 7)
ITC, ITM, MLM = 0.7, 1.3, 0.5  # weights of the terms


def build(model_class: type, **fields) -> torch.nn.Module:
    """In training mode, of random weights in every place, the momentum copy's others than the model's."""
    sizes = {"hidden_size": 24, "num_attention_heads": TEXT_HEADS, "intermediate_size": 20}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision = {"hidden_size": 18, "num_attention_heads": VISION_HEADS, "intermediate_size": 30, "num_hidden_layers": 3}
    config = VlpAlbefConfig(
        vision_config=vision | {"image_size": PATCH * GRID, "patch_size": PATCH},
        text_config=sizes | {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "max_position_embeddings": 11},
        multimodal_config=sizes | {"num_hidden_layers": 2},
        projection_dim=10,
        queue_size=KEPT,
        momentum=MOMENTUM,
        itc_weight=ITC,
        itm_weight=ITM,
        mlm_weight=MLM,
        **{"answer_layers": 3, "answer_length": 6, "answer_candidates": 4, "num_labels": 7} | fields,
    )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim:
                one = "norm" in name and name.endswith("weight")
                parameter.copy_(0.25 * torch.randn_like(parameter) + one)
    return model.train()


def batch(rows: int = 5, images: tuple[int, ...] = (), grid: tuple[int, int] = (GRID, GRID)) -> dict:
    draw = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:rows, None]).long()
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=draw)
    ids[:, 0] = START
    pixels = torch.randn(rows, *images, 3, PATCH * grid[0], PATCH * grid[1], generator=draw)
    return {"input_ids": ids * mask, "attention_mask": mask, "pixel_values": pixels}


class Paper:
    """The formulas of the model over weights under our names."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Paper":
        """With leaves of its own, one for tensors that are tied."""
        leaves, weights = {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            copy = parameter.detach().double().clone().requires_grad_(parameter.requires_grad)
            weights[name] = leaves.setdefault(id(parameter), copy)
        return cls(weights)

    def teacher(self) -> "Paper":
        """The momentum copy after its move in this step."""
        copies = {name: value for name, value in self.weights.items() if name.startswith("teacher.")}
        moved = {}
        for name, value in copies.items():
            own = name.removeprefix("teacher.")
            moved[own] = MOMENTUM * value + (1 - MOMENTUM) * self.weights[own].detach()
        return Paper(moved)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
        spread = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return spread * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, name: str, x, others, heads: int = TEXT_HEADS, causal: bool = False, keys: str | None = None):
        """`keys`: the attention whose projections make keys and values, where it is another."""
        queries, sources = self.linear(f"{name}.q_proj", x), (f"{keys or name}.{part}_proj" for part in "kv")
        projected = queries, *(self.linear(source, others) for source in sources)
        mixed = []
        for q, k, v in zip(*(states.chunk(heads, dim=1) for states in projected), strict=True):
            scores = q @ k.T / math.sqrt(q.shape[1])
            if causal:
                scores = scores + torch.full_like(scores, -math.inf).triu(1)
            mixed.append(scores.softmax(-1) @ v)
        return self.linear(f"{name}.out_proj", torch.cat(mixed, dim=1))

    def feed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(f"{name}.fc1", x)
        return self.linear(f"{name}.fc2", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))

    def layer(self, name: str, x, others=None, causal: bool = False, keys: str | None = None) -> torch.Tensor:
        x = self.norm(f"{name}.attention_norm", x + self.attend(f"{name}.attention", x, x, causal=causal))
        if others is not None:
            cross = self.attend(f"{name}.cross_attention", x, others, keys=keys and f"{keys}.cross_attention")
            x = self.norm(f"{name}.cross_attention_norm", x + cross)
        return self.norm(f"{name}.output_norm", x + self.feed(f"{name}.mlp", x))

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """[3, H, W] -> [1 + P, D]."""
        name = "albef.vision_model"
        kernel = self.weights[f"{name}.embeddings.patch_embedding.weight"].flatten(1)
        patches = pixels.double().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, h, w, PATCH, PATCH]
        height, width = patches.shape[1:3]
        tokens = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1) @ kernel.T
        tokens = tokens + self.weights[f"{name}.embeddings.patch_embedding.bias"]
        table = self.weights[f"{name}.embeddings.position_embedding"]
        places = table[1:]
        if (height, width) != (GRID, GRID):
            square = places.T.reshape(1, -1, GRID, GRID)
            places = F.interpolate(square, (height, width), mode="bicubic", align_corners=False)[0].flatten(1).T
        summary = self.weights[f"{name}.embeddings.class_embedding"] + table[0]
        x = torch.cat([summary[None], tokens + places])
        for number in range(3):
            block = f"{name}.encoder.layers.{number}"
            normed = self.norm(f"{block}.norm1", x, 1e-6)
            x = x + self.attend(f"{block}.attention", normed, normed, VISION_HEADS)
            x = x + self.feed(f"{block}.mlp", self.norm(f"{block}.norm2", x, 1e-6))
        return self.norm(f"{name}.norm", x, 1e-6)

    def embed(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        words, places, kinds = (
            self.weights[f"{name}.{table}_embeddings.weight"] for table in ("word", "position", "token_type")
        )
        return self.norm(f"{name}.norm", words[ids] + places[: len(ids)] + kinds[0])

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer("albef.text_model.encoder.layers.0", self.embed("albef.text_model.embeddings", ids))

    def fuse(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        for number in range(2):
            text = self.layer(f"albef.fusion_model.layers.{number}", text, image)
        return text

    def fuse_two(self, text: torch.Tensor, first: torch.Tensor, second: torch.Tensor, shared: bool) -> torch.Tensor:
        for number in range(2):
            own = f"albef.fusion_model.layers.{number}"
            text = self.layer(own, text, first)
            text = self.layer(f"second_layers.{number}", text, second, keys=own if shared else None)
        return text[0]

    def unit(self, name: str, states: torch.Tensor) -> torch.Tensor:
        projected = self.linear(f"albef.{name}_projection", states[0])
        return projected / projected.norm()

    def words(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Logits of the head `name` over the vocabulary."""
        return self.linear(f"{name}.decoder", self.norm(f"{name}.norm", F.gelu(self.linear(f"{name}.dense", states))))

    def classes(self, state: torch.Tensor) -> torch.Tensor:
        return self.linear("classifier.fc2", self.linear("classifier.fc1", state).clamp(min=0))

    def write(self, ids: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Logits [La, V] behind every word of an answer to a question that was read."""
        x = self.embed("answer_decoder.embeddings", ids)
        for number in range(3):
            x = self.layer(f"answer_decoder.layers.{number}", x, question, causal=True)
        return self.words("answer_decoder.head", x)


def texts_of(inputs: dict, name: str = "input_ids") -> list[torch.Tensor]:
    return [ids[: int(mask.sum())] for ids, mask in zip(inputs[name], inputs["attention_mask"], strict=True)]


def soft(hard: torch.Tensor, logits: torch.Tensor, teacher_logits: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """Cross-entropy of one row of `logits` with the distribution `hard` and the teacher's."""
    q = hard.double() if not alpha else alpha * teacher_logits.softmax(-1) + (1 - alpha) * hard
    return -(q.detach() * logits.log_softmax(-1)).sum()


def same_gradients(model, paper: Paper, loss: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether the loss `found` and its gradients are the paper's."""
    model.zero_grad()
    found.backward()
    loss.backward()
    pairs = [
        (own.grad, paper.weights[name].grad) for name, own in model.named_parameters() if not name.startswith("teacher")
    ]
    pairs = [(own, other) for own, other in pairs if own is not None or other is not None]
    largest = max(float(other.norm()) for _, other in pairs)
    near = all(float((own - other).norm()) < 1e-4 * float(other.norm()) + 1e-5 * largest for own, other in pairs)
    return near and abs(float(found.detach()) - float(loss.detach())) < 1e-4


def test_other_gradients_of_an_equal_loss_are_seen():
    model = torch.nn.Linear(3, 2)
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))

    def losses() -> tuple:
        paper = Paper.of(model)
        return paper, (paper.weights["weight"] @ x.double() + paper.weights["bias"]).square().sum()

    assert same_gradients(model, *losses(), model(x).square().sum())
    nudge = 0.01 * (model.bias - model.bias.detach()).sum()
    assert not same_gradients(model, *losses(), model(x).square().sum() + nudge)
    assert not same_gradients(model, *losses(), model(x).square().sum() + 0.01)


# Contrast, matching, masked words


def drawn(similarities: torch.Tensor, impossible: list[bool], number: float) -> int:
    """A column in proportion to the softmax of the row, without the impossible ones."""
    weights = [0.0 if no else float(w) for w, no in zip(similarities.softmax(-1), impossible, strict=True)]
    reached = 0.0
    for column, weight in enumerate(weights):
        reached += weight
        if reached > number * sum(weights):
            return column
    raise AssertionError("no column is possible")


def aligned(
    paper: Paper, inputs: dict, queue: dict, alpha: float, targets: str, limits=(0, math.inf), masked: bool = True
) -> tuple[torch.Tensor, ...]:
    """Loss of each term, and the momentum features of images and of texts."""
    with torch.no_grad():
        paper.weights["temperature.weight"].clamp_(*limits)
    teacher, temperature = paper.teacher(), paper.weights["temperature.weight"]
    texts, ids = texts_of(inputs), inputs["image_ids"].tolist()
    count, owners = len(texts), ids + queue["image_ids"].tolist()

    def encode(model: Paper) -> tuple[list, ...]:
        image, text = [model.image(pixels) for pixels in inputs["pixel_values"]], [model.text(t) for t in texts]
        units = [model.unit("visual", x) for x in image], [model.unit("text", x) for x in text]
        return image, text, *units

    image, text, images, words = encode(paper)
    image_m, _, images_m, words_m = encode(teacher)
    keys = {
        "text": [*words_m, *queue["text_features"].double()],
        "image": [*images_m, *queue["image_features"].double()],
    }
    itc, rows = 0.0, {}
    for side, own, own_m, others in (("image", images, images_m, "text"), ("text", words, words_m, "image")):
        for b in range(count):
            alike = [k == b or (owners[k] == ids[b] != -100) for k in range(len(owners))]
            counted = [k for k in range(len(owners)) if targets != "exclude" or k == b or not alike[k]]
            s = torch.stack([own[b] @ key.detach() / temperature for key in keys[others]])
            s_m = torch.stack([own_m[b] @ key for key in keys[others]]).detach() / temperature.detach()
            y = torch.tensor([float(alike[k] if targets == "identity" else k == b) for k in counted])
            itc = itc + soft(y / y.sum(), s[counted], s_m[counted], alpha) / count / 2
            rows[side, b] = s[:count].detach(), [alike[k] if targets != "plain" else k == b for k in range(count)]

    pairs = [(b, b, 1) for b in range(count)]
    draws = inputs["negative_draws"].tolist()
    pairs += [(b, drawn(*rows["text", b], draws[b][0]), 0) for b in range(count)]
    pairs += [(drawn(*rows["image", b], draws[b][1]), b, 0) for b in range(count)]
    logits = torch.stack([paper.linear("itm_head", paper.fuse(text[t], image[i])[0]) for t, i, _ in pairs])
    itm = F.cross_entropy(logits, torch.tensor([label for *_, label in pairs]))
    mlm = []
    for b, hidden in enumerate(texts_of(inputs, "mlm_input_ids") if masked else []):
        labels = inputs["mlm_labels"][b]
        logits = paper.words("mlm_head", paper.fuse(paper.text(hidden), image[b]))
        logits_m = teacher.words("mlm_head", teacher.fuse(teacher.text(hidden), image_m[b]))
        for place in labels.ne(-100).nonzero()[:, 0]:
            hard = F.one_hot(labels[place], VOCABULARY)
            mlm.append(soft(hard, logits[place], logits_m[place], alpha))
    return itc, itm, sum(mlm) / max(1, len(mlm)), torch.stack(images_m), torch.stack(words_m)


def pairs_to_align(rows: int) -> dict:
    inputs, draw = batch(rows), torch.Generator().manual_seed(4)
    hidden = (torch.rand(inputs["input_ids"].shape, generator=draw) < 0.4) & inputs["attention_mask"].bool()
    hidden[:, 0] = False
    inputs["mlm_input_ids"] = torch.where(hidden, 4, inputs["input_ids"])
    inputs["mlm_labels"] = torch.where(hidden, inputs["input_ids"], -100)
    inputs["image_ids"] = torch.tensor([8, 9, 8, -100, 11])[:rows]
    return inputs | {"negative_draws": torch.rand(rows, 2, generator=draw)}


def queue_of(model: torch.nn.Module, position: int = 5) -> dict[str, torch.Tensor]:
    """Fills and copies the queue, in which are images of the batch and unknown ones."""
    model.queue.image_ids.copy_(torch.tensor([9, -100, 8, 8, -100, 12, 11]))
    model.queue.position.fill_(position)
    return {name: tensor.clone() for name, tensor in model.queue.named_buffers()}


@pytest.mark.parametrize("targets", ["identity", "exclude", "plain"])
@pytest.mark.parametrize(("rows", "alpha", "temperature"), [(5, 0.4, 0.07), (3, 0.4, 0.8), (5, 0.0, 0.0003)])
def test_pre_training(targets, rows, alpha, temperature):
    fields = {"contrastive_targets": targets, "distillation_weight": alpha}
    model, inputs = build(VlpAlbefForPreTraining, **fields), pairs_to_align(rows)
    model.temperature.weight.data.fill_(temperature)
    paper, queue = Paper.of(model), queue_of(model)
    itc, itm, mlm, images, texts = aligned(paper, inputs, queue, alpha, targets, limits=(0.001, 0.5))
    output = model(**inputs)
    for name, expected in (("itc", itc), ("itm", itm), ("mlm", mlm)):
        assert abs(output.losses[name].item() - expected.item()) < 2e-4 * max(1, expected.item()), name
    if temperature > 0.001:  # else contrast is of thousands of units and rounds
        assert same_gradients(model, paper, ITC * itc + ITM * itm + MLM * mlm, output.loss)
    places = [(5 + row) % KEPT for row in range(rows)]
    for found, expected, before in (
        (model.queue.image_features, images, queue["image_features"]),
        (model.queue.text_features, texts, queue["text_features"]),
    ):
        assert torch.allclose(found[places].double(), expected, atol=1e-5)
        assert not torch.allclose(before[places].double(), expected, atol=1e-2)
        rest = [row for row in range(KEPT) if row not in places]
        assert torch.equal(found[rest], before[rest])
    assert int(model.queue.position) == (5 + rows) % KEPT and torch.equal(
        model.queue.image_ids[places], inputs["image_ids"]
    )


def test_pre_training_of_other_options_is_another():
    model, inputs = build(VlpAlbefForPreTraining, distillation_weight=0.4), pairs_to_align(5)
    queue = queue_of(model)
    papers = {
        name: aligned(Paper.of(model), inputs, queue, **options)[:3]
        for name, options in {
            "same": {"alpha": 0.4, "targets": "identity"},
            "weight": {"alpha": 0.2, "targets": "identity"},
            "exclude": {"alpha": 0.4, "targets": "exclude"},
            "plain": {"alpha": 0.4, "targets": "plain"},
            "temperature": {"alpha": 0.4, "targets": "identity", "limits": (0.2, 0.5)},
        }.items()
    }
    found = model(**inputs).losses
    differ = {
        name: [abs(found[term].item() - value.item()) > 1e-3 for term, value in zip(found, values, strict=True)]
        for name, values in papers.items()
    }
    assert differ["same"] == [False, False, False]
    assert differ["weight"] == [True, False, True]
    assert all(differ[name][0] and not differ[name][2] for name in ("exclude", "plain", "temperature"))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_retrieval(alpha):
    model, inputs = build(VlpAlbefForImageTextRetrieval, distillation_weight=alpha), pairs_to_align(5)
    inputs = {name: value for name, value in inputs.items() if not name.startswith("mlm")}
    model.temperature.weight.data.fill_(0.8)  # never held between limits
    queue, paper, other = queue_of(model), Paper.of(model), Paper.of(model)
    itc, itm, *_ = aligned(paper, inputs, queue, alpha, "identity", masked=False)
    held, *_ = aligned(other, inputs, queue, alpha, "identity", limits=(0.001, 0.5), masked=False)
    loss = model(**inputs).loss
    assert abs(loss.item() - (held + itm).item()) > 1e-3
    assert same_gradients(model, paper, itc + itm, loss)


# Tasks


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_visual_entailment_of_images_of_another_size(alpha):
    model = build(VlpAlbefForVisualEntailment, num_labels=3, distillation_weight=alpha)
    inputs, labels, paper = batch(grid=(2, 5)), torch.tensor([2, 0, 1, 1, 2]), Paper.of(model)
    teacher, texts = paper.teacher(), texts_of(inputs)

    def logits(of: Paper, row: int) -> torch.Tensor:
        return of.classes(of.fuse(of.text(texts[row]), of.image(inputs["pixel_values"][row]))[0])

    rows = [
        soft(F.one_hot(labels[row], 3), logits(paper, row), logits(teacher, row).detach(), alpha) for row in range(5)
    ]
    output = model(**inputs, labels=labels)
    assert torch.allclose(output.logits.double(), torch.stack([logits(paper, row) for row in range(5)]), atol=1e-4)
    assert abs(model(**inputs, labels=labels.flip(0)).loss.item() - output.loss.item()) > 1e-3
    assert same_gradients(model, paper, sum(rows) / 5, output.loss)


@pytest.mark.parametrize("shared", [True, False])
def test_reasoning_over_two_images(shared):
    model = build(VlpAlbefForVisualReasoning, shared_image_keys=shared)
    inputs, labels, paper = batch(images=(2,)), torch.tensor([1, 0, 1, 1, 0]), Paper.of(model)
    texts, pixels = texts_of(inputs), inputs["pixel_values"]

    def logits(of: Paper, row: int, first: int = 0) -> torch.Tensor:
        images = of.image(pixels[row, first]), of.image(pixels[row, 1 - first])
        return of.classes(of.fuse_two(of.text(texts[row]), *images, shared))

    teacher = paper.teacher()
    rows = [soft(F.one_hot(labels[row], 2), logits(paper, row), logits(teacher, row).detach(), 0.4) for row in range(5)]
    output = model(**inputs, labels=labels)
    swapped = torch.stack([logits(paper, row, first=1) for row in range(5)])
    assert not torch.allclose(output.logits.double(), swapped, atol=1e-3)
    assert same_gradients(model, paper, sum(rows) / 5, output.loss)


@pytest.mark.parametrize("shared", [True, False])
def test_text_assignment(shared):
    model = build(VlpAlbefForTextAssignment, shared_image_keys=shared)
    inputs, paper = batch(), Paper.of(model)
    draws = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    draws[:3, :2] = torch.tensor([[0.9, 0.8], [0.5, 0.2], [0.1, 0.6]])
    images = [paper.image(pixels) for pixels in inputs["pixel_values"]]
    units = torch.stack([paper.unit("visual", image).detach() for image in images])
    losses, swapped = [], []
    for row, (ids, draw) in enumerate(zip(texts_of(inputs), draws.tolist(), strict=True)):
        likeness, impossible = units @ units[row] / 0.07, [other == row for other in range(5)]
        one = drawn(likeness, impossible, draw[2])
        impossible[one] = True
        two = drawn(likeness, impossible, draw[3])
        first, second, label = (row, one, 0) if draw[1] > 0.5 else (one, row, 1)
        if draw[0] <= 1 / 3:
            first, second, label = one, two, 2
        for found, pair in ((losses, (first, second)), (swapped, (second, first))):
            state = paper.fuse_two(paper.text(ids), *(images[index] for index in pair), shared)
            found.append(-paper.linear("assignment_head", state).log_softmax(-1)[label])
    loss = model(**inputs, assignment_draws=draws).loss
    assert abs(loss.item() - sum(swapped).item() / 5) > 1e-3
    assert same_gradients(model, paper, sum(losses) / 5, loss)
    assert model.albef.visual_projection.weight.grad is None


def answers(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """A start token, words and an end token; the first words differ."""
    draw = torch.Generator().manual_seed(6)
    firsts = torch.randperm(VOCABULARY - 4, generator=draw)[: len(lengths)] + 4
    found = [torch.randint(4, VOCABULARY, (length,), generator=draw) for length in lengths]
    for ids, first in zip(found, firsts, strict=True):
        ids[0], ids[1], ids[-1] = START, first, END
    return found


def padded(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return {"answer_ids": ids, "answer_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_answers_are_learnt(alpha):
    model = build(VlpAlbefForVisualQuestionAnswering, distillation_weight=alpha)
    inputs, learnt, paper = batch(3), answers((5, 3, 6, 4, 3)), Paper.of(model)
    rows, weights = torch.tensor([0, 2, 0, 0, 1]), torch.tensor([0.6, 1.0, 0.3, 0.1, 0.5])
    teacher, texts = paper.teacher(), texts_of(inputs)

    def read(of: Paper, row: int) -> torch.Tensor:
        return of.fuse(of.text(texts[row]), of.image(inputs["pixel_values"][row]))

    questions = [(read(paper, row), read(teacher, row)) for row in range(3)]
    loss = unweighed = 0.0
    for ids, row, weight in zip(learnt, rows.tolist(), weights.double(), strict=True):
        logits, logits_m = paper.write(ids, questions[row][0]), teacher.write(ids, questions[row][1]).detach()
        words = [
            soft(F.one_hot(ids[place + 1], VOCABULARY), logits[place], logits_m[place], alpha)
            for place in range(len(ids) - 1)
        ]
        loss, unweighed = loss + weight * sum(words) / 3, unweighed + sum(words) / 3
    output = model(**inputs, **padded(learnt), answer_weights=weights, answer_rows=rows)
    assert abs(output.loss.item() - unweighed.item()) > 1e-3
    assert same_gradients(model, paper, loss, output.loss)


@torch.no_grad()
@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("lengths", [(4, 3, 6, 5, 3, 4, 6), (3,) * 7])
def test_answers_are_ranked(twice, lengths):
    model = build(VlpAlbefForVisualQuestionAnswering, count_first_token_twice=twice).eval()
    listed, inputs, paper = answers(lengths), batch(3), Paper.of(model)
    model.set_answers(*padded(listed).values())
    logits = model(**inputs).logits
    for row, ids in enumerate(texts_of(inputs)):
        question = paper.fuse(paper.text(ids), paper.image(inputs["pixel_values"][row]))
        first = paper.write(torch.tensor([START]), question)[0].log_softmax(-1)
        best = sorted(range(7), key=lambda answer: -first[listed[answer][1]])[:4]
        assert logits[row].gt(torch.finfo(logits.dtype).min).nonzero()[:, 0].tolist() == sorted(best)
        for answer in best:
            written = listed[answer]
            behind = paper.write(written, question)[:-1].log_softmax(-1)
            score = behind[range(len(written) - 1), written[1:]].sum()
            other = score + first[written[1]] * (not twice)
            score = score + first[written[1]] * twice
            assert abs(logits[row, answer].item() - score.item()) < 1e-4
            assert abs(logits[row, answer].item() - other.item()) > 1e-2

import copy

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_vlp.layers.initialization import InitializesEveryModule
from hf_vlp.momentum.queue import FeatureQueue
from hf_vlp.momentum.teacher import MomentumTeacher
from hf_vlp.objectives.momentum_contrast import momentum_contrastive_loss


class Tied(nn.Module):
    """An embedding and a decoder of the same weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.words.weight
        self.register_buffer("seen", torch.zeros(2))


def parts(seed=0):
    torch.manual_seed(seed)
    return {"vision": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "text": Tied()}


def moved(students):
    """Everything of the students, parameters and buffers, somewhere else."""
    for tensor in {t.data_ptr(): t for part in students.values() for t in part.state_dict().values()}.values():
        tensor.copy_(tensor + 1)


def states(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# The teacher


def test_a_new_teacher_is_a_copy_without_gradients():
    students = parts()
    teacher = MomentumTeacher(**students)
    for name, student in students.items():
        own = getattr(teacher, name)
        assert type(own) is type(student) and own is not student
        for key, value in student.state_dict().items():
            assert torch.equal(own.state_dict()[key], value)
            assert own.state_dict()[key].data_ptr() != value.data_ptr()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for part in students.values() for parameter in part.parameters())
    assert teacher.text.decoder.weight is teacher.text.words.weight


def test_tensors_shared_by_two_parts_are_shared_by_their_copies():
    one = nn.Linear(3, 3)
    teacher = MomentumTeacher(a=nn.Sequential(one), b=nn.Sequential(one, nn.ReLU()))
    assert teacher.a[0].weight is teacher.b[0].weight
    assert teacher.a[0].weight is not one.weight
    apart = MomentumTeacher(a=nn.Sequential(one), b=nn.Sequential(copy.deepcopy(one)))
    assert apart.a[0].weight is not apart.b[0].weight


def test_an_update_by_hand():
    student = nn.Linear(2, 1)
    teacher = MomentumTeacher(0.75, head=student)
    nn.init.constant_(teacher.head.weight, 4.0)
    nn.init.constant_(student.weight, 8.0)
    teacher.update(head=student)
    assert teacher.head.weight.tolist() == [[5.0, 5.0]]
    teacher.update(head=student)
    assert teacher.head.weight.tolist() == [[5.75, 5.75]]
    assert student.weight.tolist() == [[8.0, 8.0]]


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.995, 1.0])
def test_an_update_moves_every_parameter_once_and_no_buffer(momentum):
    students = parts()
    teacher = MomentumTeacher(momentum, **students)
    before = states(teacher)
    moved(students)
    teacher.update(**students)
    buffers = {name for name, _ in teacher.named_buffers()}
    assert {"vision.1.running_mean", "text.seen"} < buffers
    for name, value in teacher.state_dict().items():
        if name in buffers:
            assert torch.equal(value, before[name])
        else:
            torch.testing.assert_close(value, before[name] + (1 - momentum))  # a shared one moved twice goes further
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_step_of_the_student_leaves_the_teacher_alone():
    students = parts()
    teacher = MomentumTeacher(**students)
    before = states(teacher)
    model = nn.ModuleDict({**students, "teacher": teacher})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        target = teacher.vision(torch.randn(4, 4))
    (students["vision"](torch.randn(4, 4)) - target).square().sum().backward()
    weight = students["vision"][0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(students["vision"][0].weight, weight)
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


def test_a_copy_has_the_parameters_and_buffers_of_the_students():
    students = parts()
    teacher = MomentumTeacher(**students)
    moved(students)
    assert not torch.equal(teacher.text.words.weight, students["text"].words.weight)
    teacher.copy_(**students)
    for name, student in students.items():
        for key, value in student.state_dict().items():
            assert torch.equal(getattr(teacher, name).state_dict()[key], value)
    moved(students)  # a copy and no view
    assert not torch.equal(teacher.text.words.weight, students["text"].words.weight)


def test_what_does_not_fit_is_named():
    students = parts()
    teacher = MomentumTeacher(**students)
    before = states(teacher)
    with pytest.raises(ValueError, match="the teacher has copies of vision, text, but was given vision: give the same"):
        teacher.update(vision=students["vision"])
    with pytest.raises(ValueError, match="was given nothing"):
        teacher.copy_()
    wider = parts() | {"vision": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))}
    with pytest.raises(ValueError, match=r"vision: 0\.weight, 0\.bias, 1\.weight, 1\.bias of the teacher and of the"):
        teacher.update(**wider)
    other = parts()
    other["text"].more = nn.Linear(1, 1, bias=False)
    del other["text"].words
    with pytest.raises(ValueError, match=r"text: words\.weight, more\.weight of"):
        teacher.update(**other)
    other = parts()
    other["text"].register_buffer("seen", torch.zeros(3))
    with pytest.raises(ValueError, match="text: seen of"):
        teacher.copy_(**other)
    teacher.update(**other)  # which reads no buffer
    with pytest.raises(ValueError, match="momentum must be from 0 to 1, got 1.5"):
        MomentumTeacher(1.5, **students)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_in_a_loop_that_announces_no_steps_it_is_always_due():
    students = parts()
    teacher = MomentumTeacher(**students)
    for _ in range(3):
        assert teacher.due
        teacher.update(**students)
    assert teacher.due


def test_after_an_announced_step_it_is_due_once():
    students = parts()
    teacher = MomentumTeacher(**students)
    for _ in range(2):
        teacher.before_step()
        assert teacher.due and teacher.due  # asking is no updating
        teacher.update(**students)
        assert not teacher.due
        teacher.update(**students)
        assert not teacher.due
    teacher.before_step()
    teacher.before_step()
    teacher.update(**students)
    assert not teacher.due
    assert not any("due" in name for name in teacher.state_dict())


class Config(PretrainedConfig):
    model_type = "taught"


class Taught(InitializesEveryModule, PreTrainedModel):
    """A model with a teacher and a queue, as transformers builds, saves and loads it."""

    config_class = Config
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.teacher = MomentumTeacher(0.5, head=self.head, norm=self.norm)
        self.queue = FeatureQueue(4, 3)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FeatureQueue):
            module.reset_parameters()
        elif module is self:
            self.teacher.copy_(head=self.head, norm=self.norm)


def test_a_model_saves_and_restores_its_teacher_and_its_queue(tmp_path):
    model = Taught(Config())
    assert torch.equal(model.teacher.head.weight, model.head.weight)
    moved({"head": model.head})
    model.queue.enqueue(torch.eye(3), torch.eye(3).flip(0), torch.tensor([7, 8, 9]))
    model.save_pretrained(tmp_path)
    loaded = Taught.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(loaded.teacher.head.weight, loaded.head.weight)
    assert loaded.queue.position == 3 and loaded.head.weight.requires_grad
    for some in (model, loaded, loaded.train(), loaded.eval()):
        assert not any(parameter.requires_grad for parameter in some.teacher.parameters())


def test_from_a_checkpoint_without_a_teacher_it_is_a_copy_of_what_was_loaded():
    source = states(Taught(Config()))
    source["norm.running_mean"] = torch.tensor([3.0, 4.0])
    students = {name: value for name, value in source.items() if name.startswith(("head", "norm"))}
    loaded = Taught.from_pretrained(None, config=Config(), state_dict=students)
    for name, value in students.items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(
            loaded.state_dict()[f"teacher.{name}"], value
        )
    # a tensor of the teacher that the checkpoint has stays, and the rest is copied
    partly = students | {"teacher.head.bias": torch.tensor([5.0, 6.0]), "queue.text_features": torch.eye(4, 3)}
    loaded = Taught.from_pretrained(None, config=Config(), state_dict=partly)
    assert loaded.teacher.head.bias.tolist() == [5, 6] and torch.equal(
        loaded.teacher.head.weight, students["head.weight"]
    )
    again = {name: getattr(loaded, name) for name, _ in loaded.teacher.named_children()}
    loaded.teacher.copy_(**again)
    assert loaded.teacher.head.bias.tolist() == [5, 6]
    loaded.teacher.become(**again)  # where the model begins anew, what was loaded goes
    assert torch.equal(loaded.teacher.head.bias, students["head.bias"])
    assert torch.equal(loaded.queue.text_features, torch.eye(4, 3))
    assert not torch.equal(loaded.queue.image_features, torch.eye(4, 3))
    torch.testing.assert_close(loaded.queue.image_features.norm(dim=1), torch.ones(4))
    assert loaded.queue.image_ids.tolist() == [-100] * 4 and loaded.queue.position == 0


def test_on_the_meta_device():
    with torch.device("meta"):
        teacher, queue = MomentumTeacher(**parts()), FeatureQueue(1000, 8)
    assert all(tensor.is_meta for module in (teacher, queue) for tensor in module.state_dict().values())
    assert not teacher.vision[0].weight.requires_grad and queue.image_ids.dtype == torch.int64


# The queue


def features(count, start=0, width=3):
    """Rows that say which pair they are, images in positive and texts in negative numbers."""
    numbers = torch.arange(start, start + count).float()[:, None].expand(-1, width)
    return numbers, -numbers - 0.5


def test_a_new_queue_has_random_unit_rows_of_no_known_image():
    queue = FeatureQueue(500, 6)
    for rows in (queue.image_features, queue.text_features):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(500))
        assert rows.mean(dim=0).abs().max() < 0.1  # every direction as likely as its opposite
        assert rows.var(dim=0).sub(1 / 6).abs().max() < 0.05
    assert not torch.equal(queue.image_features, queue.text_features)
    assert (queue.image_ids == -100).all() and queue.position == 0 and queue.position.shape == ()
    drawn = []
    for seed in (1, 1, 2):
        queue.enqueue(*(torch.ones(3, 6),) * 2, torch.arange(3))
        queue.reset_parameters(torch.Generator().manual_seed(seed))
        assert (queue.image_ids == -100).all() and queue.position == 0
        drawn.append(queue.image_features.clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not list(queue.parameters()) and len(queue.state_dict()) == 4


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 3, 3], [5, 5], [4, 1, 7], [13], [1, 12, 2], [5, 0, 3]])
def test_batches_of_any_size_go_round_the_ring(sizes):
    queue, size, written = FeatureQueue(5, 3), 5, 0
    images, texts, ids = queue.image_features.clone(), queue.text_features.clone(), [-100] * size
    for batch in sizes:
        new = features(batch, start=written)
        queue.enqueue(*new, torch.arange(written, written + batch) + 70)
        for row in range(batch):  # one after the other
            place = (written + row) % size
            images[place], texts[place], ids[place] = new[0][row], new[1][row], written + row + 70
        written += batch
        assert torch.equal(queue.image_features, images) and torch.equal(queue.text_features, texts)
        assert queue.image_ids.tolist() == ids and queue.position == written % size
    assert not torch.equal(queue.image_features, -queue.text_features)


def test_pairs_without_identities_are_of_no_known_image():
    queue = FeatureQueue(4, 3)
    queue.enqueue(*features(3), torch.tensor([5, 6, -100]))
    assert queue.same_image(torch.tensor([6, -100, 9])).tolist() == [
        [False, True, False, False],
        [False] * 4,
        [False] * 4,
    ]
    queue.enqueue(*features(2, start=3))
    assert queue.image_ids.tolist() == [-100, 6, -100, -100] and queue.image_features[:, 0].tolist() == [4, 1, 2, 3]


def test_the_queue_has_no_graph_and_its_own_dtype():
    queue = FeatureQueue(4, 3)
    images, texts = (rows.clone().requires_grad_() for rows in features(2))
    queue.enqueue(images * 2, texts.bfloat16())
    assert not queue.image_features.requires_grad and queue.text_features.dtype == torch.float32
    assert queue.image_features[1].tolist() == [2.0, 2.0, 2.0]


def test_writing_after_the_loss_leaves_its_gradient_alone():
    queue = FeatureQueue(4, 3)
    gradients = []
    for write in (False, True):
        images, texts = (torch.eye(3)[:2].clone().requires_grad_() for _ in range(2))
        teacher = torch.eye(3)[1:].clone()
        loss = momentum_contrastive_loss(
            images, texts, teacher, teacher, queue.image_features, queue.text_features, torch.tensor(0.5), 0.4
        )[0]
        if write:
            queue.enqueue(teacher, -teacher)
        loss.backward()
        gradients.append((images.grad, texts.grad))
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*gradients))


def test_what_a_queue_cannot_hold():
    with pytest.raises(ValueError, match="a queue holds at least 1 pair, got size 0"):
        FeatureQueue(0, 3)
    queue = FeatureQueue(4, 3)
    for images, texts in ((torch.ones(2, 5), torch.ones(2, 5)), (torch.ones(2, 3), torch.ones(1, 3))):
        with pytest.raises(ValueError, match=r"features \[B, 3\], got \[2, .\] and \[., .\]"):
            queue.enqueue(images, texts)
    assert queue.position == 0

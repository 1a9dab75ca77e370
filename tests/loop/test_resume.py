import json
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_vlp.files import files_into
from hf_vlp.inputs.vocabulary import fingerprint, train_clip_tokenizer
from hf_vlp.training.loop import train
from hf_vlp.training.report import RunLog, read_metrics
from hf_vlp.training.state import Checkpoints, Progress, StateError, refuse_taken_folder
from tests.loop.toy import ToyTwoTower, parts, stream


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A run of 14 steps over epochs of 4, with dropout, so that weights depend on every kind of state."""

    def __init__(self, accelerator, folder, *, channels_last=False):
        torch.manual_seed(5)
        model = ToyTwoTower(dropout=0.3, batch_norm=True)
        model.patch = torch.nn.Conv2d(3, 3, 2, bias=False)
        if channels_last:
            model.patch = model.patch.to(memory_format=torch.channels_last)
        forward = model.embed
        model.embed = lambda pixel_values, input_ids: forward(
            pixel_values + model.patch(pixel_values).mean(), input_ids
        )
        self.accelerator, self.folder = accelerator, folder
        self.model, self.optimizer, self.scheduler = parts(accelerator, model, total_steps=14)
        self.stream = stream(accelerator, Progress())
        self.checkpoints = Checkpoints(
            folder, accelerator, self.model, self.optimizer, self.scheduler, self.stream, keep=5
        )

    def to(self, steps):
        start = self.stream.progress.step
        log = RunLog(self.accelerator, self.folder / "metrics.jsonl", steps=14, start=start)
        train(
            self.accelerator, self.model, self.optimizer, self.scheduler, self.stream, steps=steps,
            clip_norm=1.0, log=log, checkpoints=self.checkpoints, save_every=3,
        )  # fmt: skip
        log.close()
        return self


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_stopped_and_resumed_equals_never_stopped(accelerator, tmp_path, channels_last):
    unbroken = Run(accelerator, tmp_path / "unbroken", channels_last=channels_last).to(14)
    following = next(iter(unbroken.stream))["image_ids"]
    Run(accelerator, tmp_path / "broken", channels_last=channels_last).to(7)
    # between the two lives everything is drawn from and changed
    torch.manual_seed(999), random.seed(999), np.random.seed(999)
    second = Run(accelerator, tmp_path / "broken", channels_last=channels_last)
    fresh = weights(second)
    assert second.checkpoints.resume("auto").name == "step-00000007"
    assert (second.stream.progress.step, second.stream.progress.epoch, second.stream.progress.position) == (7, 1, 3)
    second.to(14)
    for name, value in weights(unbroken).items():
        assert torch.equal(value, weights(second)[name]), name
        assert name.endswith("num_batches_tracked") or not torch.equal(value, fresh[name])
    assert torch.equal(next(iter(second.stream))["image_ids"], following)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("unbroken", "broken"))
    assert [line | {"seconds": 0} for line in one] == [line | {"seconds": 0} for line in two]


@pytest.mark.parametrize("lost", ["random", "optimizer", "progress"])
def test_each_part_of_the_state_matters(accelerator, tmp_path, lost):
    unbroken = Run(accelerator, tmp_path / "a").to(14)
    Run(accelerator, tmp_path / "b").to(7)
    second = Run(accelerator, tmp_path / "b")
    second.checkpoints.resume()
    if lost == "random":
        torch.manual_seed(1)
    elif lost == "optimizer":
        second.optimizer.optimizer.state.clear()
    else:
        second.stream.load_state_dict(second.stream.state_dict() | {"position": 0})
    second.to(14)
    assert any(not torch.equal(value, weights(second)[name]) for name, value in weights(unbroken).items())


def test_an_older_checkpoint_by_its_path(accelerator, tmp_path):
    unbroken = Run(accelerator, tmp_path / "a").to(14)
    second = Run(accelerator, tmp_path / "a")
    second.checkpoints.resume(tmp_path / "a" / "checkpoints" / "step-00000003")
    assert second.stream.progress.step == 3
    second.to(14)
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(unbroken).items())


def test_what_lay_behind_an_older_checkpoint_is_left(accelerator, tmp_path, capsys):
    folder = tmp_path / "checkpoints"

    def names():
        return sorted(path.name for path in folder.iterdir())

    first = Run(accelerator, tmp_path)
    for steps, score in ((2, 5.0), (4, 7.0), (6, 9.0), (8, 8.0)):
        first.to(steps)
        first.checkpoints.save({"validation/rsum": score})
    assert first.checkpoints.best().name == "step-00000006"
    # a second life that starts behind everything moves nothing
    Run(accelerator, tmp_path).checkpoints.resume()
    before = names()
    assert not [name for name in before if name.startswith("left-")] and "left behind" not in capsys.readouterr().out

    second = Run(accelerator, tmp_path)
    second.checkpoints.keep = 2
    second.checkpoints.resume(folder / "step-00000004")
    assert second.checkpoints.last().name == "step-00000004"
    assert [name for name in names() if name.startswith("left-")] == ["left-step-00000006", "left-step-00000008"]
    assert "left behind, to be deleted by you" in (shown := capsys.readouterr().out) and "left-step-00000008" in shown
    # the best is the best of what remains
    assert json.loads((folder / "best.json").read_text()) == {
        "checkpoint": "step-00000004", "metric": "validation/rsum", "value": 7.0,
    }  # fmt: skip
    second.to(5)
    assert second.checkpoints.save({"validation/rsum": 8.0}).is_dir()
    assert second.checkpoints.best().name == "step-00000005"
    second.to(7)
    # the two newest, where the second is the best as well; the old 6 and 8 count no more
    assert [path.name for path in second.checkpoints.all()] == ["step-00000005", "step-00000006", "step-00000007"]


def test_without_an_evaluated_checkpoint_there_is_no_best(accelerator, tmp_path):
    run = Run(accelerator, tmp_path).to(3)
    run.to(5).checkpoints.save({"validation/rsum": 1.0})
    assert run.checkpoints.best().name == "step-00000005"
    run.checkpoints.resume(tmp_path / "checkpoints" / "step-00000003")
    assert run.checkpoints.best() is None and not (tmp_path / "checkpoints" / "best.json").exists()
    assert run.checkpoints.improves({"validation/rsum": 0.5})


def test_the_main_process_alone_says_what_is_best(accelerator, tmp_path, monkeypatch):
    run = Run(accelerator, tmp_path)
    run.checkpoints.save({"validation/rsum": 1.0})
    asked = []
    monkeypatch.setattr("hf_vlp.training.state.broadcast_object_list", lambda answer: asked.append(answer) or [True])
    assert run.checkpoints.improves({"validation/rsum": 0.5})  # what the broadcast says, not the file
    assert asked == [[False]]


def test_weights_of_another_vocabulary_are_refused(accelerator, tmp_path):
    first, again = (train_clip_tokenizer([text] * 9, 520, 8) for text in ("a red square", "seven green circles"))
    same = train_clip_tokenizer(["a red square"] * 9, 520, 16)
    assert fingerprint(first) == fingerprint(same) != fingerprint(again)
    assert len(first) == len(again)
    run = Run(accelerator, tmp_path)
    run.checkpoints.vocabulary = fingerprint(first)
    run.to(2)
    run.checkpoints.resume()
    run.checkpoints.vocabulary = fingerprint(again)
    with pytest.raises(StateError, match="step-00000002 was trained with another vocabulary"):
        run.checkpoints.resume()


def test_random_states_of_python_and_numpy_come_back(accelerator, tmp_path):
    run = Run(accelerator, tmp_path)
    random.gauss(0, 1), np.random.standard_normal()
    path = run.checkpoints.save()
    wanted = random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()
    run.checkpoints.resume(path)
    again = random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), torch.rand(1).item()
    assert again == wanted
    assert random.random() != wanted[1]


def test_a_checkpoint_holds_no_pickle(accelerator, tmp_path):
    path = Run(accelerator, tmp_path).checkpoints.save()
    names = sorted(file.name for file in path.iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"]


def test_another_number_of_processes_is_refused(accelerator, tmp_path):
    run = Run(accelerator, tmp_path)
    path = run.checkpoints.save()
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"processes": 4}))
    with pytest.raises(StateError, match="written by 4 processes and this run has 1.*--num_processes 4"):
        run.checkpoints.resume()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random-0.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(accelerator, tmp_path, name):
    path = Run(accelerator, tmp_path).to(3).checkpoints.last()
    (path / name).write_bytes((path / name).read_bytes()[:100])
    run = Run(accelerator, tmp_path)
    before = weights(run)
    with pytest.raises(StateError, match=f"{name} is damaged"):
        run.checkpoints.resume()
    assert all(torch.equal(value, before[key]) for key, value in weights(run).items())
    assert run.stream.progress == Progress()


def test_nothing_half_written_counts_as_a_checkpoint(accelerator, tmp_path):
    run = Run(accelerator, tmp_path).to(3)
    whole = run.checkpoints.last()
    shutil.copytree(whole, whole.with_name(".writing-step-00000009"))
    assert run.checkpoints.all() == [whole]
    with pytest.raises(StateError, match="no checkpoint to resume from"):
        run.checkpoints.resume(tmp_path / "elsewhere")


def test_a_checkpoint_of_another_model_optimizer_or_data(accelerator, tmp_path):
    run = Run(accelerator, tmp_path).to(3)
    run.stream.sampler.count = 31
    with pytest.raises(StateError, match="count=32 saved, 31 here"):
        run.checkpoints.resume()
    run.stream.sampler.count = 32
    names = run.optimizer.optimizer.param_groups[0]["names"]
    run.optimizer.optimizer.param_groups[0]["names"] = ["another", *names[1:]]
    with pytest.raises(StateError, match="other parameter groups: resume with the recipe of that run"):
        run.checkpoints.resume()
    run.optimizer.optimizer.param_groups[0]["names"] = names
    run.checkpoints.resume()
    run.checkpoints.model.text_projection = torch.nn.Linear(3, 3)
    with pytest.raises(StateError, match="holds another model than the recipe's"):
        run.checkpoints.resume()


def test_a_folder_with_a_run_is_not_written_over(accelerator, tmp_path):
    refuse_taken_folder(tmp_path / "new", None)
    assert not (tmp_path / "new").exists()
    Run(accelerator, tmp_path / "new").checkpoints.save()
    with pytest.raises(StateError, match="already holds a run: go on with --resume auto"):
        refuse_taken_folder(tmp_path / "new", None)
    refuse_taken_folder(tmp_path / "new", "auto")


def test_files_of_a_block_that_fails_vanish(tmp_path):
    for fails in (True, False):
        try:
            with files_into(tmp_path / "out") as partial:
                (partial / "model.safetensors").write_text("whole")
                if fails:
                    raise OSError("disk full")
        except OSError:
            pass
        names = [file.name for file in (tmp_path / "out").iterdir()]
        assert names == ([] if fails else ["model.safetensors"])

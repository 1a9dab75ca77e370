"""The harness can fail: what it must notice, and what it must not mind."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.__main__ import main
from tests.parity.harness import Case, Kind, at_least, run, sum_of

GOLDEN = Path(__file__).parents[1] / "golden" / "clip"


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden case under a name that says nothing."""

    def make(kind: str, without: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / f"folder_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(GOLDEN / kind, folder, ignore=shutil.ignore_patterns(*without))
        return folder

    return make


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def change_weights(path: Path, change) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def failures(kind: str, folder: Path) -> list[str]:
    return [line.name for line in run("clip", kind, folder).lines if line.verdict == "FAIL"]


@pytest.mark.parametrize(
    "name", ["image_features", "text.block.0", "fp16.logits_per_image", "loss.total", "text.pool_index"]
)
def test_a_changed_output_value(copy, name):
    folder = copy("vit")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs[name].view(-1)[:1].add_(1))
    assert failures("vit", folder) == [name]


@pytest.mark.parametrize(("name", "amount"), [("text_features", 1e-4), ("vision.block.1", 2e-4), ("loss.image", 3e-5)])
def test_a_value_changed_a_little(copy, name, amount):
    folder = copy("vit")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs[name].view(-1)[:1].add_(amount))
    assert failures("vit", folder) == [name]


def test_a_difference_below_the_bound_is_none(copy):
    folder = copy("vit")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs["text_features"].add_(5e-6))
    assert failures("vit", folder) == []


def test_not_a_number(copy):
    folder = copy("vit")
    change_tensors(
        folder / "outputs.safetensors", lambda outputs: outputs["text_features"].view(-1)[:1].fill_(float("nan"))
    )
    assert failures("vit", folder) == ["text_features"]


def test_another_shape(copy):
    folder = copy("vit")
    change_tensors(
        folder / "outputs.safetensors", lambda outputs: outputs.update(image_features=outputs["image_features"][:1])
    )
    assert failures("vit", folder) == ["image_features"]


@pytest.mark.parametrize("name", ["visual.proj", "transformer.resblocks.0.attn.in_proj_weight", "logit_scale"])
@pytest.mark.parametrize("factor", [1.001, 0.0, None])
def test_a_changed_gradient(copy, name, factor):
    folder = copy("vit")

    def change(grads):
        grads["loss.total"][name] = None if factor is None else factor * grads["loss.total"][name]

    change_json(folder / "grads.json", change)
    assert failures("vit", folder) == [f"grads.json: loss.total: {name}"]


@pytest.mark.parametrize("name", ["train.loss.total", "after_train_forward.visual.layer2.1.bn2.running_var",
                                  "after_train_forward.visual.bn1.num_batches_tracked"])  # fmt: skip
def test_a_changed_value_of_training(copy, name):
    folder = copy("resnet")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs[name].view(-1)[:1].add_(1))
    assert failures("resnet", folder) == [name]


def test_gradients_of_the_two_modes_are_told_apart(copy):
    folder = copy("resnet")
    change_json(folder / "grads.json", lambda grads: grads.update({"loss.total": grads["train.loss.total"]}))
    assert any(name.startswith("grads.json: loss.total: visual.") for name in failures("resnet", folder))


def test_rounded_and_exact_weights_are_told_apart(copy):
    folder = copy("vit_fp32_checkpoint")

    def swap(outputs):
        outputs["exact.image_features"] = outputs["rounded.image_features"].clone()

    change_tensors(folder / "outputs.safetensors", swap)
    assert failures("vit_fp32_checkpoint", folder) == ["exact.image_features"]


@pytest.mark.parametrize(
    "name", ["new", "train.new", "vision.block.7", "vision.layer1", "after_train_forward.visual.bn9.running_mean"]
)
def test_an_extra_tensor(copy, name):
    folder = copy("vit")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs.update({name: torch.zeros(2)}))
    assert failures("vit", folder) == [name]


def test_an_extra_gradient_and_an_extra_section(copy):
    folder = copy("vit")

    def change(grads):
        grads["loss.total"]["visual.new"] = 1.0
        grads["loss.new"] = {"visual.proj": 1.0}

    change_json(folder / "grads.json", change)
    assert failures("vit", folder) == ["grads.json: loss.total: visual.new", "grads.json: loss.new: visual.proj"]


def test_an_extra_file(copy):
    folder = copy("vit")
    (folder / "deep").mkdir()
    (folder / "deep" / "notes.json").write_text("{}")
    assert failures("vit", folder) == ["deep/notes.json"]


def test_an_extra_entry_of_statistics(copy):
    folder = copy("init_vit")
    change_json(folder / "init_stats.json", lambda stats: stats["visual.proj"].update(median=0.0))
    assert failures("init_vit", folder) == ["init_stats.json: visual.proj"]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("visual.proj", "std", 0.2),
        ("visual.proj", "shape", [64, 57]),
        ("ln_final.weight", "mean", 1.001),
        ("logit_scale", "mean", 2.6),
    ],
)
def test_other_statistics(copy, name, field, value):
    folder = copy("init_vit")
    change_json(folder / "init_stats.json", lambda stats: stats[name].update({field: value}))
    assert failures("init_vit", folder) == [f"init_stats.json: {name}"]


@pytest.mark.parametrize("name", ["visual.proj", "transformer.resblocks.1.ln_1.bias", "visual.class_embedding"])
def test_a_missing_weight(copy, name):
    folder = copy("vit")
    change_weights(folder / "checkpoint.pt", lambda state: state.pop(name))
    failed = failures("vit", folder)
    assert failed[0] == "the procedure" and "image_features" in failed


def test_a_weight_too_many(copy):
    folder = copy("vit")
    change_weights(folder / "checkpoint.pt", lambda state: state.update(new=torch.zeros(2)))
    assert failures("vit", folder)[0] == "the procedure"


def test_no_weights(copy):
    assert failures("vit", copy("vit", without=("checkpoint.pt",)))[0] == "the procedure"


def test_a_changed_weight_in_one_of_several_files(copy):
    folder = copy("vit", without=("grads.json",))
    shutil.copy(folder / "checkpoint.pt", folder / "checkpoint.bin")
    assert failures("vit", folder) == []
    change_weights(folder / "checkpoint.bin", lambda state: state["text_projection"].mul_(2))
    failed = failures("vit", folder)
    assert "checkpoint.bin: text_features" in failed
    assert not any(name.startswith("checkpoint.pt: ") for name in failed)


@pytest.mark.parametrize("name", ["predictions", "coef", "accuracy_percent"])
def test_another_probe(copy, name):
    folder = copy("linear_probe")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs[name].view(-1)[:1].add_(1))
    assert failures("linear_probe", folder) == [name]


@pytest.mark.parametrize("name", ["classifier", "top5_indices", "top1_percent"])
def test_another_zero_shot_result(copy, name):
    folder = copy("zeroshot")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs[name].view(-1)[:1].add_(1))
    assert failures("zeroshot", folder) == [name]


@pytest.mark.parametrize("field", ["ids", "tokens", "decoded", "padded", "truncated"])
def test_another_token(copy, field):
    folder = copy("tokenizer_small")
    change_json(folder / "cases.json", lambda cases: cases[3].update({field: cases[0][field]}))
    assert failures("tokenizer_small", folder) == [f"cases.json: 3: {field}"]


def test_an_extra_field_of_a_text(copy):
    folder = copy("tokenizer_small")
    change_json(folder / "cases.json", lambda cases: cases[3].update(length=4))
    assert failures("tokenizer_small", folder) == ["cases.json: 3: length"]


def test_another_vocabulary(copy):
    folder = copy("tokenizer_small")
    change_json(folder / "vocab.json", lambda vocabulary: vocabulary.pop("dog</w>"))
    assert failures("tokenizer_small", folder) == ["vocab.json"]


def test_another_pixel(copy):
    folder = copy("image_preprocess")
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs["pixels.4"].view(-1)[:1].add_(0.01))
    assert failures("image_preprocess", folder) == ["pixels.4"]


def test_another_image(copy):
    folder = copy("image_preprocess")
    shutil.copy(folder / "image_0_RGB_80x50.png", folder / "image_1_RGB_47x81.png")
    assert "pixels.1" in failures("image_preprocess", folder)


@pytest.mark.parametrize("kept", [("image_features",), ("text.pooled", "fp16.loss.total"), ("train.logits_per_image",),
                                  ("after_train_forward.visual.bn3.running_var",)])  # fmt: skip
def test_fewer_tensors_are_no_failure(copy, kept):
    folder = copy("resnet", without=("grads.json", "README.md", "config.json"))

    def keep(outputs):
        for name in set(outputs) - set(kept):
            outputs.pop(name)

    change_tensors(folder / "outputs.safetensors", keep)
    case = run("clip", "resnet", folder)
    assert case.passed and sum(line.verdict == "ok" for line in case.lines) == len(kept)


def test_one_side_alone(copy):
    folder = copy("vit", without=("grads.json",))
    change_tensors(folder / "inputs.safetensors", lambda inputs: inputs.pop("image"))

    def keep(outputs):
        for name in [name for name in outputs if not name.startswith("text")]:
            outputs.pop(name)

    assert "image_features" in failures("vit", folder)
    change_tensors(folder / "outputs.safetensors", keep)
    assert failures("vit", folder) == []


def test_gradients_alone(copy):
    assert failures("vit", copy("vit", without=("outputs.safetensors", "README.md", "config.json"))) == []


def test_zero_shot_with_less(copy):
    folder = copy("zeroshot", without=("README.md", "config.json"))
    change_tensors(folder / "inputs.safetensors", lambda inputs: inputs.pop("target"))
    assert failures("zeroshot", folder) == ["top1_percent", "top5_percent"]
    change_tensors(folder / "outputs.safetensors", lambda outputs: [outputs.pop(f"top{k}_percent") for k in (1, 5)])
    assert failures("zeroshot", folder) == []


def test_the_merge_table_as_plain_text(copy):
    assert failures("tokenizer_small", copy("tokenizer_small", without=("merges.txt.gz", "vocab.json"))) == []


def test_pixels_without_the_image_files(copy):
    folder = copy("image_preprocess", without=("image_0_*", "image_3_*"))
    assert failures("image_preprocess", folder) == []
    # a palette image, or one with transparency, cannot be had from its colours; the other entries still run
    (folder / "image_4_RGBA_60x40.png").unlink()
    assert failures("image_preprocess", folder) == ["pixels.4"]
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs.pop("pixels.4"))
    case = run("clip", "image_preprocess", folder)
    lines = {line.name: line.verdict for line in case.lines}
    assert case.passed and lines["cases.json: 4: mode"] == "listed" and lines["pixels.5"] == "ok"


@pytest.mark.parametrize("kind", ["tokenizer_small", "tokenizer_full", "contrastive_loss"])
def test_sizes_and_scale_without_their_configuration(copy, kind):
    assert failures(kind, copy(kind, without=("config.json",))) == []


def test_statistics_of_pictures_alone(copy):
    folder = copy("resnet", without=("grads.json",))
    change_tensors(folder / "inputs.safetensors", lambda inputs: inputs.pop("text"))

    def keep(outputs):
        for name in [name for name in outputs if not name.startswith("after_train_forward.")]:
            outputs.pop(name)

    change_tensors(folder / "outputs.safetensors", keep)
    assert failures("resnet", folder) == []
    name = "after_train_forward.visual.bn1.running_mean"
    change_tensors(folder / "outputs.safetensors", lambda outputs: outputs[name].add_(1))
    assert failures("resnet", folder) == [name]


def test_heads_that_follow_from_the_width(copy):
    folder = copy("init_vit")
    change_json(folder / "config.json", lambda config: config.pop("transformer_heads"))
    assert failures("init_vit", folder) == []
    change_json(folder / "config.json", lambda config: config.pop("transformer_width"))
    assert "the procedure" in failures("init_vit", folder)


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("vit_multihead", "resnet"),
        ("text_multihead", "vit_multihead"),
        ("resnet_fp32_checkpoint", "vit_fp32_checkpoint"),
    ],
)
def test_the_folder_tells_what_it_holds(copy, kind, stored):
    assert failures(kind, copy(stored)) == []


def test_command_line_of_several_folders(copy, capsys):
    good, bad = copy("init_vit"), copy("init_vit")
    change_json(bad / "init_stats.json", lambda stats: stats["logit_scale"].update(mean=1.0))
    assert main(["clip", "init_vit", str(good)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("passed: 50 equal, 0 FAIL")
    assert main(["clip", "init_vit", str(bad), str(good)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: 49 equal, 1 FAIL" in printed and "passed: 50 equal, 0 FAIL" in printed
    line = next(line for line in printed.splitlines() if line.startswith("init_stats.json: logit_scale"))
    assert line.split()[2:5] == ["1.66e+00", "0.00e+00", "FAIL"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip", "vit_unheard_of", "{vit}"], "unknown kind 'vit_unheard_of'"),
        (["clap", "vit", "{vit}"], "unknown architecture 'clap'"),
        (["clip", "vit", "{vit}/absent"], "absent is missing"),
        (["clip", "vit", "{vit}/config.json"], "config.json is not a folder"),
    ],
)
def test_what_cannot_be_run(capsys, arguments, message):
    assert main([argument.format(vit=GOLDEN / "vit") for argument in arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"), [("outputs.safetensors", b"\0" * 20), ("grads.json", b"{"), ("config.json", b"\xff")]
)
def test_an_unreadable_file(copy, capsys, name, content):
    folder = copy("vit")
    (folder / name).write_bytes(content)
    assert main(["clip", "vit", str(folder)]) == 1
    assert name in capsys.readouterr().err


def test_a_damaged_checkpoint(copy):
    folder = copy("vit")
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    assert failures("vit", folder)[0] == "the procedure"


@pytest.mark.parametrize("kind", ["vit", "init_resnet", "tokenizer_small", "linear_probe", "contrastive_loss"])
def test_a_folder_that_compares_nothing(tmp_path, kind):
    shutil.copy(GOLDEN / "vit" / "README.md", tmp_path)
    case = run("clip", kind, tmp_path)
    assert not case.passed and case.lines[-1].note == "holds nothing to compare"


def test_weights_without_any_stored_value(copy):
    folder = copy("vit", without=("outputs.safetensors", "grads.json"))
    assert failures("vit", folder) == ["the folder"]


def test_bounds_and_masks(tmp_path):
    save_file({"x": torch.tensor([[10.0, 1.0], [2.0, 3.0]]), "y": torch.zeros(2)}, tmp_path / "outputs.safetensors")
    ours, mask = torch.tensor([[10.5, 1.0], [7.0, 8.0]]), torch.tensor([1, 0])
    assert at_least(0.1, 0.05)(torch.tensor([10.0])) == pytest.approx(0.5)
    assert sum_of(0.1, 0.05)(torch.tensor([10.0])) == pytest.approx(0.6)

    def verdicts(bound, mask=None):
        case = Case(tmp_path, Kind(lambda case: None, (("x", bound),)))
        case.compare({"x": ours, "y": torch.zeros(2), "z": torch.ones(1)}, mask=mask)
        return [line.verdict for line in case.lines if line.name == "x"]

    assert verdicts(at_least(0.1, 0.05), mask) == ["ok"]
    assert verdicts(at_least(0.1, 0.04), mask) == ["FAIL"]
    assert verdicts(at_least(0.1, 0.05)) == ["FAIL"]

"""Case folders of other sizes than the golden ones, made here with open_clip's implementation of the two towers."""

import copy
import json

import pytest
import torch
from open_clip.model import CLIP, convert_weights_to_lp
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, normalize

from tests.parity.harness import run

VIT = {"layers": 3, "width": 192, "head_width": 64, "patch_size": 8, "image_size": 24}
RESNET = {"layers": [2, 1, 1, 2], "width": 6, "head_width": 64, "patch_size": None, "image_size": 96}
TEXT = {"context_length": 11, "vocab_size": 70, "width": 192, "heads": 3, "layers": 3}


def reference(vision: dict, text: dict) -> CLIP:
    """A model with nothing left at a constant initial value."""
    torch.manual_seed(3)
    model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(
                1 + 0.2 * torch.rand(tensor.shape)
                if name.endswith(("weight", "_var"))
                else 0.2 * torch.randn(tensor.shape)
            )
    model.logit_scale.data.fill_(4.8)  # above ln(100), which the released forward does not limit
    return model


def forward(model: CLIP, image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {"image_features": model.encode_image(image), "text_features": model.encode_text(text)}
    images, texts = (normalize(value, dim=-1) for value in values.values())
    values["logits_per_image"] = model.logit_scale.exp() * images @ texts.T
    values["logits_per_text"] = values["logits_per_image"].T
    targets = torch.arange(len(image))
    values["loss.image"] = cross_entropy(values["logits_per_image"], targets)
    values["loss.text"] = cross_entropy(values["logits_per_text"], targets)
    values["loss.total"] = (values["loss.image"] + values["loss.text"]) / 2
    return values


def rounded(model: CLIP) -> CLIP:
    model = copy.deepcopy(model)
    convert_weights_to_lp(model, torch.float16)
    return model.float()


def write_case(folder, model: CLIP, half: bool) -> None:
    """What a model case stores. `half`: the checkpoint in half precision, else in float32 with both readings of it."""
    torch.manual_seed(4)
    size, length = model.visual.image_size, model.positional_embedding.shape[0]
    image = torch.randn(5, 3, *(size if isinstance(size, tuple) else (size, size)))
    text = torch.randint(1, 60, (5, length))
    text[:4, 5:] = 0
    text[torch.arange(4), torch.tensor([3, 4, 1, 2])] = 69  # the last row holds no end token
    stored = copy.deepcopy(model)
    if half:
        convert_weights_to_lp(stored, torch.float16)
    torch.save(
        {name: tensor for name, tensor in stored.state_dict().items() if name != "attn_mask"}, folder / "checkpoint.pt"
    )
    runs = {"": rounded(model)} if half else {"rounded.": rounded(model), "exact.": model}
    if hasattr(model.visual, "attnpool"):
        runs["train."] = copy.deepcopy(rounded(model) if half else model).train()
    outputs, gradients = {}, {}
    for prefix, run_model in runs.items():
        values = forward(run_model, image, text)
        values["loss.total"].backward()
        outputs |= {prefix + name: value.detach() for name, value in values.items()}
        gradients[f"{prefix}loss.total"] = {
            name: None if parameter.grad is None else parameter.grad.norm().item()
            for name, parameter in run_model.named_parameters()
        }
    if "train." in runs:
        for name, buffer in runs["train."].named_buffers():
            if "bn" in name or "downsample" in name:
                outputs[f"after_train_forward.{name}"] = buffer
    save_file({name: value.contiguous().clone() for name, value in outputs.items()}, folder / "outputs.safetensors")
    save_file({"image": image, "text": text}, folder / "inputs.safetensors")
    (folder / "grads.json").write_text(json.dumps(gradients))


@pytest.mark.parametrize("half", [True, False], ids=["half", "float32"])
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_case_of_another_size(tmp_path, vision, half):
    write_case(tmp_path, reference(vision, TEXT), half)
    case = run("clip", "text_multihead" if half else "resnet_fp32_checkpoint", tmp_path)
    assert case.passed, "\n".join(str(line) for line in case.lines if line.verdict == "FAIL")
    assert sum(line.verdict == "ok" for line in case.lines) > 90


def test_another_number_of_heads_is_another_model(tmp_path):
    write_case(tmp_path, reference(VIT, TEXT | {"heads": 6}), half=True)
    case = run("clip", "text_multihead", tmp_path)
    failed = [line.name for line in case.lines if line.verdict == "FAIL"]
    assert "text_features" in failed and "image_features" not in failed
    (tmp_path / "config.json").write_text(json.dumps({"transformer_heads": 6}))
    assert run("clip", "text_multihead", tmp_path).passed


def test_three_ranks_and_one_changed_value(tmp_path):
    torch.manual_seed(5)
    image, text = torch.randn(6, 9), torch.randn(6, 9)
    logits = 20 * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    losses = [
        (cross_entropy(logits[rows], torch.tensor(rows)) + cross_entropy(logits.T[rows], torch.tensor(rows))) / 2
        for rows in ([0, 1], [2, 3], [4, 5])
    ]
    save_file({"image_features": image, "text_features": text}, tmp_path / "inputs.safetensors")
    outputs = {f"three_ranks.rank{number}.loss": loss for number, loss in enumerate(losses)}
    outputs["three_ranks.rank2.loss"] = losses[2] + 1e-3
    save_file(outputs, tmp_path / "outputs.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"logit_scale": float(torch.tensor(20.0).log())}))
    case = run("clip", "contrastive_loss", tmp_path)
    assert [line.verdict for line in case.lines if "rank" in line.name] == ["ok", "ok", "FAIL"]
    assert not case.passed

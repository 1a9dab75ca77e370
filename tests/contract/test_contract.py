"""What every registered class promises, whatever its architecture: one test a promise, one run a row of `rows.py`."""

import copy
import json
from collections.abc import Iterator, Mapping
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_vlp.auto import OWN_AUTO_CLASSES, TABLE
from hf_vlp.layers.pooling import unit_rows
from tests.contract.rows import END, ROWS, VOCABULARY, Row

EQUAL = 1e-6  # the same weights in other memory: some kernels choose their order of summation by alignment


class Subject:
    """A row's model, its outputs and its saved folder; nothing here is changed by a test."""

    def __init__(self, row: Row, folder):
        self.row, self.folder = row, folder
        self.model = row.build()
        self.model.save_pretrained(folder)
        self.batch = row.batch()
        self.outputs = run(self.model, self.batch)

    def load(self, **kwargs):
        return self.row.model_class.from_pretrained(self.folder, **kwargs)


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def subject(request, tmp_path_factory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def garbage_memory():
    """New memory holds NaN, so that a tensor nobody wrote to is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def is_first_of_its_class(row: Row) -> bool:
    """For what takes seconds: one variant of each class (the towers are classes of their own)."""
    return row is next(other for other in ROWS if other.model == row.model)


def rows(condition) -> pytest.MarkDecorator:
    """The subjects for whose rows `condition` holds, in place of all."""
    chosen = [row for row in ROWS if condition(row)]
    return pytest.mark.parametrize("subject", chosen, ids=lambda row: row.name, indirect=True)


def rounding(tensor: torch.Tensor) -> float:
    """How far two orders of summing may be apart: another batch size or number of threads chooses other kernels."""
    return 1e-5 * max(1.0, float(tensor.detach().abs().max()))


def named_tensors(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested output with its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from named_tensors(part, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from named_tensors(part, f"{name}.{index}")


@torch.no_grad()
def run(model, batch, **kwargs) -> dict[str, torch.Tensor]:
    """Every float of the output."""
    return {name: tensor for name, tensor in named_tensors(model(**batch, **kwargs)) if tensor.is_floating_point()}


def scalar(output) -> torch.Tensor:
    """The loss where there is one, else a sum of everything with weights that let nothing cancel."""
    if output.get("loss") is not None:
        return output["loss"]
    return sum(
        (tensor * torch.arange(tensor.numel()).cos().view(tensor.shape)).sum()
        for _, tensor in named_tensors(output)
        if tensor.is_floating_point()
    )


def gradients(model, batch) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    scalar(model(**batch)).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict, other: dict) -> float:
    """Largest |a - b| over tensors of the same names, relative to each tensor's largest value where that is above 1."""
    assert one.keys() == other.keys()
    return max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1)).item() for k in one)


def submodel(output, path: str):
    return output[path] if path else output


def text_tower(model):
    """The part of the model that holds the token embedding."""
    return getattr(model.base_model, "text_model", model)


def auto_class(name: str):
    if name in OWN_AUTO_CLASSES:
        import hf_vlp

        return getattr(hf_vlp, name)
    return getattr(transformers, name)


def test_every_class_has_a_row():
    registered = {(model_type, model) for model_type, row in TABLE.items() for model in row.models.values()}
    assert registered == {(row.config().model_type, row.model) for row in ROWS}


# Saving and loading


def test_a_saved_model_loads_to_equal_outputs(subject):
    loaded, info = subject.load(output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    assert largest_difference(subject.outputs, run(loaded, subject.batch)) < EQUAL
    other = run(subject.row.build(seed=5), subject.batch)
    assert largest_difference(subject.outputs, other) > 1e-3


def test_a_saved_folder_holds_safetensors_and_json_only(subject):
    assert {path.name for path in subject.folder.iterdir()} == {"config.json", "model.safetensors"}
    stored, held = load_file(subject.folder / "model.safetensors"), subject.model.state_dict()
    tied = getattr(subject.model, "all_tied_weights_keys", {})
    assert stored.keys() == held.keys() - tied.keys()
    assert all(torch.equal(stored[tied.get(name, name)], held[name]) for name in held)


def test_a_second_save_writes_the_same_names(subject, tmp_path):
    subject.load().save_pretrained(tmp_path)
    first, second = load_file(subject.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()


def test_auto_classes_load_this_class(subject):
    assert subject.row.auto_classes
    for name in subject.row.auto_classes:
        loaded = auto_class(name).from_pretrained(subject.folder)
        assert type(loaded) is subject.row.model_class
        assert type(auto_class(name).from_config(subject.row.config())) is subject.row.model_class


def test_the_configuration_survives_the_folder(subject):
    loaded = AutoConfig.from_pretrained(subject.folder)
    assert type(loaded) is type(subject.model.config)
    assert loaded.to_diff_dict() == subject.model.config.to_diff_dict()
    assert json.loads((subject.folder / "config.json").read_text())["architectures"] == [
        subject.row.model_class.__name__
    ]


def test_shards_load_to_equal_outputs(subject, tmp_path):
    half = sum(tensor.numel() * tensor.element_size() for tensor in subject.model.state_dict().values()) // 2
    subject.model.save_pretrained(tmp_path, max_shard_size=min(half, 40_000))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = subject.row.model_class.from_pretrained(tmp_path)
    assert largest_difference(subject.outputs, run(loaded, subject.batch)) < EQUAL


@pytest.mark.parametrize("kept", ["none", "even", "odd"])
def test_what_a_checkpoint_lacks_is_initialised(subject, kept, garbage_memory):
    """Loading builds on the meta device: a parameter or buffer that `_init_weights` forgets would be memory garbage."""
    stored = subject.model.state_dict()
    names = [name for index, name in enumerate(stored) if kept == ("even", "odd")[index % 2]]
    loaded = subject.row.model_class.from_pretrained(
        None, config=subject.row.config(), state_dict={name: stored[name] for name in names}
    )
    fresh = subject.row.model_class._from_config(subject.row.config())
    for (name, tensor), start in zip(
        [*loaded.named_parameters(), *loaded.named_buffers()], [*fresh.parameters(), *fresh.buffers()]
    ):
        assert tensor.device.type == "cpu", name
        if name in names:
            assert torch.equal(tensor, stored[name]), f"{name} was overwritten"
        elif any(source == name and target in names for target, source in loaded.all_tied_weights_keys.items()):
            assert torch.equal(tensor, stored[name]), f"{name} is not what it is tied to"
        elif name.startswith("teacher."):
            own = loaded.get_parameter(name.removeprefix("teacher."))
            assert torch.equal(tensor, own), f"{name} is no copy of what it teaches"
        elif part := next((part for part in subject.row.begins_as if name.startswith(part)), None):
            source = loaded.get_parameter(name.replace(part, subject.row.begins_as[part], 1))
            assert torch.equal(tensor, source), f"{name} is no copy of what it begins as"
        elif not start.is_floating_point() or start.numel() < 2 or start.std() == 0:
            assert torch.equal(tensor, start), f"{name} is {tensor} and starts at {start}"
        else:
            assert tensor.isfinite().all(), f"{name} is not initialised"
            spread = 5 / start.numel() ** 0.5  # five standard errors of a ratio of two estimates
            assert abs(tensor.std() / start.std() - 1) < spread, (
                f"{name} has std {tensor.std()}, starts with {start.std()}"
            )


def test_dtype_of_loading(subject):
    assert {p.dtype for p in subject.load(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


# The forward pass


def test_the_forward_repeats_itself(subject):
    again = run(subject.model, subject.batch)
    assert all(torch.equal(tensor, again[name]) for name, tensor in subject.outputs.items())


def test_return_dict_false_gives_the_same_as_a_tuple(subject):
    with torch.no_grad():
        as_tuple = subject.model(**subject.batch, return_dict=False)
    assert type(as_tuple) is tuple
    tensors = [tensor for _, tensor in named_tensors(as_tuple) if tensor.is_floating_point()]
    assert len(tensors) == len(subject.outputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, subject.outputs.values(), strict=True))


@rows(lambda row: "assignment_draws" not in row.inputs)
def test_order_of_the_batch_does_not_matter(subject):
    order = torch.tensor([2, 0, 3, 1])
    batch = {name: tensor[order] for name, tensor in subject.batch.items()}
    for name in {"answer_rows", "first_image_index", "second_image_index"} & set(batch):  # they point at rows
        batch[name] = order.argsort()[batch[name]]
    turned = run(subject.model, batch)
    drawn = (".loss", ".losses.itm") if "negative_draws" in subject.batch else ()  # a draw counts along the batch
    for name, tensor in subject.outputs.items():
        if name in drawn:
            continue
        expected = tensor[order] if tensor.ndim else tensor
        if "logits_per" in name:
            expected = expected[:, order]
        assert torch.allclose(turned[name], expected, atol=rounding(expected)), name


@rows(lambda row: not row.mixes_rows)
def test_a_row_does_not_see_its_neighbours(subject):
    alone = run(subject.model, {name: tensor[:1] for name, tensor in subject.batch.items()})
    for name, tensor in alone.items():
        if tensor.ndim and "logits_per" not in name:
            assert torch.allclose(tensor, subject.outputs[name][:1], atol=rounding(tensor)), name


def without_padding(outputs: dict, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What padding must not touch: all but token states; of a tower that pools nothing, the states where `mask` is 1, and so of logits
    of tokens."""
    pooled = {
        name: tensor[:, : mask.shape[-1]][mask.bool()] if name == ".logits" and tensor.ndim == 3 else tensor
        for name, tensor in outputs.items()
        if "hidden_state" not in name
    }
    return pooled or {name: tensor[:, : mask.shape[1]][mask.bool()] for name, tensor in outputs.items()}


def wider_texts(row: Row, batch: dict, more: int = 4) -> dict:
    """The batch with every text padded by some positions more."""
    pads = row.text_inputs
    return {
        name: torch.nn.functional.pad(tensor, (0, more), value=pads[name]) if name in pads else tensor
        for name, tensor in batch.items()
    }


@rows(lambda row: row.has_text)
def test_padding_does_not_matter(subject):
    wider = wider_texts(subject.row, subject.batch)
    mask = subject.batch["attention_mask"]
    expected, padded = without_padding(subject.outputs, mask), without_padding(run(subject.model, wider), mask)
    for name in expected:
        assert torch.allclose(padded[name], expected[name], atol=1e-5), name

    changed = {name: tensor.clone() for name, tensor in subject.batch.items()}
    for name in {"input_ids", "mlm_input_ids"} & set(changed):
        changed[name][:, 1] = changed[name][:, 1] % 20 + 4
    other = without_padding(run(subject.model, changed), mask)
    text_sided = [name for name in expected if "vision" not in name and "image_embeds" not in name]
    assert text_sided and all(not torch.allclose(other[name], expected[name], atol=1e-5) for name in text_sided)


@rows(lambda row: row.has_text and not row.mixes_rows)
def test_a_text_shorter_than_the_batch_needs_no_padding(subject):
    row = {name: tensor[3:4] for name, tensor in subject.batch.items()}
    cut = {name: tensor[..., :4] if name in subject.row.text_inputs else tensor for name, tensor in row.items()}
    whole = without_padding(run(subject.model, row), row["attention_mask"])
    short = without_padding(run(subject.model, cut), cut["attention_mask"])
    assert whole and all(torch.allclose(whole[name], short[name], atol=1e-5) for name in whole)


@rows(lambda row: row.has_regions)
@pytest.mark.parametrize("training", [False, True])
def test_padding_of_regions_does_not_matter(subject, training):
    """In training neither, unless the configuration asks for the original's batch norm over the padding."""
    over_all = training and subject.row.config().region_norm_rows == "all"
    wider = dict(subject.batch)
    wider["region_features"] = torch.nn.functional.pad(subject.batch["region_features"], (0, 0, 0, 3))
    wider["region_mask"] = torch.nn.functional.pad(subject.batch["region_mask"], (0, 3))
    results = {}
    for name, batch in (("as it is", subject.batch), ("wider", wider)):
        model = subject.load().train(training)
        results[name] = run(model, batch), {key: buffer for key, buffer in model.named_buffers() if "norm" in key}
    for one, other in zip(results["as it is"], results["wider"], strict=True):
        assert (largest_difference(one, other) < 1e-5) == (not over_all)
    if not over_all:
        junk = dict(wider, region_features=wider["region_features"] + 5 * (wider["region_mask"] == 0).unsqueeze(-1))
        assert largest_difference(results["wider"][0], run(subject.load().train(training), junk)) < 1e-5
    real = dict(wider, region_mask=torch.ones_like(wider["region_mask"]))
    assert largest_difference(results["wider"][0], run(subject.load().train(training), real)) > 1e-3


@rows(lambda row: row.has_regions or "grid_mask" in row.inputs)
def test_elements_of_a_set_may_stand_in_any_order(subject):
    mask = "region_mask" if subject.row.has_regions else "grid_mask"
    turned = dict(subject.batch)
    order = torch.tensor([3, 1, 0, 2, 5, 4])[: subject.batch[mask].shape[1]] % subject.batch[mask].shape[1]
    for name in ("region_features", "region_mask"):
        if name in turned:
            turned[name] = turned[name][:, order]
    if subject.row.has_regions:
        assert largest_difference(subject.outputs, run(subject.model, turned)) < 1e-5
    alone = dict(
        turned, **{mask: turned[mask][:, torch.arange(len(order)).roll(1)]}
    )  # the mask without what it tells of
    assert largest_difference(subject.outputs, run(subject.model, alone)) > 1e-3


@rows(lambda row: row.has_image)
def test_images_of_another_size(subject):
    other = subject.row.batch(size=subject.row.other_size)
    outputs = run(subject.model, other)
    assert all(tensor.isfinite().all() for tensor in outputs.values())
    same = [name for name in outputs if "hidden_state" not in name]
    assert all(outputs[name].shape == subject.outputs[name].shape for name in same)
    again = run(subject.model, subject.batch)
    assert all(torch.equal(tensor, again[name]) for name, tensor in subject.outputs.items())


@rows(lambda row: row.recorded)
def test_states_and_attention_maps_are_recorded(subject):
    model = subject.load(attn_implementation="eager")
    output = model(**subject.batch, output_hidden_states=True, output_attentions=True)
    plain = model(**subject.batch)
    for path, (states, maps) in subject.row.recorded.items():
        part = submodel(output, path)
        assert len(part.hidden_states) == states and len(part.attentions or ()) == maps
        assert all(len(state) == 4 for state in part.hidden_states)
        for weights in part.attentions or ():
            assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)
        assert submodel(plain, path).hidden_states is None and submodel(plain, path).attentions is None


# Attention implementations, precision, compilers


@rows(lambda row: row.attention and "timm" not in row.variant)
def test_eager_and_sdpa_agree_forward_and_backward(subject):
    eager, sdpa = subject.load(attn_implementation="eager"), subject.load(attn_implementation="sdpa")
    assert largest_difference(run(eager, subject.batch), run(sdpa, subject.batch)) < 1e-5
    one, other = gradients(eager, subject.batch), gradients(sdpa, subject.batch)
    largest = max(gradient.abs().max() for gradient in one.values())
    assert all((one[name] - other[name]).abs().max() < 1e-5 * largest for name in one)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@rows(lambda row: row.attention and row.config().get_text_config().model_type != "bert")
def test_flex_attention_agrees(subject):
    """Forward only and not compiled: flex attention has no backward on the CPU, and compiling it takes minutes there."""
    flex = subject.load(attn_implementation="flex_attention")
    with torch.compiler.set_stance("force_eager"):
        outputs = run(flex, subject.batch)
    assert largest_difference(subject.outputs, outputs) < 1e-5


def test_every_attention_goes_through_the_dispatch(subject, monkeypatch):
    """The siblings of the test above: an implementation that answers nonsense changes the outputs, where anything attends."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def nonsense(module, query, key, value, attention_mask, **kwargs):
        calls.append(module)
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    calls = []
    model = subject.load(attn_implementation="sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", nonsense)
    outputs = run(model, subject.batch)
    owners = [module for module in model.modules() if hasattr(module, "is_causal")]
    assert bool(owners) == subject.row.attention
    trained = [owner for owner in owners if next(owner.parameters()).requires_grad]
    assert {id(owner) for owner in trained} <= {id(module) for module in calls} <= {id(owner) for owner in owners}
    assert (largest_difference(subject.outputs, outputs) > 1e-4) == subject.row.attention


def test_bf16_is_finite_and_near(subject):
    model = subject.load(dtype=torch.bfloat16)
    batch = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in subject.batch.items()}
    outputs = run(model, batch)
    for name, tensor in outputs.items():
        reference = subject.outputs[name]
        assert tensor.isfinite().all(), name
        error = (tensor.float() - reference).norm() / reference.norm()
        assert error < 0.12, f"{name} is off by {error:.3f}"


@rows(lambda row: row.learns)
def test_loss_is_float32_under_autocast(subject):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = subject.model(**subject.batch)
    assert output.loss.dtype == torch.float32
    assert abs(output.loss.item() - subject.outputs[".loss"].item()) < 0.05 * max(1, subject.outputs[".loss"].item())
    for name in ("image_embeds", "text_embeds"):
        if name in output and subject.row.unit:
            lengths = output[name].float().norm(dim=1)
            assert (lengths - 1).abs().max() < 1e-5, name
            # pure half precision keeps its own type, and its lengths
            half = unit_rows(output[name].bfloat16())
            assert half.dtype == torch.bfloat16 and (half.float().norm(dim=1) - 1).abs().max() > 1e-5


@rows(is_first_of_its_class)
def test_compiles_without_a_graph_break(subject):
    torch._dynamo.reset()
    compiled = torch.compile(subject.model, fullgraph=True, backend="eager", dynamic=False)
    assert largest_difference(subject.outputs, run(compiled, subject.batch)) < 1e-5


@rows(is_first_of_its_class)
def test_exports(subject):
    batch = {name: tensor for name, tensor in subject.batch.items() if name not in ("labels", "image_ids")}
    exported = torch.export.export(subject.model, (), kwargs=batch, strict=False)
    again = run(exported.module(), batch)
    assert largest_difference(run(subject.model, batch), again) < 1e-5


# Training


@rows(lambda row: row.learns)
def test_every_parameter_gets_a_gradient(subject):
    received = gradients(subject.load(), subject.batch)
    assert [name for name, gradient in received.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in received.values())
    zero = [name for name, gradient in received.items() if not gradient.any()]
    assert [name for name in zero if not name.endswith(subject.row.no_gradient)] == []


@rows(lambda row: row.model.endswith("ForPreTraining"))
def test_losses_are_named_and_sum_to_the_loss(subject):
    output = subject.model(**subject.batch)
    weights = subject.row.weights
    assert output.losses and set(weights) <= set(output.losses) | {"wpa"}
    assert torch.equal(sum(weights.get(name, 1) * term for name, term in output.losses.items()), output.loss)
    assert output.loss.ndim == 0 and output.loss.dtype == torch.float32


@rows(lambda row: not row.checkpoints)
def test_checkpointing_is_refused_where_nothing_can_be(subject):
    with pytest.raises(ValueError, match="(gradient|activation) checkpointing"):
        subject.load().gradient_checkpointing_enable()


@rows(lambda row: row.checkpoints)
def test_checkpointing_runs_again_and_leaves_gradients_alone(subject):
    passes = {}

    def count(name, module, args):
        passes[name] = passes.get(name, 0) + 1

    def counted_gradients(model):
        # a layer checkpoints inside its call, so its first part tells how often it ran
        passes.clear()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and next(module.parameters()).requires_grad:
                first = next(
                    part for part in module.modules() if next(part.parameters(recurse=False), None) is not None
                )
                first.register_forward_pre_hook(partial(count, type(module).__name__))
        return gradients(model, subject.batch), dict(passes)

    # batch norm stays in evaluation mode: its statistics are not what is compared
    model = subject.load()
    plain, once = counted_gradients(train_but_for_norms(model))
    model = subject.load()
    model.gradient_checkpointing_enable()
    checkpointed, twice = counted_gradients(train_but_for_norms(model))
    assert set(once) == set(subject.row.checkpoints)
    assert twice == {name: 2 * number for name, number in once.items()}
    for name, gradient in plain.items():
        assert (gradient is None) == (checkpointed[name] is None), name
        assert gradient is None or torch.allclose(gradient, checkpointed[name], rtol=1e-4, atol=1e-5), name


def train_but_for_norms(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def test_lora_round_trip(subject, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(subject.load(), LoraConfig(r=2, target_modules=subject.row.lora, init_lora_weights=False))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    scalar(adapted(**subject.batch)).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    optimizer.step()
    adapted.eval()
    trained = run(adapted, subject.batch)
    assert largest_difference(subject.outputs, trained) > 1e-6
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.load(), tmp_path)
    assert largest_difference(trained, run(loaded, subject.batch)) < 1e-6


def test_forward_names_every_input(subject):
    """transformers' Trainer drops the columns that the signature does not name, and must not rescale a mean loss."""
    import inspect

    assert set(subject.row.inputs) <= set(inspect.signature(type(subject.model).forward).parameters)
    assert subject.model.accepts_loss_kwargs is False


def test_blocks_that_must_stay_whole_are_named(subject):
    """A residual block split over two devices breaks, so device maps need every block's class."""
    blocks = {
        type(module).__name__ for module in subject.model.modules() if isinstance(module, GradientCheckpointingLayer)
    }
    assert blocks == set(subject.row.checkpoints)
    assert blocks <= set(subject.model._no_split_modules)


# The vocabulary


@rows(lambda row: row.has_text and not row.predicts_words)
def test_new_tokens_leave_old_texts_alone(subject, tmp_path):
    model = subject.load()
    model.resize_token_embeddings(VOCABULARY + 6)
    assert model.config.get_text_config().vocab_size == VOCABULARY + 6
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 6
    outputs = run(model, subject.batch)
    assert largest_difference(subject.outputs, outputs) < EQUAL

    batch = dict(subject.batch, input_ids=subject.batch["input_ids"].clone())
    batch["input_ids"][:, 1] = VOCABULARY + 5
    with_new = run(model, batch)
    assert largest_difference(outputs, with_new) > 1e-4
    model.save_pretrained(tmp_path)
    assert largest_difference(with_new, run(subject.row.model_class.from_pretrained(tmp_path), batch)) < EQUAL


@rows(lambda row: row.own_text_tower and hasattr(row.config().get_text_config(), "pooling"))
def test_end_of_text_is_pooled_though_an_added_token_has_a_larger_id(subject):
    model = subject.load()
    model.resize_token_embeddings(VOCABULARY + 6)
    batch = dict(subject.batch, input_ids=subject.batch["input_ids"].clone())
    batch["input_ids"][:, 1] = VOCABULARY + 5
    tower = text_tower(model)
    first_end = (batch["input_ids"] == END).int().argmax(1)
    output = tower(batch["input_ids"])
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(4), first_end])
    tower.config.pooling = "largest_id"
    assert torch.equal(tower(batch["input_ids"]).pooler_output, output.last_hidden_state[:, 1])


@rows(lambda row: row.own_text_tower and not row.reads_both)
def test_token_embeddings_may_be_given(subject):
    tower, ids = text_tower(subject.model), subject.batch["input_ids"]
    embeds = tower.get_input_embeddings()(ids)
    if not hasattr(tower.config, "pooling"):  # a tower that pools nothing does not need the ids besides
        assert torch.equal(tower(ids).last_hidden_state, tower(inputs_embeds=embeds).last_hidden_state)
        assert not torch.allclose(
            tower(ids).last_hidden_state, tower(inputs_embeds=2 * embeds).last_hidden_state, atol=1e-3
        )
        return
    by_ids, by_embeds = tower(ids), tower(ids, inputs_embeds=embeds)
    assert torch.equal(by_ids.last_hidden_state, by_embeds.last_hidden_state)
    assert torch.equal(by_ids.pooler_output, by_embeds.pooler_output)
    assert torch.equal(tower(inputs_embeds=embeds).pooler_output, by_ids.last_hidden_state[:, -1])


# The verbs


def verbs(row: Row) -> dict[str, tuple[str, ...]]:
    """The verbs of a model and the batch keys that each takes."""
    texts = ("input_ids", "attention_mask")
    inputs = {
        "get_image_features": row.image_inputs,
        "encode_image": row.image_inputs,
        "get_text_features": texts,
        "encode_text": texts,
    }
    return {verb: needed for verb, needed in inputs.items() if hasattr(row.model_class, verb)}


@rows(lambda row: row.has_pair and not row.reads_both)
def test_features_equal_the_forward_and_are_unit_rows_where_the_configuration_says_so(subject):
    row = subject.row
    called = {
        verb: getattr(subject.model, verb)(**{k: subject.batch[k] for k in needed})
        for verb, needed in verbs(row).items()
    }
    for side in ("image", "text"):
        features = called[f"get_{side}_features"]
        assert torch.allclose(features.norm(dim=1), torch.ones(4), atol=1e-5 if row.unit else 1e-2) == row.unit
        assert torch.allclose(features, subject.outputs[f".{side}_embeds"], atol=1e-5)
        raw = called.get(f"encode_{side}")
        if isinstance(raw, torch.Tensor):
            assert not torch.allclose(raw.norm(dim=1), torch.ones(4), atol=1e-2)
            assert torch.allclose(raw / raw.norm(dim=1, keepdim=True) if row.unit else raw, features, atol=1e-5)
    if row.aligned:  # its scores are of another kind
        return
    pair = {name: subject.batch[name] for name in ("input_ids", "attention_mask", *row.image_inputs)}
    products = (called["get_image_features"] * called["get_text_features"]).sum(1)
    assert torch.allclose(subject.model.score_pairs(**pair), products, atol=rounding(products))
    mixed = (called["get_image_features"].roll(1, 0) * called["get_text_features"]).sum(1)
    assert not torch.allclose(subject.model.score_pairs(**pair), mixed, atol=1e-3)


@rows(lambda row: hasattr(row.model_class, "objective"))
def test_the_loss_equals_the_base_models_logits_turned_into_a_loss(subject):
    """Training computes the last block for the pooled row alone; the full forward must give the same loss and gradients."""
    model = subject.load()
    trained = gradients(model, subject.batch)
    model.zero_grad()
    pair = {name: subject.batch[name] for name in ("input_ids", "attention_mask", *subject.row.image_inputs)}
    full = model.base_model(**pair)
    model.objective(full.image_embeds, full.text_embeds, subject.batch.get("image_ids"))[0].backward()
    assert torch.allclose(full.logits_per_image, full.logits_per_text.T)
    for name, parameter in model.named_parameters():
        assert torch.allclose(trained[name], parameter.grad, rtol=1e-3, atol=1e-5), name


@rows(lambda row: hasattr(row.model_class, "pooled_output") and row.recorded)
def test_the_pooled_row_alone_equals_the_whole_tower(subject):
    model = subject.load()
    main = subject.batch[model.main_input_name]
    assert torch.allclose(model.pooled_output(main), subject.outputs[".pooler_output"], atol=1e-5)
    weight = torch.arange(subject.outputs[".pooler_output"].numel()).cos().view(subject.outputs[".pooler_output"].shape)
    seen = []
    for pooled in (model.pooled_output, lambda x: model(x).pooler_output):
        model.zero_grad()
        (pooled(main) * weight).sum().backward()
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.allclose(seen[0][name], seen[1][name], rtol=1e-4, atol=1e-4) for name in seen[0])


def test_a_copy_is_independent(subject):
    twin = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    again = run(subject.model, subject.batch)
    assert all(torch.equal(tensor, again[name]) for name, tensor in subject.outputs.items())
    assert largest_difference(subject.outputs, run(twin, subject.batch)) > 1e-3

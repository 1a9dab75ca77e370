"""Cases of ALBEF's attention maps: checkpoint, converter, Grad-CAM of a fusion layer and of a block of the image encoder."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_vlp.explain.attention_maps import MATCH, attention_and_gradient, image_maps, word_maps
from tests.parity.albef_model import checkpoints
from tests.parity.harness import Case


def gradcam(case: Case) -> None:
    """`input_ids`, `attention_mask` [B, L] and `image` [B, 3, R, R], with the layers of the options."""
    options = case.config["options"]
    layer, block = options["block_itm"], options["block_itc"]
    batch = case.inputs["input_ids"], case.inputs["attention_mask"], case.inputs["image"]
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        words = model.get_input_embeddings()
        with zero_rows(words, model.config.text_config.pad_token_id, case.config.get("pad_word_embedding_zero", False)):
            crossing = attention_and_gradient(
                model,
                model.cross_attention(layer),
                lambda *batch, model=model: model.match_logits(*batch)[:, MATCH],
                *batch,
            )
            seeing = attention_and_gradient(model, model.image_attention(block), model.pair_similarities, *batch)
            maps = word_maps(model, *batch, layer=layer)
            image = image_maps(model, *batch, block=block)
        values = {
            "itm_cross_attention_map": crossing[0],
            "itm_cross_attention_grad": crossing[1],
            "per_token_gradcam_all": maps,
            f"gradcam_itm_block{layer}": maps.mean(dim=1),  # padding in the count
            "itc_attention_map": seeing[0],
            "itc_attention_grad": seeing[1],
            f"gradcam_itc_block{block}": image,
        }
        case.compare(values, label)


@contextmanager
def zero_rows(words: nn.Embedding, pad: int, wanted: bool) -> Iterator[None]:
    """The embeddings look `pad` up as zeros while the block runs, where the original's torch did."""

    def without(module, inputs, output):
        return output.masked_fill(inputs[0].eq(pad).unsqueeze(-1), 0.0)

    hook = words.register_forward_hook(without) if wanted else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()

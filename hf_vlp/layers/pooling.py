"""From token states to one vector."""

import torch


def gather_rows(hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`hidden_states` [B, L, D] at position `index` [B] of each sequence -> [B, D]."""
    return hidden_states.gather(1, index.view(-1, 1, 1).expand(-1, 1, hidden_states.shape[-1])).squeeze(1)


def first_token_index(input_ids: torch.Tensor, token_id: int) -> torch.Tensor:
    """Position of the first `token_id` in each row of `input_ids` [B, L] -> [B].

    Raises:
        ValueError: on the CPU, naming the rows that hold no such token. On an accelerator the same check is a device-side
            assertion (a synchronisation in every step would cost more than it finds), in a traced graph a runtime assertion.
    """
    found = input_ids == token_id
    present = found.any(dim=1)
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        torch._assert_async(present.all(), f"a row of input_ids holds no end-of-text token (id {token_id})")
    elif not present.all():
        rows = (~present).nonzero().flatten().tolist()
        raise ValueError(
            f"row(s) {rows[:10]} of input_ids hold no end-of-text token (eos_token_id {token_id}): let the processor add it, "
            'or set pooling="largest_id" in the text config for the rule of the original code'
        )
    return found.int().argmax(dim=1)


def largest_id_index(input_ids: torch.Tensor) -> torch.Tensor:
    """Position of the first largest id in each row of `input_ids` [B, L] -> [B]."""
    return input_ids.argmax(dim=1)


def refuse_padding_before(index: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Padding at or before position `index` [B] of a row: `attention_mask` [B, L] is 0 there. Right padding has none.

    Looked for on the CPU outside of traced graphs alone: elsewhere it would be a synchronisation in every step.

    Raises:
        ValueError: naming the rows.
    """
    if torch.compiler.is_compiling() or attention_mask.device.type != "cpu" or index.device.type != "cpu":
        return
    seen = torch.arange(attention_mask.shape[1])[None, :] <= index[:, None]  # [B, L]
    padded = ((attention_mask == 0) & seen).any(dim=1)
    if padded.any():
        rows = padded.nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask is 0 at or before the end of text in row(s) {rows[:10]}: pad texts on the right "
            '(tokenizer.padding_side = "right"), positions count from the start'
        )


def masked_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `hidden_states` [B, L, D] over the positions where `attention_mask` [B, L] is 1 -> [B, D]."""
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weight = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # [B, L, 1]
    return (hidden_states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def unit_rows(embeds: torch.Tensor) -> torch.Tensor:
    """Rows divided by their L2 norm, [B, E]; under autocast in float32, because lengths of half precision are off by 0.4 %."""
    device = embeds.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            embeds = embeds.float()
            return embeds / embeds.norm(dim=-1, keepdim=True)
    return embeds / embeds.norm(dim=-1, keepdim=True)

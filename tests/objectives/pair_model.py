"""A model of a few weights that reads an image of a few cells and a text together, and its processor and records."""

import torch

DIM = 6


class PairModel(torch.nn.Module):
    """Scores by a small network over the means of words and cells; remembers which pairs it has scored.

    Attributes:
        scored: (last word of the text, first cell of the image) of every pair. shapes: (B, L, P) of every batch. encoded: images.
    """

    def __init__(self, stop_after: int | None = None, seed: int = 0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.words = torch.nn.Parameter(torch.randn(64, DIM, generator=draw))
        self.mix = torch.nn.Parameter(torch.randn(DIM, DIM, generator=draw))
        self.stop_after, self.encoded = stop_after, 0
        self.scored: list[tuple[int, int]] = []
        self.shapes: list[tuple[int, int, int]] = []

    def encode_image(self, pixel_values, pixel_mask):
        self.encoded += len(pixel_values)
        cells = pixel_values[:, 0, 0]  # [B, P]
        embeds = torch.stack([torch.sin(cells * (k + 1)) for k in range(DIM)], dim=-1)
        embeds[..., 0] = cells
        return {"image_embeds": embeds, "image_mask": pixel_mask[:, 0]}

    def score_pairs(self, input_ids, attention_mask, image_embeds, image_mask):
        assert not image_embeds[image_mask == 0].any() and not input_ids[attention_mask == 0].any()
        return self.scores(input_ids, self.words[input_ids], attention_mask, image_embeds, image_mask)

    def scores(self, input_ids, words, attention_mask, image_embeds, image_mask):
        assert not self.training
        if self.stop_after is not None and len(self.shapes) == self.stop_after:
            raise KeyboardInterrupt
        last = attention_mask.sum(dim=1) - 1
        cells = image_embeds[:, 0, 0].int().tolist()
        self.scored += zip(input_ids[torch.arange(len(last)), last].tolist(), cells * (len(last) // len(cells)))
        self.shapes.append((*input_ids.shape, image_embeds.shape[1]))
        text = (words * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        image = (image_embeds * image_mask[..., None]).sum(dim=1) / image_mask.sum(dim=1, keepdim=True)
        return ((text @ self.mix) * image.tanh()).sum(dim=1)


class TwoStageModel(PairModel):
    """The same scores of sides that are encoded apart, and an embedding of each side alone.

    Attributes:
        read: the last word of every text that was encoded. attended: the first cell of every image whose keys were computed.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.read: list[int] = []
        self.attended: list[int] = []

    def encode_text(self, input_ids, attention_mask):
        last = attention_mask.sum(dim=1) - 1
        self.read += input_ids[torch.arange(len(last)), last].tolist()
        # what stands at padding is not defined
        states = torch.cat([self.words[input_ids], input_ids[..., None]], dim=-1)
        return {"text_embeds": states.masked_fill(attention_mask[..., None] == 0, torch.nan)}

    def keys_and_values(self, image_embeds, image_mask):
        self.attended += image_embeds[:, 0, 0].int().tolist()
        return image_embeds, image_mask

    def score_pairs(self, text_embeds, attention_mask, key_values):
        assert len(key_values[0]) == 1
        return self.scores(text_embeds[..., -1].long(), text_embeds[..., :-1], attention_mask, *key_values)

    def get_image_features(self, pixel_values, pixel_mask):
        rows = self.encode_image(pixel_values, pixel_mask)
        total = (rows["image_embeds"] * rows["image_mask"][..., None]).sum(dim=1)
        return torch.nn.functional.normalize(torch.cos(total), dim=-1)

    def get_text_features(self, input_ids, attention_mask):
        total = (self.words[input_ids] * attention_mask[..., None]).sum(dim=1)
        return torch.nn.functional.normalize(torch.sin(total), dim=-1)


class PairProcessor:
    """Image i: cells i, i + 1, ... of which there are 1 + i % 3. Words are numbers; texts are filled up with zeros."""

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True):
        if images is not None:
            sizes = torch.tensor([1 + number % 3 for number in images])
            mask = (torch.arange(int(sizes.max())) < sizes[:, None]).long()
            cells = (torch.tensor(images)[:, None] + torch.arange(mask.shape[1])).float() * mask
            return {"pixel_values": cells[:, None, None].expand(-1, 3, -1, -1), "pixel_mask": mask[:, None]}
        rows = [torch.tensor([int(word) for word in line.split()]) for line in text]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def pair_records(images: int = 7) -> list[dict]:
    """Image i twice, with two captions and then one; the last word of a caption is its own."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for number in range(2 * images):
        captions = []
        for _ in range(2 if number < images else 1):
            length = int(torch.randint(6, (1,), generator=draw))
            own = 20 + sum(len(row["captions"]) for row in rows) + len(captions)
            captions.append(" ".join(map(str, [*torch.randint(1, 20, (length,), generator=draw).tolist(), own])))
        rows.append({"image": number % images, "captions": captions, "image_id": f"n{number % images}"})
    return rows

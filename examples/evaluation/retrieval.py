"""Retrieval by towers, or by a model that scores pairs; alone, after candidates, or as one of several models."""

from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

from evaluation.inputs import scores_pairs
from hf_vlp.data.crisscrossed import read_crisscrossed
from hf_vlp.data.pickles import read_npy
from hf_vlp.evaluation.crisscrossed import evaluate_crisscrossed
from hf_vlp.evaluation.ensemble import SavedScores, check_fingerprint, mean_scores, write_scores
from hf_vlp.evaluation.fusion_retrieval import Candidates, embeds_each_side, evaluate_fusion_retrieval, propose
from hf_vlp.evaluation.provenance import shortened
from hf_vlp.evaluation.retrieval import (
    RetrievalSet,
    evaluate_retrieval,
    fingerprint_of,
    five_fold_scores,
    score_metrics,
)
from hf_vlp.evaluation.zero_shot import fill_template


def retrieval(options, model, processor, records, shared) -> dict:
    template = options.prompt
    prompt = (lambda caption: fill_template(template, caption)) if template else None
    pairs = RetrievalSet(records, captions_per_image=options.captions_per_image)
    if scores_pairs(model):
        report = evaluate_fusion_retrieval(
            model,
            processor,
            pairs,
            prompt=prompt,
            candidates=candidates(options, model, processor, pairs, {"prompt": prompt, **shared}),
            pair_batch_size=options.pair_batch_size,
            resume=options.resume,
            **shared,
        )
    else:
        for option in ("candidates", "k", "resume"):
            if getattr(options, option) is not None:
                raise SystemExit(f"--{option} is for models that score pairs; {options.model} embeds each side alone")
        report = evaluate_retrieval(model, processor, pairs, prompt=prompt, **shared)
    is_main = options.accelerator.is_main_process
    if is_main:
        print(report.table())
    if options.save_scores and is_main:
        written = write_scores(options.save_scores, report.scores(), report.text_ids, report.fingerprint())
        print(f"scores written to {written}")
    folds = report.five_fold_1k() if options.five_fold else {}
    if options.ensemble:
        members = [saved_scores(path, report.fingerprint()) for path in options.ensemble]
        scores = mean_scores([report.scores(), *members])
        ids = report.image_ids, report.text_ids
        report.metrics = score_metrics(scores, *ids)
        report.protocol += f", scores averaged with those of {', '.join(path.name for path in options.ensemble)}"
        folds = five_fold_scores(scores, *ids) if options.five_fold else {}
        if is_main:
            print(f"\nthe mean of {1 + len(members)} models\n{report.table()}")
    result = report.to_dict()
    if template:
        result["protocol"] += f", prompt '{template}'"
    if folds:
        result["metrics"] |= {f"1K/{name}": value for name, value in folds.items()}
        options.accelerator.print(f"five-fold 1K: rsum {result['metrics']['1K/rsum']:.1f}")
    return result


def candidates(options, model, processor, pairs, shared) -> Candidates | None:
    """The pairs to score: what --candidates proposes, a model with towers or its scores; without it the model's own embedding."""
    if options.k is None:
        if options.first_stage_weight:
            raise SystemExit("--first-stage-weight is for two stages: give --k too")
        if options.candidates is not None:
            raise SystemExit("--candidates names what proposes pairs, and --k how many: give --k too")
        return None
    for option in ("save_scores", "ensemble", "five_fold"):
        if getattr(options, option):
            raise SystemExit(f"--{option.replace('_', '-')} needs the scores of all pairs: leave out --k")
    if len(options.k) > 2:
        raise SystemExit(f"--k {' '.join(map(str, options.k))}: give one number for both directions, or two")
    images, captions = options.k[0], options.k[-1]
    if options.candidates is None:
        if not embeds_each_side(model):
            raise SystemExit(
                f"--k {images}: {options.model} embeds no side alone and proposes no pairs: name with --candidates what does"
            )
        return propose(model, processor, pairs, images, captions, weight=options.first_stage_weight, **shared)
    name, source = shortened(options.candidates), Path(options.candidates)
    if source.suffix in (".safetensors", ".npy"):
        scores = saved_scores(source, fingerprint_of(pairs.captions, pairs.text_ids))
        scores = scores[:] if isinstance(scores, SavedScores) else torch.from_numpy(scores).float()
        return Candidates(scores, images, captions, name, options.first_stage_weight)
    first = AutoModel.from_pretrained(options.candidates).to(shared["device"])
    shared = {key: value for key, value in shared.items() if key != "prompt"} | {"weight": options.first_stage_weight}
    return propose(first, AutoProcessor.from_pretrained(options.candidates), pairs, images, captions, name, **shared)


def saved_scores(path: Path, fingerprint: str):
    """Scores [N, M] of --save-scores; or of a .npy file, which says nothing of its captions: an array, or {npts, sims}
    as the original's evaluation saves them.
    """
    if path.suffix == ".npy":
        content = read_npy(path)
        scores = content.get("sims") if isinstance(content, dict) else content
        if getattr(scores, "ndim", None) != 2:
            raise SystemExit(f"{path} holds no scores [images, captions]")
        return scores
    saved = SavedScores(path)
    check_fingerprint(saved, fingerprint, "--data")
    return saved


def crisscrossed(options, model, processor, records, shared) -> dict:
    if options.annotations is None:
        raise SystemExit("--task cxc needs --annotations, the folder of cxc_it.json and its four companions")
    given = read_crisscrossed(options.annotations)
    report = evaluate_crisscrossed(model, processor, records, given.captions_of, given.annotations, **shared)
    options.accelerator.print(report.table())
    return report.to_dict()

"""Questions, statements about two images and hypotheses, judged by a model that was fine-tuned for it."""

from hf_vlp.evaluation.answers import write_submission
from hf_vlp.evaluation.tasks import evaluate_entailment, evaluate_nlvr2, evaluate_vqa, vqa_submission


def vqa(options, model, processor, records, shared) -> dict:
    report = evaluate_vqa(model, processor, records, **shared)
    options.accelerator.print(report.table())
    if options.submission and options.accelerator.is_main_process:
        entries = vqa_submission(report, records, model.config.id2label)
        print(f"answers written to {write_submission(options.submission, entries)}")
    return report.to_dict()


def nlvr2(options, model, processor, records, shared) -> dict:
    report = evaluate_nlvr2(model, processor, records, **shared)
    options.accelerator.print(report.table())
    return report.to_dict()


def entailment(options, model, processor, records, shared) -> dict:
    report = evaluate_entailment(model, processor, records, **shared)
    options.accelerator.print(report.table())
    return report.to_dict()

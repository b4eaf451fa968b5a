"""What measures are called on a screen or a page. Apart from the measures, so that showing them loads nothing else."""

__all__ = ["TITLES"]

TITLES = {  # by their names in results
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy, by length",
    "exact_match": "exact match",
    "valid_json": "valid JSON",
    "json_f1": "JSON fields F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
}

"""The measured models and their metrics: keys, labels, and how a number is formatted."""

SPEED = "generation_tokens_per_second"

NUMBERS = (
    "parameters", "weights_mb", SPEED, "validation_loss", "test_loss", "out_of_domain_loss", "perplexity", "kl",
    "top1_agreement",
)  # fmt: skip
"""Metrics of every model; downstream tasks add theirs, such as `arc_easy_acc`."""

MODELS = {
    "teacher_before": "Base model",
    "teacher": "Teacher",
    "pruned": "Pruned student",
    "student": "Distilled student",
}
"""The four models in the order of the flow: key in evaluation.json, label in the report."""

CHAMPION = "champion"

MEASURES: tuple[tuple[str, str, str, str, str | None, int], ...] = (
    # key, label, note, number format, format of the difference from the teacher, better direction (-1: less is better)
    ("parameters", "Parameters", "", "count", "relative", -1),
    ("weights_mb", "Weights", "", "megabytes", "relative", -1),
    ("generation_tokens_per_second", "Generation speed", "tokens per second", "decimal", "relative", 1),
    ("validation_loss", "Validation loss", "nats per token", "loss", "loss", -1),
    ("test_loss", "Test loss", "nats per token", "loss", "loss", -1),
    ("out_of_domain_loss", "Out-of-domain loss", "nats per token, on other text", "loss", "loss", -1),
    ("perplexity", "Perplexity", "", "decimal", "decimal", -1),
    ("kl", "Divergence from the teacher", "forward KL, nats per token", "loss", None, -1),
    ("top1_agreement", "Agreement with the teacher", "same most likely next token", "share", None, 1),
)

TASK_METRICS = {"acc": "accuracy", "acc_norm": "accuracy, length-normalised"}

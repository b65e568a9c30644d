"""What a run needs, computed from its settings and the teacher's config.json: memory, disk, operations, hours.

The only place with bytes per parameter. `sizes` counts parameters, `host` has what every task asks a cluster for,
`device` the memory of a GPU (or of a training on a CPU), `gpus` the kinds of GPUs, `work` operations, and `estimate`
puts them together and recommends settings.
"""

from minitron.config.resources.device import find_peak, list_gpu_phases, list_training_phases
from minitron.config.resources.host import (
    BASE,
    PodRequest,
    format_request,
    list_writing,
    parse_quantity,
    request_cpu,
    request_pod,
    request_trial,
    sum_memory,
)
from minitron.config.resources.sizes import (
    ASSUMED,
    BF16,
    GIB,
    UNKNOWN,
    Models,
    Sizes,
    Term,
    count_models,
    count_parameters,
    total,
)

__all__ = [
    "ASSUMED",
    "BASE",
    "BF16",
    "GIB",
    "UNKNOWN",
    "Models",
    "PodRequest",
    "Sizes",
    "Term",
    "count_models",
    "count_parameters",
    "find_peak",
    "format_request",
    "list_gpu_phases",
    "list_training_phases",
    "list_writing",
    "parse_quantity",
    "request_cpu",
    "request_pod",
    "request_trial",
    "sum_memory",
    "total",
]

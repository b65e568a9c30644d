"""What several tests share and no server provides."""

from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

SEQUENCE, STEPS = 32, 6
"""Of the trainings of `compressed`: tokens of a sequence, optimizer steps."""

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip
"""What counts of the config.json of meta-llama/Llama-3.1-8B."""

"""LoRA post-training of language models by SFT, DPO and GRPO. Importing this package imports no backend."""

"""A teacher in miniature, for configs/tiny_distill.py: the kind of model that configs/tiny.py trains, with
twice the experts and more text.

    drover train --config configs/tiny_behemoth.py
"""

from ml_collections import ConfigDict

from data.config import DataConfig
from model.config import ModelConfig, VisionConfig
from trainer.config import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict

DATA = DataConfig(mixture={"text": 0.3, "scenes": 0.7}, sequence_length=512, batch_size=4, tokenizer_size=1024)
"""Of the teacher and of its students: both have to read the same tokens."""


def get_config() -> ConfigDict:
    # As in configs/tiny.py, each quarter of a picture is one token.
    vision = VisionConfig(
        image_size=48, patch_size=12, hidden_size=128, num_layers=3, num_heads=4, ffn_size=512, adapter_size=256
    )
    model = ModelConfig(
        vocab_size=1024,
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        dense_ffn_size=768,
        expert_ffn_size=384,
        num_experts=16,
        chunk_size=128,
        rope_theta=10000.0,
        temperature_floor=128.0,
        init_std=0.0,
        vision=vision,
    )
    return to_config_dict(
        RunConfig(
            name="tiny_behemoth",
            steps=1400,
            model=model,
            data=DATA,
            optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=40),
            checkpoint=CheckpointConfig(every_steps=200),
            eval=EvalConfig(every_steps=100, questions=384),
            log=LogConfig(every_steps=5),
        )
    )

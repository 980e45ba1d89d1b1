"""A config file for tests: every part of the architecture, small enough to compile and train in seconds."""

from ml_collections import ConfigDict

from data.config import DataConfig
from model.config import ModelConfig, VisionConfig
from trainer.config import CheckpointConfig, EvalConfig, LogConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dense_ffn_size=48,
        expert_ffn_size=24,
        num_experts=4,
        moe_layer_step=1,
        nope_layer_step=2,
        chunk_size=64,
        rope_theta=10000.0,
        temperature_floor=64.0,
        init_std=0.0,
        vision=VisionConfig(
            image_size=48, patch_size=12, hidden_size=16, num_layers=1, num_heads=2, ffn_size=64, adapter_size=32
        ),
    )
    return to_config_dict(
        RunConfig(
            name="micro",
            steps=40,
            model=model,
            data=DataConfig(
                sequence_length=576,
                batch_size=2,
                tokenizer="bytes",
                scenes=256,
                tiles_per_row=4,
                max_tiles=2,
                workers=0,
            ),
            optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=5),
            checkpoint=CheckpointConfig(every_steps=10),
            eval=EvalConfig(every_steps=20, batches=1, final_batches=1, questions=4),
            log=LogConfig(every_steps=1),
        )
    )

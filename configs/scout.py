"""Llama 4 Scout, 17B active and 16 experts, in its released sizes (108.6B parameters, vision encoder included).

    drover train --config configs/scout.py --workdir runs/scout

Every layer is a mixture of experts.

This has never been run: what follows is arithmetic. Weights, gradients and two Adam moments in float32 are 16 bytes a
parameter, 1.74 TB: 22 GPUs of 80 GB or 19 TPU v5p chips of 95 GB before any activation. A token of an 8,192-token row
costs about 109 GFLOP (6 x 16.14B active parameters without the embedding table, and 12.1 GFLOP of attention). The 419B
tokens of this run are 4.6e22 FLOP: 5.2 days on 256 H100 at 40 % of their bfloat16 peak of 989 TFLOP/s.

The data is the embedded one (text of the standard library, drawn scenes) until data.paths names yours (docs/DATA.md). Its
tokenizer fills 32,768 of the 202,048 rows of the embedding table.
"""

from ml_collections import ConfigDict

from data.config import DataConfig
from model.config import ModelConfig, RopeScaling, VisionConfig
from trainer.config import CheckpointConfig, EvalConfig, OptimizerConfig, RunConfig
from trainer.sections import to_config_dict


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=202_048,
        hidden_size=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        dense_ffn_size=16_384,  # of no layer here: all are mixtures
        expert_ffn_size=8192,
        num_experts=16,
        experts_per_token=1,
        moe_layer_step=1,
        nope_layer_step=4,
        chunk_size=8192,
        qk_norm=True,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=8192),
        temperature_floor=8192.0,
        temperature_scale=0.1,
        vision=VisionConfig(
            image_size=336,
            patch_size=14,
            hidden_size=1408,
            num_layers=34,
            num_heads=16,
            ffn_size=5632,
            shuffle=2,
            adapter_size=4096,
            rope_theta=10_000.0,
        ),
        dtype="bfloat16",
        remat="full",
    )
    # 4.2M tokens a step; a row has room for two images of the most tiles, 16 and a global one.
    data = DataConfig(sequence_length=8192, batch_size=512, tiles_per_row=34, max_tiles=16, tokenizer_size=32_768)
    return to_config_dict(
        RunConfig(
            name="scout",
            steps=100_000,
            model=model,
            data=data,
            optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=2000),
            checkpoint=CheckpointConfig(every_steps=500, keep_last=2, keep_every=10_000),
            eval=EvalConfig(every_steps=1000),
        )
    )
